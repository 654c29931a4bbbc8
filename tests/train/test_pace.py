"""A slow rank is named once it was slow for twenty steps; a slow step is nobody's fault."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tuneloom.testing import free_port, metrics, small_config
from tuneloom.train.distributed import World
from tuneloom.train.pace import WINDOW, Pace

FIRST = World(0, 4, 0, torch.device("cpu"))


def test_a_rank_that_is_slow_for_twenty_steps_is_named_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pace = Pace(FIRST, ["a", "b", "c", "d"])
    for step in range(3 * WINDOW):
        pace.note([1.0, 1.0, 1.6, 1.1])
        assert ("straggler" in capsys.readouterr().out) == (step == WINDOW - 1)
    assert pace.slowest == pytest.approx(1.6)


def test_a_few_slow_steps_name_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    pace = Pace(FIRST, ["a", "b", "c", "d"])
    for step in range(3 * WINDOW):
        pace.note([1.0, 5.0 if step % WINDOW < 2 else 1.0, 1.0, 1.0])
    assert capsys.readouterr().out == ""


# Rank 1 takes 200 ms more for every forward pass of this tiny model, which takes about 10.
TRAIN = """
import json, os, sys, time
from tuneloom.config import build
from tuneloom.train import loop
from tuneloom.train.config import TrainConfig
real = loop.loss_sum
def slow(engine, micro):
    if os.environ["RANK"] == "1":
        time.sleep(0.2)
    return real(engine, micro)
loop.loss_sum = slow
loop.fit(build(TrainConfig, json.loads(sys.argv[1])))
"""


def said_by_two(config: dict[str, object]) -> list[str]:
    environment = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, json.dumps(config)], stdout=subprocess.PIPE, text=True,
            env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)},
        )
        for r in range(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    return said


@pytest.mark.parametrize(
    "settings",
    [{"zero__stage": 2}, {"zero__stage": 3}, {"zero__stage": 2, "batch__sequence_parallel": 2}],
)
def test_a_slow_rank_of_a_real_run_stands_in_its_log_and_its_metrics(
    lab: Path, settings: dict[str, object]
) -> None:
    """Also where the other rank's forward pass takes as long, as it waits in it."""
    run_id = "uneven-" + "-".join(map(str, settings.values()))
    said = said_by_two(small_config(lab, run_id, steps=WINDOW + 4, **settings))
    assert said[0].count("straggler: rank 1 on ") == 1 and "straggler" not in said[1]
    ratios = metrics(lab, run_id, "speed/slowest_rank")
    assert len(ratios) == 4 and min(ratios) >= 1.5
