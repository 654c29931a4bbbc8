"""effects.json: which modules were patched with which op, and which attention ran and why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from tuneloom.testing import Gang, small_config


def effects(lab: Path, one: Gang, run_id: str, **settings: object) -> dict[str, Any]:
    one.fit(small_config(lab, run_id, steps=3, **settings))
    found: dict[str, Any] = json.loads((lab / "runs" / run_id / "effects.json").read_text())
    return found


def test_what_was_patched_stands_in_effects_module_by_module(lab: Path, one: Gang) -> None:
    assert effects(lab, one, "patched", model__kernels=True)["kernels"] == {
        "LlamaForCausalLM": {"linear_cross_entropy": 1},
        "LlamaDecoderLayer": {"activation_diet": 2},
        "LlamaAttention": {"rope": 2},
        "LlamaMLP": {"gated": 2},
        "LlamaRMSNorm": {"rms_norm": 5},
    }
    assert effects(lab, one, "unpatched", model__kernels=False)["kernels"] == {}


def base_of(lab: Path, family: str, **shape: object) -> dict[str, object]:
    """Settings of a run that trains a tiny model of `family` from random weights."""
    folder = lab / family
    shutil.copytree(lab / "base", folder)
    config = AutoConfig.for_model(
        family, vocab_size=384, hidden_size=64, intermediate_size=128, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, **shape,
    )  # fmt: skip
    config.architectures = None
    config.save_pretrained(folder)
    return {
        "model__path": str(folder), "model__init": "random", "method__kind": "full",
        "batch__packing": False, "batch__sequences": 2,
    }  # fmt: skip


def test_a_model_that_kernels_do_not_know_trains_unpatched_and_its_receipt_says_so(
    lab: Path, one: Gang
) -> None:
    """Whatever was counted beside: that the loss came from logits is no op of ours."""
    settings = base_of(lab, "olmo2", num_hidden_layers=2)
    found = effects(lab, one, "unknown", model__kernels=True, **settings)
    (receipt,) = [r for r in found["receipts"] if r["option"] == "model.kernels"]
    assert not receipt["acted"] and list(found["kernels"].values()) == [{"unpatched": 1}]


@pytest.mark.parametrize("host", [False, True])
def test_recomputed_layers_are_counted_also_where_few_attend_and_validation_runs_between(
    lab: Path, one: Gang, host: bool
) -> None:
    layers = ["conv", "conv", "full_attention"]
    where = lab if not host else lab / "host"
    where.mkdir(exist_ok=True)
    if host:
        shutil.copytree(lab / "base", where / "base")
    settings = base_of(where, "lfm2", num_hidden_layers=3, layer_types=layers)
    settings |= {"model__checkpointing": "on", "model__checkpoint_offload": host}
    settings |= {"data__validation": str(lab / "validation.jsonl"), "train__validate_every": 1}
    found = effects(lab, one, "hybrid-host" if host else "hybrid", **settings)["receipts"]
    (receipt,) = [r for r in found if r["option"] == "model.checkpointing=on"]
    assert receipt["acted"]
    assert receipt["evidence"] == {"layers_recomputed": 2 * 3, "micro_batches": 2}


def test_the_attention_that_ran_stands_there_with_its_reason(lab: Path, one: Gang) -> None:
    reasons = {
        "auto": "flash needs a CUDA device; varlen needs a CUDA device",
        "eager": "asked for",
    }
    for asked, reason in reasons.items():
        found = effects(lab, one, f"attention-{asked}", model__attention=asked)["receipts"]
        (receipt,) = [r for r in found if r["option"] == f"model.attention={asked}"]
        backend = {"auto": "sdpa"}.get(asked, asked)
        assert receipt["evidence"]["reasons"] == {backend: reason}
        assert list(receipt["evidence"]["calls"]) == [backend]
