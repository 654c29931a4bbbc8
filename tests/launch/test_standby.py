"""When a second gang is started beside the first, and when it is not; who takes whose place is
tested with real Ray in test_launchers.py.
"""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tuneloom.config import ConfigError, build, compose
from tuneloom.launch import machine, standby, worker
from tuneloom.launch.config import JobConfig, LaunchConfig
from tuneloom.launch.standby import ROOM, Gang, Standby
from tuneloom.launch.worker import Worker

PLACES = [{"node": node, "devices": {}} for node in ("a", "a", "b")]


class Gangs:
    """Stands in for Ray: notes what is started, and answers `import_all` at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: str | None) -> None:
        self.rooms: list[int] = []
        self.killed = 0
        import ray

        def start(gang: Gang, environments: list[dict[str, str]], *, cpus: int, gpus: int) -> None:
            assert (len(environments), cpus, gpus) == (len(PLACES), 0, 0)
            told = SimpleNamespace(remote=lambda room: self.rooms.append(room) or answer)
            gang.actors = [SimpleNamespace(import_all=told) for _ in PLACES]

        def end(gang: Gang) -> None:
            self.killed += len(gang.actors)
            gang.actors = []

        monkeypatch.setattr(Gang, "start", start)
        monkeypatch.setattr(Gang, "end", end)
        monkeypatch.setattr(ray, "wait", lambda refs, **_: (refs[:1], refs[1:]))
        monkeypatch.setattr(ray, "get", lambda refs, **_: refs)


def followed(after: float, metrics: Path) -> Standby:
    waiting = Standby(after)
    size = LaunchConfig(kind="ray", workers=3)
    waiting.follow(Gang(object(), size), PLACES, metrics)
    return waiting


def test_it_starts_so_many_seconds_after_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gangs, metrics = Gangs(monkeypatch, None), tmp_path / "metrics.jsonl"
    waiting = followed(60.0, metrics)
    now = time.monotonic()
    monkeypatch.setattr(standby.time, "monotonic", lambda: now)
    waiting.look()
    assert not gangs.rooms  # no step yet, however late it is
    metrics.write_text("{}\n")
    for later, started in ((0, 0), (59, 0), (60, 3)):
        monkeypatch.setattr(standby.time, "monotonic", lambda at=now + later: at)
        waiting.look()
        assert len(gangs.rooms) == started
    assert gangs.rooms == [2 * ROOM] * 3  # two ranks share a host
    for _ in PLACES:
        waiting.look()
    assert capsys.readouterr().out == "launch.standby: 3 workers wait beside the run\n"
    assert gangs.killed == 0


def test_where_a_host_has_no_room_none_waits_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gangs, metrics = Gangs(monkeypatch, "a has 1.0 GiB to spare, 4 are wanted"), tmp_path / "m"
    waiting = followed(0.0, metrics)
    metrics.write_text("{}\n")
    for _ in range(5):
        waiting.look()
        time.sleep(0.01)
        metrics.touch()
    assert (len(gangs.rooms), gangs.killed) == (3, 3)
    said = "launch.standby: a has 1.0 GiB to spare, 4 are wanted; none waits, a restart starts anew"
    assert capsys.readouterr().out == said + "\n"


def test_a_worker_imports_nothing_where_its_host_has_no_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    imported: list[int] = []
    monkeypatch.setattr(machine, "host_bytes", lambda: 3 * 2**30)
    monkeypatch.setattr(worker, "_import_all", lambda: imported.append(1))
    monkeypatch.setattr(worker.os, "nice", lambda by: by)
    refused = Worker({}).import_all(4 * 2**30)
    assert refused is not None and refused.endswith("has 3.0 GiB to spare, 4 are wanted")
    assert imported == [] and Worker({}).import_all(2 * 2**30) is None and imported == [1]


@pytest.mark.parametrize(
    ("typed", "seconds"), [("", 60.0), ("true", 0.0), ("false", None), ("null", None), ("5", 5.0)]
)
def test_standby_is_read_as_seconds_or_as_yes_and_no(typed: str, seconds: float | None) -> None:
    keys = ["launch=local", *([f"launch.standby={typed}"] if typed else [])]
    assert job(keys).launch.standby == seconds


def test_inline_restarts_nothing_so_nothing_waits_there() -> None:
    assert job(["launch=inline"]).launch.standby is None
    with pytest.raises(ConfigError, match="launch=inline restarts nothing"):
        job(["launch=inline", "launch.standby=true"])


def job(keys: list[str]) -> JobConfig:
    mapping = compose("train", ["model.path=x", "data.path=y", *keys])
    return build(JobConfig, mapping)


def test_memory_left_is_that_of_the_tightest_control_group(tmp_path: Path) -> None:
    group = tmp_path / "fs" / "job" / "step"
    group.mkdir(parents=True)
    (tmp_path / "own").write_text("1:name=systemd:/x\n0::/job/step\n")
    for folder, limit, used, cache in (
        (group, "max", 10, 0), (group.parent, str(2**30), 2**29, 2**20)
    ):  # fmt: skip
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text(str(used))
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")
    own, root = tmp_path / "own", tmp_path / "fs"
    assert machine.host_bytes(own, root) == 2**29 + 2**20
    old = root / "memory" / "slurm"
    old.mkdir(parents=True)
    (tmp_path / "own").write_text("4:memory:/slurm\n")
    (old / "memory.limit_in_bytes").write_text(str(2**30))
    (old / "memory.usage_in_bytes").write_text(str(2**30 + 5))
    assert machine.host_bytes(own, root) == 0
