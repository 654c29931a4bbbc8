"""A hang is found in time and by name: a stopped rank, a stall in data or save, crossed calls."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tuneloom.errors import TRAINING
from tuneloom.testing import free_port, metrics, small_config
from tuneloom.train.watchdog import Standing, judge

SECONDS = 4
STEP = 3

# Rank 1 does what `sys.argv[2]` says in step 3 (the save: of step 3).
TRAIN = """
import json, os, signal, sys, time
from tuneloom.config import build
from tuneloom.train import checkpoint, distributed
from tuneloom.train.config import TrainConfig
from tuneloom.train.feed import Feed
from tuneloom.train.loop import fit
from tuneloom.train.session import Session
fault, rank = sys.argv[2], os.environ["RANK"]
def at_step(owner, name, do):
    real = getattr(owner, name)
    def faulty(self, *arguments, **named):
        if rank == "1" and getattr(self, "step", None) in (None, 2):
            do(self)
        return real(self, *arguments, **named)
    setattr(owner, name, faulty)
def sleep_in_data(session):
    real = session.feed.next_step
    def stalled():
        time.sleep(1000)
    session.feed.next_step = stalled
def sleep_in_save(*arguments):
    if rank == "1":
        time.sleep(1000)
if fault == "stopped":
    at_step(Session, "agree", lambda s: os.kill(os.getpid(), signal.SIGSTOP))
if fault == "data":
    at_step(Session, "progress", sleep_in_data)
if fault == "save":
    checkpoint._hash_share = sleep_in_save
if fault == "crossed":
    at_step(Session, "agree", lambda s: distributed.broadcast_object(None))
fit(build(TrainConfig, json.loads(sys.argv[1])))
"""


def strike(lab: Path, fault: str) -> tuple[dict[str, Any], float, str]:
    """Report, seconds from the last step to the exit of rank 0, and what rank 0 printed."""
    run_id = f"hang-{fault}"
    settings = {"train__hang_seconds": SECONDS, "checkpoint__every": STEP, "train__probe": False}
    config = small_config(lab, run_id, steps=20, **settings)
    environment = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, json.dumps(config), fault],
            env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE, text=True,
        )
        for r in range(2)
    ]  # fmt: skip
    said = ranks[0].communicate(timeout=120)[0]
    ended = time.time()
    assert ranks[0].returncode == TRAINING
    if fault == "stopped":
        ranks[1].send_signal(signal.SIGKILL)
    ranks[1].communicate(timeout=30)
    folder = lab / "runs" / run_id
    last = (folder / "metrics.jsonl").stat().st_mtime
    assert metrics(lab, run_id)
    assert "Thread" in (folder / "hang/rank-00000.txt").read_text()
    return json.loads((folder / "hang/report.json").read_text()), ended - last, said


@pytest.mark.parametrize(
    ("fault", "kind", "at_fault", "where"),
    [
        ("stopped", "missing rank", [1], "does not answer"),
        ("data", "data stall", [1], "train/loop.py"),
        pytest.param("save", "save stall", [1], "train/checkpoint.py", marks=pytest.mark.slow),
        pytest.param(
            "crossed",
            "mismatched collective",
            [0, 1],
            "broadcast_object_list",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_hang_names_the_rank_its_kind_and_where_it_stands(
    lab: Path, fault: str, kind: str, at_fault: list[int], where: str
) -> None:
    report, seconds, said = strike(lab, fault)
    assert (report["kind"], report["ranks"]) == (kind, at_fault)
    assert where in report["sentence"] and f"hang: {report['sentence']}" in said
    assert seconds < SECONDS + 5


def test_ranks_in_different_collectives_are_a_mismatch_and_a_computing_one_a_stall() -> None:
    def standing(rank: int, phase: str, collective: str | None) -> Standing:
        return Standing(rank, f"host{rank}", phase, f"train/x.py:{rank}", collective)

    both = [standing(0, "productive", "all_reduce"), standing(1, "productive", "broadcast")]
    crossed = judge(both, ["host0", "host1"], 5)
    assert (crossed.kind, crossed.ranks) == ("mismatched collective", [0, 1])
    alike = [
        Standing(rank, f"host{rank}", "collective", "train/loop.py:92", "all_reduce")
        for rank in (0, 1)
    ]
    cut = judge(alike, ["host0", "host1"], 5)
    assert (cut.kind, cut.ranks) == ("no connection", [0, 1])
    saving = [standing(0, "checkpoint", "all_gather_object"), standing(1, "checkpoint", None)]
    stalled = judge(saving, ["host0", "host1"], 5)
    assert (stalled.kind, stalled.ranks) == ("save stall", [1])
    assert "rank 1 on host1 stands at train/x.py:1" in stalled.sentence
    gone = judge(both, ["host0", "host1", "host2"], 5)
    assert (gone.kind, gone.ranks) == ("missing rank", [2]) and "host2" in gone.sentence
