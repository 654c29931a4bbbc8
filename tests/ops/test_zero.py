"""A patched model under DeepSpeed: the same losses in every ZeRO stage, no diet in stage 3."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def stages() -> dict[str, Any]:
    """Of a process of its own: DeepSpeed keeps global state."""
    script = Path(__file__).with_name("zero_steps.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_losses_are_those_of_the_plain_model(stages: dict[str, Any], stage: str) -> None:
    found = stages[stage]
    assert found["patched"] == pytest.approx(found["plain"], rel=1e-5)
    assert found["plain"][2] < 0.99 * found["plain"][0]


@pytest.mark.parametrize("stage", ["0", "1", "2"])
def test_augmented_products_see_what_the_optimizer_wrote(
    stages: dict[str, Any], stage: str
) -> None:
    found = stages[stage]
    assert found["augmented"] == pytest.approx(found["plain"], rel=1e-5)
    assert found["augmented_products"] == 24  # 4 groups, 2 layers, 3 steps


@pytest.mark.parametrize("stage", ["0", "1", "2"])
def test_the_diet_runs_where_weights_are_whole(stages: dict[str, Any], stage: str) -> None:
    assert stages[stage]["calls"]["activation_diet"] == 6  # 2 layers, 3 steps
    assert stages[stage]["calls"]["linear_cross_entropy"] == 3


def test_zero_3_keeps_the_single_ops_and_names_why_the_diet_is_off(stages: dict[str, Any]) -> None:
    calls = stages["3"]["calls"]
    assert calls["not on the diet: weights sharded by ZeRO-3"] == 6
    assert "activation_diet" not in calls
    assert calls["gated"] == calls["rope"] == 6 and calls["linear_cross_entropy"] == 3
