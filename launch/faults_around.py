"""Faults of what stands around a run: Ray's head, the cable, disks, memory; F16, F17, F20, F21."""

import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tuneloom.errors import CONFIGURATION, DONE, REFUSED, STOPPED, TRAINING
from tuneloom.launch.drill_lab import (
    EVERY,
    Figures,
    Lab,
    Run,
    command_of,
    figures,
    standing_in,
)
from tuneloom.launch.faults_inside import clock_set_back
from tuneloom.launch.hosts import Hosts

NOBODY = 65534
CUT_SECONDS = 45.0
LONG_STEPS = 3000
"""More than two ranks make in half a minute here."""


def head_killed(lab: Lab, rng: random.Random) -> Iterator[Figures]:
    """F16: Ray's control store dies; the ranks save and stop, and the command resumes. On a cluster
    `ray start --block` ends all of the head's host with its store, so nothing is left to save.

    A run of its own, long enough to go on when the store has been silent for long.
    """
    (lab.folder / "f16").mkdir()
    lab = Lab(lab.folder / "f16", steps=LONG_STEPS)
    what = "kill -9 of Ray's head process; seconds to the exit"
    yield _head_killed(lab, rng, what, STOPPED, Run(lab, "f16"),
                       lambda: standing_in(lab.folder), lambda: Run(lab, "f16"))  # fmt: skip
    with Hosts() as hosts:

        def command() -> Run:
            return Run(lab, "f16-ray", "launch.kind=ray", "launch.nodes=2",
                       prefix=hosts.inside("a"), environment=hosts.command)  # fmt: skip

        def again() -> Run:
            hosts.again()
            return command()

        what = (
            "kill -9 of the head of a cluster of two hosts, then a new cluster; seconds to the exit"
        )
        yield _head_killed(lab, rng, what, TRAINING, command(), lambda: hosts.pids("a"), again)


def _head_killed(
    lab: Lab, rng: random.Random, what: str, wanted: int, run: Run,
    pids: Callable[[], list[int]], restart: Callable[[], Run],
) -> Figures:  # fmt: skip
    """`pids` are those among which the store is; `restart` gives the same command again."""
    run.wait_for_step(rng.randrange(EVERY + 2, 2 * EVERY))
    store = [pid for pid in pids() if b"gcs_server" in command_of(pid).split(b"\0")[0]]
    os.kill(store[0], signal.SIGKILL)
    struck = time.monotonic()
    code = run.end()
    seconds, last, orphans = time.monotonic() - struck, run.step, lab.orphans()
    said = "tuneloom train: " in run.log.read_text(errors="replace")
    again = restart()
    end = again.end()
    lost = last - again.resumed_from()
    return figures(lab, again, "F16", what, [code, end], [wanted, DONE], lost=lost,
                   seconds=seconds, orphans=orphans, held=said)  # fmt: skip


def partitioned(lab: Lab, rng: random.Random) -> list[Figures]:
    """F17: the cable between two hosts is cut; a node joins anew once it is whole again."""
    with Hosts() as hosts:
        run = Run(lab, "f17", "launch.kind=ray", "launch.nodes=2", "train.hang_seconds=20",
                  prefix=hosts.inside("a"), environment=hosts.command)  # fmt: skip
        run.wait_for_step(rng.choice((EVERY, 2 * EVERY)) + rng.randrange(1, 4))
        inode = run.inode()
        watch = Writers(run.folder)
        hosts.cable("down")
        struck, last = time.monotonic(), run.step
        time.sleep(CUT_SECONDS)
        hosts.cable("up")
        hosts.kill("b")
        hosts.start("b")
        run.wait_for_new_step(inode)
        seconds = time.monotonic() - struck
        lost, code = max(last, watch.last) - run.resumed_from(), run.end()
        most = watch.close()
        left = hosts.orphans()
        what = (f"two hosts cut off from each other for {CUT_SECONDS:.0f} s; at most {most} "
                "process held the run folder")  # fmt: skip
        return [figures(lab, run, "F17", what, [code], [DONE], lost=lost, seconds=seconds,
                        orphans=left, held=most == 1)]  # fmt: skip


