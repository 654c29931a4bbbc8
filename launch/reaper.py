"""`python -m tuneloom.launch.reaper PID [RUN]`: nothing of an embedded Ray outlives the driver PID,
nor what its run keeps in memory; on a cluster the PID is an actor's (`launch/keepers.py`).

A driver that is killed takes its ranks with it within 4 s, but Ray's dashboard and runtime-env
agents go on for more than 30 s (2.60.0), under names that say nothing of whose they are. So this
process notes what descends from the driver while it lives. Its standard input ends when the driver
does, however that ended; what is still there a second later is killed, so that ranks of a killed
driver do no more steps that nobody asked for, and copies of the run's state in memory go
(`checkpoint.memory_every`).
"""

import os
import select
import subprocess
import sys
from pathlib import Path

import psutil

from tuneloom.train import shm

GRACE_SECONDS = 1.0
"""What Ray may take to end by itself; after `ray.shutdown` it has all but ended already."""
ENDING_SECONDS = 10.0
NOTE_SECONDS = 2.0
HELD: list[subprocess.Popen[bytes]] = []
"""Their standard input ends with this process."""


def after_us(run: Path | None = None) -> None:
    """Have what this process started reaped once it is gone, and what its run kept in memory.

    By a grandchild, as an actor that Ray ends takes its children with it.
    """
    folder = [] if run is None else [str(run.resolve())]
    shell = subprocess.Popen(
        ["sh", "-c", 'exec 3<&0; "$@" <&3 &', "sh",
         sys.executable, "-m", "tuneloom.launch.reaper", str(os.getpid()), *folder],
        stdin=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    shell.wait()
    HELD.append(shell)


def main(driver: int, run: Path | None = None) -> int:
    """Note descendants until the driver ends, then end those that are left."""
    noted: set[psutil.Process] = set()
    while not select.select([sys.stdin], [], [], NOTE_SECONDS)[0]:
        noted |= descendants(driver)
    _, left = psutil.wait_procs(noted, timeout=GRACE_SECONDS)
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:  # it ended by itself meanwhile
            continue
    psutil.wait_procs(left, timeout=ENDING_SECONDS)
    if run is not None:
        shm.forget_when_ended(run)
    return 0


def descendants(pid: int) -> set[psutil.Process]:
    """Ray's processes among them, whatever else the driver started; none when it is gone."""
    try:
        return {p for p in psutil.Process(pid).children(recursive=True) if _is_ray(p.cmdline())}
    except psutil.NoSuchProcess:
        return set()


def _is_ray(command: list[str]) -> bool:
    return any(part.startswith("ray::") or "/ray/" in part for part in command)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *map(Path, sys.argv[2:])))
