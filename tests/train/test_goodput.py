"""Every second of a run is booked once, in whichever attempt it passed."""

import json
from pathlib import Path

import pytest

from tuneloom.errors import TrainingError
from tuneloom.testing import Gang, small_config
from tuneloom.train.config import TrackerConfig
from tuneloom.train.metrics import PHASES, Clock, Metrics
from tuneloom.train.tracker import Tracker


def opened(folder: Path, step: int, clock: Clock) -> float:
    """Seconds lost, after rows of steps 1 to 3, the last at 1000 s, and half a row of step 4."""
    rows = [
        {"step": s, "time/productive": 2.0, "time/startup": 0.5, "at": 997.0 + s} for s in (1, 2, 3)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "ti'
    (folder / "metrics.jsonl").write_text(text)
    tracker = Tracker(TrackerConfig(mode="off"), folder, "run", {})
    return clock.carry_on(Metrics(folder, tracker).open_at(step))


def test_a_restart_loses_dropped_rows_and_the_time_until_it_began(tmp_path: Path) -> None:
    clock = Clock(started=1007.0, command=900.0)
    assert opened(tmp_path, 1, clock) == pytest.approx(2 * 2.5 + 7.0)
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in kept] == [1]
    assert dict(clock.total) == {
        **dict.fromkeys(PHASES, 0.0), "productive": 2.0, "startup": 0.5, "lost": 12.0
    }  # fmt: skip


def test_time_between_two_starts_of_the_command_is_not_the_runs(tmp_path: Path) -> None:
    assert opened(tmp_path, 3, Clock(started=5000.0, command=5000.0)) == 0.0


def test_an_attempt_that_was_lost_before_its_first_row_is_lost_whole(tmp_path: Path) -> None:
    assert opened(tmp_path, 3, Clock(started=5030.0, command=5000.0)) == pytest.approx(30.0)


def test_a_finished_runs_ledger_is_its_wall_time_and_is_said(lab: Path, one: Gang) -> None:
    one.fit(small_config(lab, "booked", steps=4, checkpoint__every=2))
    folder = lab / "runs/booked"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    facts = json.loads((folder / "run.json").read_text())
    booked = sum(row.get(f"time/{phase}", 0.0) for row in rows for phase in PHASES)
    wall = rows[-1]["at"] - facts["attempts"][0]["clock"]["command"]
    assert booked == pytest.approx(wall, abs=1e-6 * len(PHASES) * len(rows))
    assert facts["seconds"] == pytest.approx(wall, abs=1e-5)
    assert sum(facts["time"].values()) == pytest.approx(1.0)
    # The weights were written after the last step, and belong to the run as well.
    assert "train/loss" not in rows[-1] and rows[-1]["time/checkpoint"] > 0


def test_a_row_that_a_full_disk_does_not_take_ends_the_run_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    tracker = Tracker(TrackerConfig(mode="off"), tmp_path, "run", {})
    with pytest.raises(TrainingError, match="step 7 could not be written"):
        Metrics(tmp_path, tracker).write({"step": 7})
