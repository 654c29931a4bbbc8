"""Every second of a run is booked once, in whichever attempt it passed."""

import json
import os
from pathlib import Path

import pytest

from tuneloom.train.config import TrackerConfig
from tuneloom.train.metrics import Metrics
from tuneloom.train.tracker import Tracker


def metrics(folder: Path) -> Metrics:
    tracker = Tracker(TrackerConfig(mode="off"), folder, "run", {})
    return Metrics(folder, tracker)


def test_a_restart_loses_dropped_rows_and_the_time_until_it_began(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "time/productive": 2.0, "time/startup": 0.5} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "ti')
    os.utime(path, (1000.0, 1000.0))
    assert metrics(tmp_path).open_at(1, restarted=1007.0) == pytest.approx(2 * 2.5 + 7.0)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]


def test_time_between_two_starts_of_the_command_is_not_the_runs(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "time/productive": 2.0}) + "\n")
    os.utime(path, (1000.0, 1000.0))
    assert metrics(tmp_path).open_at(1) == 0.0
