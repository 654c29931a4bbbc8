"""fp16 with loss scaling, on a CPU that DeepSpeed says cannot: the arithmetic is the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tuneloom.testing import Gang, free_port, metrics, small_config

# DeepSpeed asks for AVX512-FP16 before it lets a CPU train in fp16; torch computes it anyway.
TRAIN = """
import json, sys
from deepspeed.accelerator import get_accelerator
get_accelerator().is_fp16_supported = lambda: True
from tuneloom.config import build
from tuneloom.errors import TuneloomError
from tuneloom.train import zero
from tuneloom.train.config import TrainConfig
from tuneloom.train.loop import fit
real, power = zero.deepspeed_config, int(sys.argv[2])
def scaled(*arguments, **named):
    settings = real(*arguments, **named)
    settings.get("fp16", {})["initial_scale_power"] = power
    return settings
zero.deepspeed_config = scaled
try:
    for config in json.loads(sys.argv[1]):
        fit(build(TrainConfig, config))
except TuneloomError as error:
    sys.stderr.write(f"said: {error}")
    sys.exit(error.exit_code)
"""


def train(*configs: dict[str, object], scale_power: int = 16) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", TRAIN, json.dumps(configs), str(scale_power)],
        env=environment, capture_output=True, text=True, timeout=180,
    )  # fmt: skip


@pytest.fixture(scope="module")
def halves(lab: Path) -> None:
    """Runs half-1, half-2 and half-3, one ZeRO stage each, in one process."""
    ran = train(*(config(lab, f"half-{n}", n) | {"model": half(lab)} for n in (1, 2, 3)))
    assert ran.returncode == 0, ran.stderr


def half(lab: Path) -> dict[str, object]:
    return {"path": str(lab / "base"), "dtype": "fp16"}


def config(lab: Path, run_id: str, stage: int) -> dict[str, object]:
    return small_config(lab, run_id, steps=8, zero__stage=stage, batch__accumulation=2)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_follows_fp32_within_its_precision(
    lab: Path, one: Gang, halves: None, stage: int
) -> None:
    run_id = f"half-{stage}"
    one.fit(config(lab, f"single-{stage}", stage))
    assert metrics(lab, run_id) == pytest.approx(metrics(lab, f"single-{stage}"), rel=1e-4)
    assert metrics(lab, run_id, "train/loss_scale") == [65536.0] * 8
    evidence = json.loads((lab / "runs" / run_id / "effects.json").read_text())["receipts"]
    held = next(r["evidence"] for r in evidence if r["option"] == "model.dtype=fp16")
    assert set(held["parameters"]) == {"float16"} and held["masters"] == ["float32"]


def test_a_run_in_fp32_that_goes_on_in_fp16_scales_its_loss(lab: Path) -> None:
    saved = lab / "runs/unscaled/checkpoints/step-000008"
    taker = config(lab, "scaled-anew", 1) | {"steps": 10, "resume": str(saved), "model": half(lab)}
    ran = train(config(lab, "unscaled", 1), taker)
    assert ran.returncode == 0, ran.stderr
    assert metrics(lab, "scaled-anew", "train/loss_scale") == [65536.0] * 2


def test_an_overflow_halves_the_scale_skips_the_step_and_is_counted_but_no_bad_step(
    lab: Path,
) -> None:
    seeking = small_config(
        lab, "seeking", steps=16, zero__stage=2, model__dtype="fp16", train__max_bad_steps=0
    )
    ran = train(seeking, scale_power=24)
    assert ran.returncode == 0, ran.stderr
    skipped = metrics(lab, "seeking", "train/skipped")
    scales = metrics(lab, "seeking", "train/loss_scale")
    assert 0 < sum(skipped) < 16 and skipped[-1] == 0
    assert scales[-1] < scales[0] <= 2.0**24
    losses = metrics(lab, "seeking")
    assert losses[-1] < losses[0]
