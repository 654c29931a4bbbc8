"""Three LoRA steps under ZeRO 0 to 3, plain, patched and (0 to 2) with augmented products: prints
losses and what ran, as JSON.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import Any
from unittest import mock

os.environ.update(DS_ACCELERATOR="cpu", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
os.environ.update(MASTER_ADDR="127.0.0.1", DS_SKIP_CUDA_CHECK="1")

import deepspeed
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from tuneloom.kernels import augmented_lora
from tuneloom.kernels.jit import CALLS
from tuneloom.kernels.loss_head import loss_from_head
from tuneloom.kernels.patch import patch


def steps(stage: int, patched: bool, augmented: bool = False) -> list[float]:
    """Losses of three steps; the head is trained too, so that its gradient is partitioned."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=61, use_cache=False,
    )  # fmt: skip
    model: Any = transformers.LlamaForCausalLM(config)
    if patched:
        patch(model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    model.get_output_embeddings().weight.requires_grad_(True)
    if augmented:
        assert augmented_lora.augment(model) == {"augmented": 8}
    trained = [p for p in model.parameters() if p.requires_grad]
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, model_parameters=trained, config=settings
    )
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(3):
        labels = ids.roll(-1, 1)
        with loss_from_head(engine.module, labels) as fused:
            out = engine(input_ids=ids).logits
        assert fused == patched
        if not fused:
            out = functional.cross_entropy(out.flatten(0, 1), labels.flatten(), reduction="sum")
        engine.backward(out / labels.numel())
        engine.step()
        losses.append(out.item())
    return losses


def main() -> int:
    """All stages; the last line of standard output is the result."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    deepspeed.init_distributed("gloo")
    found = {}
    for stage in range(4):
        plain = steps(stage, False)
        CALLS.clear()
        found[stage] = {"plain": plain, "patched": steps(stage, True), "calls": dict(CALLS)}
        if stage < 3:
            run = augmented_lora.forward
            with mock.patch.object(augmented_lora, "forward", wraps=run) as product:
                found[stage]["augmented"] = steps(stage, True, augmented=True)
            found[stage]["augmented_products"] = product.call_count
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
