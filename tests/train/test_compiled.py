"""Decoder layers through torch.compile train as they do uncompiled."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tuneloom.errors import RefusedError
from tuneloom.testing import Gang, metrics, small_config
from tuneloom.train import compiled as compiling
from tuneloom.train.config import ModelConfig


def evidence(lab: Path, run_id: str) -> dict[str, Any]:
    effects = json.loads((lab / "runs" / run_id / "effects.json").read_text())
    (receipt,) = [r for r in effects["receipts"] if r["option"] == "model.compile"]
    assert receipt["acted"] and effects["layers_compiled"] == 2
    found: dict[str, Any] = receipt["evidence"]
    return found


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_compiled_layers_give_the_curve_of_plain_ones(lab: Path, two: Gang, stage: int) -> None:
    for compiled in (False, True):
        config = small_config(lab, f"compiled{compiled}{stage}".lower(), steps=6,
                              zero__stage=stage, model__compile=compiled)  # fmt: skip
        two.fit(config)
    runs = [f"compiled{compiled}{stage}" for compiled in ("false", "true")]
    plain, compiled_ = (metrics(lab, run) for run in runs)
    assert compiled_ == pytest.approx(plain, rel=1e-6)
    found = evidence(lab, runs[1])
    # Two layers and two steps. Seven graphs: before and after attention and the whole layer's
    # entry, once for a first layer whose input needs no gradient and once for all others.
    assert found["compiled_forwards"] == 4 and found["graphs"] == 7 and found["seconds"] > 0


def test_packs_of_other_lengths_make_no_new_graphs(lab: Path, one: Gang) -> None:
    """Two epochs of uneven packs, then the receipt: as many graphs as after two steps."""
    settings = {"model__compile": True, "batch__shuffle": True, "train__effects_step": 12}
    one.fit(small_config(lab, "lengths", steps=12, **settings))
    assert evidence(lab, "lengths")["graphs"] == 7


def test_bf16_stays_within_half_a_percent(lab: Path, one: Gang) -> None:
    """Inductor keeps fp32 between ops that eager rounds to bf16: other bits, the same curve."""
    for compiled in (False, True):
        settings = {"model__dtype": "bf16", "model__compile": compiled}
        one.fit(small_config(lab, f"half{compiled}".lower(), **settings))
    assert metrics(lab, "halftrue") == pytest.approx(metrics(lab, "halffalse"), rel=5e-3)


def test_validation_and_samples_make_no_graphs(lab: Path, one: Gang) -> None:
    often = {"train__validate_every": 1, "train__sample_every": 1, "train__samples": 1}
    rows = str(lab / "validation.jsonl")
    one.fit(small_config(lab, "compiled-validated", steps=4, data__validation=rows,
                         model__compile=True, train__effects_step=3, **often))  # fmt: skip
    found = evidence(lab, "compiled-validated")
    assert found["graphs"] == 7 and found["compiled_forwards"] == 6


def test_a_machine_without_a_compiler_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    from tuneloom.train.compiled import _refuse_without_compiler

    _refuse_without_compiler(torch.device("cpu"))
    monkeypatch.setattr(config.cpp, "cxx", ("/nowhere/g++",))
    with pytest.raises(RefusedError, match=r"model\.compile: no C\+\+ compiler here"):
        _refuse_without_compiler(torch.device("cpu"))


def test_another_users_cache_of_compiled_code_is_refused(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache = tmp_path / f"tuneloom-user-{os.getuid()}"
    cache.mkdir()
    cache.chmod(0o777)
    network = AutoModelForCausalLM.from_pretrained(lab / "base")
    settings = ModelConfig(path=str(lab / "base"), compile=True)
    with pytest.raises(RefusedError, match="is not this user's alone"):
        compiling.install(network, settings, torch.device("cpu"))
