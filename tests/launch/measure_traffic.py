"""Run in test_traffic.py: what one rank sends in a real DeepSpeed step, as JSON.

The group is torch's fake one: rank 0 of 8, with nobody at the other end. Every collective is seen
where torch dispatches it, below all wrappers of DeepSpeed, in the third step, when ZeRO-3 knows the
order of the modules. Bytes as a ring over many ranks sends them, of the whole buffer: an all-reduce
twice, an all-gather, a reduce-scatter and a reduce once.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from tuneloom.config import build
from tuneloom.kernels import attention
from tuneloom.train import method, zero
from tuneloom.train.config import TrainConfig
from tuneloom.train.distributed import World, quiet_libraries
from tuneloom.train.model import DTYPES

RANKS, TOKENS = 8, 16
TIMES = {
    "allreduce_": 2, "_allgather_base_": 1, "allgather_": 1, "_reduce_scatter_base_": 1,
    "reduce_scatter_": 1, "reduce_": 1,
}  # fmt: skip


class Counter(TorchDispatchMode):
    """Bytes and messages of collectives; scalars (norms, overflow) are no message."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = self.messages = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            size = max(sum(t.nbytes for t in _tensors(argument)) for argument in args)
            self.sent += TIMES[func.name().removeprefix("c10d::")] * size
            self.messages += size > 16
        return func(*args, **(kwargs or {}))


def _tensors(argument: Any) -> list[Tensor]:
    if isinstance(argument, Tensor):
        return [argument]
    return [t for a in argument for t in _tensors(a)] if isinstance(argument, list | tuple) else []


def configured(folder: Path, case: dict[str, Any]) -> TrainConfig:
    """A case's run of the model in `folder`."""
    return build(TrainConfig, {
        "steps": 1, "method": {"kind": case["kind"]}, "objective": {"kind": "sft"},
        "model": {"path": str(folder), "dtype": case["dtype"],
                  "checkpointing": case["checkpointing"]},
        "data": {"path": "x"}, "zero": {"stage": case["stage"]},
        "batch": {"max_length": TOKENS, "tokens": TOKENS, "accumulation": case["accumulation"]},
    })  # fmt: skip


def measure(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """`sent` and `messages` of a step; `zero` of a case goes over what train/zero.py sets."""
    config = configured(folder, case)
    world = World(0, RANKS, 0, torch.device("cpu"))
    settings = zero.deepspeed_config(config, world, accumulation=case["accumulation"])
    settings["zero_optimization"] |= case["zero"]
    with zero.partitioned_init(settings):
        network = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=DTYPES[case["dtype"]]
        )
        attention.install(network, attention.Choice("sdpa", "test"))
        if case["checkpointing"] == "on":
            network.gradient_checkpointing_enable({"use_reentrant": False})
        network = method.apply(network, config.method)
    engine = zero.build_engine(network.train(), config, settings)
    ids = torch.randint(0, network.config.vocab_size, (1, TOKENS))
    for _ in range(2):
        step(engine, ids, case["accumulation"])
    with Counter() as counter:
        step(engine, ids, case["accumulation"])
    return {"sent": counter.sent, "messages": counter.messages}


def step(engine: Any, ids: Tensor, accumulation: int) -> None:
    for _ in range(accumulation):
        logits = engine(input_ids=ids, use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[0], reduction="sum")
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()


def main(folder: Path, cases: list[dict[str, Any]]) -> None:
    quiet_libraries()
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    print(json.dumps([measure(folder, case) for case in cases]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