class Writers:
    """Counts, ten times a second, the processes that hold a run's lock file open."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most, self.last = folder, 0, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        lock = (self.folder / "lock").stat()
        place = f":{lock.st_ino} "
        while not self._over.wait(0.1):
            held = [line for line in Path("/proc/locks").read_text().splitlines() if place in line]
            self.most = max(self.most, sum("->" not in line for line in held))

    def close(self) -> int:
        self._over.set()
        self._thread.join()
        return self.most


def second_writer(lab: Lab, rng: random.Random) -> list[Figures]:
    """F20: the same run is started once more while it is at work."""
    run = Run(lab, "f20-two")
    run.wait_for_step(EVERY)
    ranks = run.ranks()
    for rank in ranks:  # so that it is still at work when the second has started
        os.kill(rank, signal.SIGSTOP)
    second = Run(lab, "f20-two")
    refused = second.end()
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)
    said = "is being written by" in second.log.read_text(errors="replace")
    return [figures(lab, run, "F20", "a second command of the same run, while it runs",
                    [refused, run.end()], [REFUSED, DONE], lost=0, held=said)]  # fmt: skip


def made_immutable(lab: Lab, rng: random.Random) -> list[Figures]:
    """F20: nothing may be written any more, as on a disk that turned read-only after an error."""
    run = Run(lab, "f20-ro")
    run.wait_for_step(EVERY + 2)
    subprocess.run(["chattr", "-R", "+i", str(run.folder)], check=True)
    code, last = run.end(), run.step
    said = "Operation not permitted" in run.log.read_text(errors="replace")
    subprocess.run(["chattr", "-R", "-i", str(run.folder)], check=True)
    again = Run(lab, "f20-ro")
    end = again.end()
    lost = last - again.resumed_from()
    return [figures(lab, again, "F20", "nothing in the run folder may be written, then it may",
                    [code, end], [TRAINING, DONE], lost=lost, held=said)]  # fmt: skip


def folder_deleted(lab: Lab, rng: random.Random) -> list[Figures]:
    """F20: somebody deletes the run folder; the run says so, the command begins anew."""
    run = Run(lab, "f20-gone")
    run.wait_for_step(EVERY + 2)
    aside = run.folder.with_name("f20-gone.deleted")
    run.folder.rename(aside)  # at once, as another name; then for good
    shutil.rmtree(aside)
    code = run.end()
    said = "No such file or directory" in run.log.read_text(errors="replace")
    again = Run(lab, "f20-gone")
    end = again.end()
    return [figures(lab, again, "F20", "the run folder is deleted; then a new run of that name",
                    [code, end], [TRAINING, DONE], lost=0, held=said)]  # fmt: skip


def not_permitted(lab: Lab, rng: random.Random) -> list[Figures]:
    """F20: run.root is another user's; the command is root's, but without root's capabilities."""
    closed = lab.folder / "closed"
    closed.mkdir(0o755)
    os.chown(closed, NOBODY, NOBODY)
    run = Run(lab, "f20-closed", root=closed,
              prefix=["setpriv", "--inh-caps=-all", "--bounding-set=-all"])  # fmt: skip
    code = run.end()
    said = "run.root: " in run.log.read_text(errors="replace")
    return [Figures("F20", "run.root belongs to another user", str(code), None, None, 0, 0,
                    lab.orphans(), code == CONFIGURATION and said)]  # fmt: skip


def out_of_memory(lab: Lab, rng: random.Random) -> list[Figures]:
    """F21: the kernel kills a rank for memory: a control group of its own, with no room."""
    group = Path("/sys/fs/cgroup/memory") / f"drill-{os.getpid()}"
    group.mkdir()
    try:
        run = Run(lab, "f21")
        run.wait_for_step(rng.randrange(EVERY + 2, 3 * EVERY))
        inode, rank = run.inode(), rng.choice(run.ranks())
        (group / "memory.limit_in_bytes").write_text(str(1 << 20))
        (group / "cgroup.procs").write_text(str(rank))
        struck = time.monotonic()
        run.wait_for(lambda: rank not in run.ranks(), "the end of the rank")
        last = run.step
        run.wait_for_new_step(inode)
        seconds = time.monotonic() - struck
        lost = last - run.resumed_from()
        code = run.end()
        named = "out of memory" in run.log.read_text(errors="replace")
        return [figures(lab, run, "F21", "the kernel kills a rank for memory; named in the log",
                        [code], [DONE], lost=lost, seconds=seconds, held=named)]  # fmt: skip
    finally:
        group.rmdir()


def hostile_files(lab: Lab, rng: random.Random) -> Iterator[Figures]:
    """All of F20 that this machine can do."""
    for fault in (
        second_writer, made_immutable, folder_deleted, not_permitted, clock_set_back
    ):  # fmt: skip
        yield from fault(lab, rng)


FAULTS: dict[str, Callable[[Lab, random.Random], Iterable[Figures]]] = {
    "F16": head_killed, "F17": partitioned, "F20": hostile_files,
    "F21": out_of_memory,
}  # fmt: skip
