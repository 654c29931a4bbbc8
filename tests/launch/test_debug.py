"""debug=true: 20 steps, then a verdict; a NaN is named."""

import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tuneloom.errors import TrainingError
from tuneloom.testing import Gang, metrics, small_config
from tuneloom.train.debug import verdict
from tuneloom.train.session import Session


def test_a_sound_run_takes_20_steps_and_is_safe_to_scale(lab: Path, one: Gang) -> None:
    one.fit(small_config(lab, "sound", steps=500, debug=True))
    assert len(metrics(lab, "sound")) == 20
    assert verdict(lab / "runs/sound").startswith("safe to scale: 20 steps")


def test_the_same_run_without_debug_goes_on_and_a_later_step_is_debugged_too(
    lab: Path, one: Gang
) -> None:
    settings = small_config(lab, "scaled", steps=24, checkpoint__every=22, checkpoint__keep=9)
    one.fit(settings | {"debug": True})
    assert len(metrics(lab, "scaled")) == 20
    one.fit(settings)
    assert metrics(lab, "scaled", "step") == list(range(1, 25))
    named = str(lab / "runs/scaled/checkpoints/step-000022")
    fork = small_config(lab, "debugged-fork", steps=100, debug=True, resume=named)
    one.fit(fork)
    assert metrics(lab, "debugged-fork", "step") == list(range(23, 43))


def test_a_debugger_stops_inside_a_step(lab: Path) -> None:
    code, first = inspect.getsourcelines(Session.agree)
    stop = first + next(n for n, line in enumerate(code) if "assert self.stop" in line)
    words = [f"run.root={lab}/runs", "run.id=pdb", f"model.path={lab}/base",
             f"data.path={lab}/rows.jsonl", "data.validation=null", "tracker=off", "debug=true",
             "launch=inline"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "pdb", "-c", f"b {inspect.getfile(Session)}:{stop}", "-c", "c",
         "-c", "p ('stands in', type(self).__name__, self.step)", "-c", "q",
         "-m", "tuneloom", "train", *words],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120, check=False,
    )  # fmt: skip
    assert "('stands in', 'Session', 0)" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


def test_a_nan_in_the_base_is_named_by_its_operation(lab: Path, one: Gang, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(lab / "base", tmp_path / "base")
    path = tmp_path / "base/model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.inf
    save_file(weights, path, metadata={"format": "pt"})
    config = small_config(lab, "nan", debug=True, train__probe=False)
    config["model"] = {"path": str(tmp_path / "base"), "dtype": "fp32"}
    with pytest.raises(TrainingError, match=r"debug: Function '\w+Backward\d' returned nan values"):
        one.fit(config)


def test_a_run_whose_loss_rises_is_not_safe_to_scale(lab: Path, one: Gang) -> None:
    with pytest.raises(TrainingError, match="not safe to scale: loss went from"):
        one.fit(small_config(
            lab, "rising", debug=True, steps=20, optim__lr=30.0, optim__clip=0.0,
        ))  # fmt: skip
