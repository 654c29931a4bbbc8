"""A frozen base in FP8: let in by the loss of the first batch, and seen by nothing but the run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tuneloom.config import build
from tuneloom.errors import ConfigError, RefusedError
from tuneloom.testing import Gang, metrics, small_config, tiny_model
from tuneloom.train.config import TrainConfig

HALF = {"model__dtype": "bf16", "steps": 8}


def written(folder: Path, run_id: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "runs" / run_id / name).read_text())
    return found


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_fp8_gives_the_curve_of_bf16_from_the_same_rows(
    lab: Path, two: Gang, stage: int, kernels: bool
) -> None:
    for held in (False, True):
        settings = HALF | {"zero__stage": stage, "model__kernels": kernels, "model__fp8": held}
        drilled = stage == 2
        config = small_config(lab, f"f8{held}{stage}{kernels}".lower(), train__drill=drilled,
                              **settings)  # fmt: skip
        two.fit(config)
    runs = [f"f8{held}{stage}{kernels}".lower() for held in (False, True)]
    plain, rounded = (metrics(lab, run) for run in runs)
    assert rounded == pytest.approx(plain, rel=1e-3) and rounded != plain
    orders = {written(lab, run, "run.json")["data_order"] for run in runs}
    assert len(orders) == 1  # the gate's batch was looked at, not consumed
    if stage == 2:
        assert written(lab, runs[1], "drill/drill.json")["ok"]


def test_the_gate_and_the_halved_bytes_stand_in_effects(lab: Path) -> None:
    effects = written(lab, "f8true0false", "effects.json")
    (receipt,) = [r for r in effects["receipts"] if r["option"] == "model.fp8"]
    assert receipt["evidence"] == {"linears": 14, "products_forward": 28}  # one pack, two steps
    held = effects["fp8"]
    rows = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)  # of q, k, v, o, gate, up and down
    assert held["bytes"] == held["bytes_in_bf16"] // 2 + 4 * rows
    assert held["gap"] < 1e-4 and held["gap_allowed"] == 0.01
    assert abs(held["loss_in_fp8"] / held["loss"] - 1) == pytest.approx(held["gap"])


def test_adapters_are_saved_as_without_fp8(lab: Path) -> None:
    plain, rounded = (
        load_file(lab / f"runs/f8{held}2true/weights/adapter_model.safetensors")
        for held in ("false", "true")
    )
    assert {k: (t.shape, t.dtype) for k, t in plain.items()} == {
        k: (t.shape, t.dtype) for k, t in rounded.items()
    }


@pytest.mark.parametrize("stage", [0, 2])
def test_full_weights_train_in_fp8_as_in_bf16(lab: Path, two: Gang, stage: int) -> None:
    runs = [f"f8full{fp8}{stage}".lower() for fp8 in (False, True)]
    for run, fp8 in zip(runs, (False, True), strict=True):
        two.fit(small_config(lab, run, method__kind="full", zero__stage=stage, model__fp8=fp8,
                             **HALF))  # fmt: skip
    plain, rounded = (metrics(lab, run) for run in runs)
    assert rounded == pytest.approx(plain, rel=5e-3) and rounded != plain
    assert rounded[-1] < rounded[0] - 0.1
    (receipt,) = [r for r in written(lab, runs[1], "effects.json")["receipts"]
                  if r["option"] == "model.fp8"]  # fmt: skip
    assert receipt["evidence"]["linears"] == 14 and receipt["evidence"]["products_forward"] > 28
    held = written(lab, runs[1], "effects.json")["fp8"]
    assert held["bytes"] == held["bytes_in_bf16"] and held["gap"] < 1e-3
    saved = [load_file(lab / f"runs/{run}/weights/model.safetensors") for run in runs]
    assert {k: (t.shape, t.dtype) for k, t in saved[0].items()} == {
        k: (t.shape, t.dtype) for k, t in saved[1].items()
    }


def test_recomputed_layers_and_modules_trained_whole_go_with_fp8(lab: Path, one: Gang) -> None:
    settings = {"model__checkpointing": "on", "method__extra_modules": ["down_proj"]}
    targets = ["q_proj", "v_proj"]
    one.fit(small_config(lab, "f8extra", model__fp8=True, method__targets=targets, **HALF,
                         **settings))  # fmt: skip
    assert metrics(lab, "f8extra")[-1] < metrics(lab, "f8extra")[0]
    assert written(lab, "f8extra", "effects.json")["fp8"]["linears"] == 12


def test_a_base_whose_loss_fp8_moves_is_refused_with_both_losses(
    tmp_path: Path, lab: Path, one: Gang
) -> None:
    """One channel of the norms outgrows all others a million times, and no weight looks at it: in
    bf16 nothing changes, in FP8 it takes the whole range of every token.
    """
    base = tiny_model(tmp_path / "base", tied=False)
    weights = load_file(base / "model.safetensors")
    for name, tensor in weights.items():
        if "layernorm" in name:
            tensor[0] = 1e6
        if any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            tensor[:, 0] = 0.0
        tensor *= 1.0 if "norm" in name or "embed" in name else 20.0  # layers matter to the loss
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    (tmp_path / "rows.jsonl").write_bytes((lab / "rows.jsonl").read_bytes())
    with pytest.raises(RefusedError, match=r"^model\.fp8: the first batch's loss is \d") as caught:
        one.fit(small_config(tmp_path, "moved", model__fp8=True, **HALF))
    assert "apart where 1% is allowed; set model.fp8=false" in str(caught.value)
    assert not (tmp_path / "runs" / "moved" / "effects.json").exists()


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"method__kind": "qlora"}, "model.fp8, method.kind"),
        ({"method__dora": True}, "model.fp8, method.kind"),
        ({"zero__stage": 3}, "model.fp8, zero.stage"),
        ({"model__dtype": "fp32"}, "model.fp8, model.dtype"),
    ],
)
def test_what_fp8_cannot_hold_is_refused_by_name(
    lab: Path, settings: dict[str, object], keys: str
) -> None:
    config = small_config(lab, "no", **({"model__fp8": True} | HALF | settings))
    with pytest.raises(ConfigError, match=keys):
        build(TrainConfig, config)


def test_a_model_whose_sides_16_does_not_divide_is_refused_by_name(
    tmp_path: Path, lab: Path, one: Gang
) -> None:
    tiny_model(tmp_path / "base", hidden=40)
    (tmp_path / "rows.jsonl").write_bytes((lab / "rows.jsonl").read_bytes())
    with pytest.raises(ConfigError, match=r"q_proj is \(40, 40\): 16 divides not both"):
        one.fit(small_config(tmp_path, "odd", model__fp8=True, **HALF))


def test_a_gpu_without_fp8_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from tuneloom.train.fp8 import refuse_device

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(RefusedError, match=r"NVIDIA A100 has no FP8 products"):
        refuse_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    refuse_device(torch.device("cuda"))
