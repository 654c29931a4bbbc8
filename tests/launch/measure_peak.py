"""Run by torchrun in test_peak.py: measured and forecast peak bytes of two real steps, as JSON."""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from tuneloom.config import build
from tuneloom.kernels import attention
from tuneloom.launch.anatomy import anatomy, saved_activations
from tuneloom.launch.memory import BUCKET, BYTES, forecast
from tuneloom.train import distributed, method, zero
from tuneloom.train.config import ADAPTER_BUCKET, TrainConfig
from tuneloom.train.model import DTYPES

SHAPE = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}  # fmt: skip
TOKENS = 256


def main(folder: Path, kind: str, dtype: str, stage: int) -> None:
    world = distributed.start()
    (folder / f"{world.rank}").mkdir()
    path = folder / f"{world.rank}"
    (path / "config.json").write_text(json.dumps(SHAPE), encoding="utf-8")
    config = build(TrainConfig, {
        "steps": 1, "model": {"path": str(path), "dtype": dtype}, "method": {"kind": kind},
        "objective": {"kind": "sft"}, "data": {"path": "x"}, "zero": {"stage": stage},
        "batch": {"max_length": TOKENS, "tokens": TOKENS},
    })  # fmt: skip
    settings = zero.deepspeed_config(config, world, accumulation=1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with zero.partitioned_init(settings):
            network = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(path), dtype=DTYPES[dtype]
            )
            attention.install(network, attention.Choice("sdpa", "test"))
            network = method.apply(network, config.method)
        engine = zero.build_engine(network, config, settings)
        ready = time.time_ns()
        ids = torch.randint(0, SHAPE["vocab_size"], (1, TOKENS))
        for _ in range(2):
            engine.backward(loss(engine, ids), scale_wrt_gas=False)
            engine.step()
    parts = forecast(config, anatomy(config), saved_activations(config), ranks=2, cuda=True)
    if world.first:
        elements = BUCKET if kind == "full" else ADAPTER_BUCKET
        bucket = BYTES[dtype] * elements if stage >= 2 else 0
        planned = parts.device - parts.context - bucket
        print(json.dumps({"measured": peak(profiler, ready, elements), "planned": planned}))
    dist.barrier()


def loss(engine: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = engine(input_ids=ids, use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits.float(), ids[0], reduction="sum")


def peak(profiler: profile, ready: int, elements: int) -> int:
    """Most bytes at once after `ready`, without DeepSpeed's bucket, whose pages stay untouched."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if abs(event.nbytes()) not in (2 * elements, 4 * elements):
            now += event.nbytes()
            most = max(most, now) if event.start_ns() >= ready else 0
    return most


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
