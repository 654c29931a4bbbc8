"""The drills strike real runs; a gang whose worker died is restarted, whoever is heard first."""

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tuneloom.errors import TrainingError
from tuneloom.launch import drill, soak
from tuneloom.launch.config import LaunchConfig
from tuneloom.launch.drill_lab import Figures
from tuneloom.launch.embedded import keep_private
from tuneloom.launch.supervise import connect, wait


def test_a_fault_without_a_drill_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert drill.main(["F99", "--out", str(tmp_path / "faults.md")]) == 2
    assert "no drill for F99; there are F1" in capsys.readouterr().err
    assert not (tmp_path / "faults.md").exists()


def test_every_fault_of_the_matrix_has_a_drill() -> None:
    assert "drill F22" in str(soak.__doc__)
    drilled = {name.split("x")[0] for name in drill.FAULTS} | {"F22"}
    assert drilled == {f"F{number}" for number in range(1, 23)}


@pytest.mark.parametrize(("fault", "bar"), [("F1", 45), ("F3", 60), ("F5", 30), ("F21", 45)])
def test_a_fault_that_took_longer_than_its_bar_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, bar: int
) -> None:
    """F21 took 49.9 s of 45 and was said to have held."""
    table = tmp_path / "faults.md"
    for seconds, code, said in [(bar + 0.1, 5, "**missed**"), (bar - 0.1, 0, "held")]:
        figure = Figures(fault, "struck", "0", 0, seconds, 0, 0, 0, True)
        monkeypatch.setitem(drill.FAULTS, fault, lambda lab, rng, figure=figure: [figure])
        assert drill.main([fault, "--out", str(table)]) == code
        assert f"| {seconds:.1f} | 0 | 0 | 0 | {said} |" in table.read_text()
    assert f"{fault} {bar}" in table.read_text().split("seconds: ")[1]


def test_a_seed_and_a_kind_have_a_row_each_which_names_a_machine_that_is_not_that_of_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of soaks only the last one stayed, and the table bore the machine of the last row."""
    table = tmp_path / "faults.md"
    figure = Figures("F22", "soak of 20.0 min, 9 steps: 3 faults", "0", 0, 1.0, 0, 0, 0, True)
    for minutes, seed, machine in [(20, 1, "ours"), (20, 2, "ours"), (5, 3, "theirs"),
                                   (34, 2, "ours")]:  # fmt: skip
        monkeypatch.setattr(drill, "this_machine", lambda machine=machine: machine)
        what = f"soak of {minutes} min, {minutes * 7} steps: {minutes} faults"
        drill.book(table, replace(figure, what=what), seed)
    text = table.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| F22")]
    assert [row.split("|")[2].strip() for row in rows] == [
        "soak of 20 min, 140 steps: 20 faults", "soak of 34 min, 238 steps: 34 faults",
        "soak of 5 min, 35 steps: 5 faults (on theirs)",
    ]  # fmt: skip
    assert "on ours\nwhere a row names no other" in text


def test_the_table_of_the_repository_is_that_of_its_rows() -> None:
    kept = json.loads(drill.REPORT.with_suffix(".json").read_text(encoding="utf-8"))
    assert drill.table(kept) == drill.REPORT.read_text(encoding="utf-8")


STRUCK = {"F1": 9, "F2": 10, "F3": 9, "F4": 9}
"""Drills of a run that is killed, and the steps that each may cost; with copies in memory, one."""


@pytest.mark.parametrize(
    "faults", [("F1", "F4"), pytest.param(("F2", "F3"), marks=pytest.mark.slow)]
)
def test_drills_of_killed_runs_hold_their_bars_and_write_the_table(
    tmp_path: Path, faults: tuple[str, ...]
) -> None:
    """Whole: bits and samples against an uninterrupted run, steps lost, seconds, orphans."""
    table = tmp_path / "faults.md"
    assert drill.main([*faults, "--seed", "3", "--out", str(table)]) == 0
    rows = [line.split("|")[1:-1] for line in table.read_text().splitlines() if line[:3] == "| F"]
    struck = [[cell.strip() for cell in row] for row in rows]
    assert {row[0] for row in struck} == set(faults)
    for row in struck:
        assert 0 <= int(row[3]) <= (1 if "copies" in row[1] else STRUCK[row[0]])
        assert row[5:10] == ["0", "0", "0", "held", "3"]


class Rank:
    """A worker that fails as the peer of a dead rank does, or waits."""

    def pid(self) -> int:
        return os.getpid()

    def fail(self) -> None:
        raise RuntimeError("Connection closed by peer")

    def idle(self) -> None:
        time.sleep(60)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Any]:
    before = dict(os.environ)
    keep_private()
    import ray

    connect(LaunchConfig(kind="local", workers=2))
    yield lambda: [ray.remote(Rank).options(num_cpus=0).remote() for _ in range(2)]
    ray.shutdown()
    os.environ.clear()  # or children of later tests would find a token that is not theirs
    os.environ.update(before)


def test_a_dead_worker_is_seen_behind_the_crash_of_its_peer(ranks: Any) -> None:
    """The peer's error arrived first and ended the run without a restart."""
    import ray
    from ray.exceptions import RayActorError

    peer, victim = ranks()
    pid = ray.get(victim.pid.remote())
    calls = [peer.fail.remote(), victim.idle.remote()]
    ray.wait(calls, num_returns=1)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RayActorError):
        wait(calls)


def test_a_crash_of_every_rank_is_said_and_not_restarted(ranks: Any) -> None:
    with pytest.raises(TrainingError, match="a rank failed: Connection closed by peer"):
        wait([rank.fail.remote() for rank in ranks()])
