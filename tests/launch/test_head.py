"""Ray's head dies under a run: the ranks save, the launcher ends with 75 and says what to do."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launch.test_ports import family, hosts, training
from tests.launch.test_ray import arguments
from tuneloom.launch.hosts import ADDRESSES, PORT, Hosts

__all__ = ["hosts"]


def _store(pids: list[int]) -> int:
    """Ray's control store among these processes."""
    (store,) = [
        pid
        for pid in pids
        if b"gcs_server" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
    ]
    return store


def test_a_dead_head_ends_the_run_with_75_after_its_ranks_have_saved(lab: Path) -> None:
    with training(lab, "beheaded") as driver:
        os.kill(_store(family(driver.pid)), signal.SIGKILL)
        code = driver.wait(120)
    said = (lab / "beheaded.log").read_text(encoding="utf-8", errors="replace")
    assert code == 75, said[-3000:]
    assert "answers no more; all ranks saved and stopped" in said
    facts = json.loads((lab / "runs/beheaded/run.json").read_text(encoding="utf-8"))
    rows = (lab / "runs/beheaded/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [row["step"] for row in map(json.loads, rows) if "train/loss" in row]
    saved = sorted((lab / "runs/beheaded/checkpoints").glob("step-*"))[-1].name
    assert (facts["state"], saved) == ("stopped", f"step-{steps[-1]:06d}")


def on_hosts(hosts: Hosts, lab: Path, log: Path, words: list[str]) -> subprocess.Popen[bytes]:
    """`tuneloom train` on host `a`, on the cluster of both."""
    environment = hosts.environment | {"RAY_ADDRESS": f"{ADDRESSES['a']}:{PORT}"}
    with log.open("wb") as into:
        return subprocess.Popen(
            [*hosts.inside("a"), sys.executable, "-m", "tuneloom", "train", *words],
            env=environment, stdout=into, stderr=into, cwd=lab,
        )  # fmt: skip


def copies(hosts: Hosts, host: str) -> list[str]:
    """What runs keep in that host's memory, seen through its raylet."""
    raylet = next(
        pid for pid in hosts.pids(host)
        if b"raylet" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
    )  # fmt: skip
    return [p.name for p in Path(f"/proc/{raylet}/root/dev/shm").glob("tuneloom-*")]


@contextmanager
def copying(hosts: Hosts, lab: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A run on both hosts that has copies in the memory of each."""
    words = arguments(lab, name, "launch.kind=ray", "launch.nodes=2", "launch.workers=2",
                      "launch.max_restarts=0", "checkpoint.memory_every=1", "steps=10000",
                      "epochs=100000")  # fmt: skip
    log, rows = lab / f"{name}.log", lab / f"runs/{name}/metrics.jsonl"
    driver = on_hosts(hosts, lab, log, words)
    try:
        deadline = time.monotonic() + 120
        while not rows.exists() or rows.read_text().count("\n") < 4:
            assert driver.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        assert copies(hosts, "a") and copies(hosts, "b")
        yield driver
    finally:
        driver.kill()


@pytest.mark.slurm
def test_copies_on_another_host_go_with_a_run_that_has_no_restart_left(
    lab: Path, hosts: Hosts
) -> None:
    with copying(hosts, lab, "crossed") as driver:
        for pid in hosts.pids("b"):
            if b"Worker.run" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        assert driver.wait(60) == 5, (lab / "crossed.log").read_text()
    assert copies(hosts, "a") == copies(hosts, "b") == []


@pytest.mark.slurm
def test_copies_on_all_hosts_go_with_a_driver_that_is_killed(lab: Path, hosts: Hosts) -> None:
    with copying(hosts, lab, "driverless") as driver:
        driver.kill()
        struck = time.monotonic()
        while copies(hosts, "a") + copies(hosts, "b"):
            assert time.monotonic() < struck + 20, (lab / "driverless.log").read_text()
            time.sleep(0.1)
    time.sleep(2.0)
    assert copies(hosts, "a") == copies(hosts, "b") == []


@pytest.mark.slurm
def test_a_head_that_dies_while_ranks_wait_for_room_ends_the_command_with_75(
    lab: Path, hosts: Hosts
) -> None:
    """Two slots for three ranks; Ray's client alone would wait a minute and end with 1."""
    words = arguments(lab, "roomless", "launch.kind=ray", "launch.nodes=1", "launch.workers=3",
                      "launch.wait_seconds=200")  # fmt: skip
    log = lab / "roomless.log"
    driver = on_hosts(hosts, lab, log, words)
    try:
        deadline = time.monotonic() + 120
        while b"for room for 3 workers" not in log.read_bytes():
            assert driver.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        os.kill(_store(hosts.pids("a")), signal.SIGKILL)
        code = driver.wait(45)
    finally:
        driver.kill()
    assert code == 75, log.read_text()
    assert "answers no more; no rank has started yet" in log.read_text()
