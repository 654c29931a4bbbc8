"""effects.json: which modules were patched with which op, and which attention ran and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
