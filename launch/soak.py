"""`python -m tuneloom.launch.soak [--minutes 30] [--seed 0] [--hosts]`: drill F22, one run under a
random fault each 30 to 60 s up to its last step, with `launch.standby` and copies in memory; then
the same run uninterrupted, for the bits and for what a step takes. With `--hosts` it runs on two
network namespaces (launch=ray, no standby), and a whole host dies, too, replaced 3 s later.

`--minutes` are those of the whole command, about: a short run tells how many steps fit. Goodput is
the seconds that all steps need uninterrupted, over the wall time of the soak: at the pace of the
short run or of the uninterrupted one, whichever was faster, as other work on the machine may have
slowed one of them.

Faults: kill -9 of a rank (between saves and inside one) or of the driver, SIGTERM to either,
SIGSTOP of a rank, a full disk. What ends the command is answered by the same command. Between two
faults the run makes steps for at least 10 s. Exit 0 when the bar held, 5 when not.
"""

import argparse
import errno
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from tuneloom.errors import DONE, STOPPED, TRAINING, TrainingError, TuneloomError
from tuneloom.launch.drill import REPORT, book
from tuneloom.launch.drill_lab import PATIENCE, Figures, Lab, Run
from tuneloom.launch.faults import tmpfs
from tuneloom.launch.hosts import REPLACED_SECONDS, Hosts
from tuneloom.train import shm

UNINTERRUPTED = 0.42
"""Of the time, for the uninterrupted run: the soak then has room for a goodput of 0.42 / 0.58
(measured: 0.71 and 0.74).
"""
PACE_STEPS = 500
"""Of the short run."""
EVERY, MEMORY_EVERY = 100, 50
"""Steps between checkpoints, and copies: one of these takes as long as a step of so small a model,
so `checkpoint.memory_every=1`, which is for large ones, would double every step.
"""
PAUSE_SECONDS = (30.0, 60.0)
STEPPING_SECONDS = 10.0
"""How long the run makes steps between two faults, however long it needed to start again."""
HANG_SECONDS = 5
DISK_BYTES = 640 << 20
"""Preflight asks for half a GiB free."""
FULL_BYTES = 60_000
"""What is left when the disk is full: a few rows of metrics, no checkpoint."""


class Soak:
    """The run, struck again and again; `root` is a small disk."""

    def __init__(
        self, lab: Lab, root: Path, rng: random.Random, hosts: Hosts | None = None
    ) -> None:
        self.lab, self.root, self.rng, self.hosts = lab, root, rng, hosts
        self.surprises: list[str] = []
        self.redone = 0
        self.downtimes: dict[str, list[float]] = {}
        self._inode = self._seen = self._struck_inode = 0
        self.run = self._command()

    def _command(self) -> Run:
        shared = (f"train.hang_seconds={HANG_SECONDS}", "launch.max_restarts=1000",
                  "checkpoint.keep=1", f"checkpoint.memory_every={MEMORY_EVERY}")  # fmt: skip
        if self.hosts is None:
            return Run(self.lab, "soak", *shared, "launch.standby=true", root=self.root)
        return Run(
            self.lab, "soak", *shared, "launch.kind=ray", "launch.nodes=2", root=self.root,
            prefix=self.hosts.inside("a"), environment=self.hosts.command,
        )  # fmt: skip

    def ranks(self) -> list[int]:
        """Process ids of the ranks at work."""
        return self.run.ranks() if self.hosts is None else self.hosts.ranks()

    def look(self) -> bool:
        """Note the step and what was done again; True while the command runs."""
        inode = self.run.inode()
        if inode != self._inode and self._inode:
            self.redone += max(0, self._seen - self.run.resumed_from())
            self._seen = 0
        self._inode = inode
        self._seen = max(self._seen, self.run.step)
        time.sleep(0.05)
        return self.run.process.poll() is None

    def goes_on(self) -> bool:
        """True once an attempt that began after the last fault has made a step."""
        run = self.run
        fresh = run.inode() not in (0, self._struck_inode)
        return fresh and run.step > run.resumed_from() and len(self.ranks()) == 2

    def until(self, ready: Callable[[], bool], what: str, seconds: float = 300.0) -> None:
        """Look on until `ready` or the end of the command."""
        deadline = time.monotonic() + seconds
        while self.look() and not ready():
            if time.monotonic() > deadline:
                tail = self.run.log.read_text(errors="replace")[-1500:]
                raise TrainingError(f"soak: no {what} in {seconds:.0f} s; its log: {tail}")

    def fault(self) -> float:
        """One, at random; then the command again where it ended. Returns the seconds to a step."""
        faults: list[tuple[str, Callable[[], None], int | None]] = [
            ("kill -9 of a rank", self._rank(signal.SIGKILL), None),
            ("kill -9 of a rank in a save", self._in_a_save, None),
            ("SIGSTOP of a rank", self._rank(signal.SIGSTOP), None),
            ("SIGTERM to a rank", self._rank(signal.SIGTERM), STOPPED),
            ("SIGTERM to the driver", self._driver(signal.SIGTERM), STOPPED),
            ("kill -9 of the driver", self._driver(signal.SIGKILL), -signal.SIGKILL),
            ("disk full", self._disk_full, TRAINING),
        ]  # fmt: skip
        if self.hosts is not None:
            faults.append(("kill -9 of a host", self._host, None))
        if (ended := self.run.process.poll()) is not None:
            tail = self.run.log.read_text(errors="replace")[-1500:]
            raise TrainingError(f"soak: the command ended by itself with {ended}; its log: {tail}")
        kind, strike, code = self.rng.choice(faults)
        at, self._struck_inode = self.run.step, self.run.inode()
        strike()
        struck = time.monotonic()
        if code is not None:
            self._again(kind, code)
        self.until(self.goes_on, "new step")
        seconds = time.monotonic() - struck
        self.downtimes.setdefault(kind, []).append(seconds)
        print(f"soak: {kind} at step {at}: {seconds:.1f} s to the next new step", flush=True)
        return seconds

    def _again(self, kind: str, code: int) -> None:
        """The command ends; what it left, and the same command once more."""
        self.until(lambda: False, "end of the command")
        if self.run.process.returncode != code:
            self.surprises.append(f"{kind}: exit {self.run.process.returncode}, not {code}")
        (self.root / "ballast").unlink(missing_ok=True)
        if left := self.orphans():
            self.surprises.append(f"{kind}: {left} processes left")
        if self.run.process.returncode != DONE:
            self.run = self._command()

    def orphans(self) -> int:
        """Processes of the run that outlive its command by ENDING_SECONDS."""
        left = self.lab.orphans()
        return left if self.hosts is None else left + self.hosts.orphans()

    def _rank(self, number: int) -> Callable[[], None]:
        return lambda: os.kill(self.rng.choice(self.ranks()), number)

    def _host(self) -> None:
        """The one without Ray's head, whose death ends the command (F16)."""
        assert self.hosts is not None
        self.hosts.kill("b")
        time.sleep(REPLACED_SECONDS)
        self.hosts.start("b")

    def _driver(self, number: int) -> Callable[[], None]:
        return lambda: self.run.process.send_signal(number)

    def _in_a_save(self) -> None:
        checkpoints = self.run.folder / "checkpoints"
        self.until(lambda: any(checkpoints.glob(".torn-step-*")), "save")
        self._rank(signal.SIGKILL)()

    def _disk_full(self) -> None:
        size = 0
        with (self.root / "ballast").open("wb") as ballast:
            while (spare := shutil.disk_usage(self.root).free - FULL_BYTES) > 0:
                try:
                    os.posix_fallocate(ballast.fileno(), size, spare)
                    size += spare
                except OSError as error:  # what the run wrote meanwhile is not free any more
                    if error.errno != errno.ENOSPC:
                        raise


def soak(
    lab: Lab, root: Path, rng: random.Random, until: float, rate: float, hosts: Hosts | None
) -> Figures:
    """Strike until the last step, at most to `until` (monotonic); compare. `rate` is what the short
    run made, in steps a second.
    """
    started = time.monotonic()
    it = Soak(lab, root, rng, hosts)
    it.until(it.goes_on, "first step")
    down = 0.0
    while True:
        due = time.monotonic() + max(STEPPING_SECONDS, rng.uniform(*PAUSE_SECONDS) - down)
        it.until(lambda due=due: time.monotonic() > due, "time")  # type: ignore[misc]
        if time.monotonic() > until or it.run.step > lab.steps - 2 * lab.every:
            break
        down = it.fault()
    it.until(lambda: False, "end", PATIENCE + lab.steps)
    wall = time.monotonic() - started
    run, code = it.run, it.run.process.returncode
    if code != DONE:
        it.surprises.append(f"the run ended with exit {code}")
    orphans = it.orphans()
    if left := list(shm.ROOT.glob(f"tuneloom-{(run.folder / shm.TOKEN).read_text()}")):
        it.surprises.append(f"{left[0]} is left in memory")
    for surprise in it.surprises:
        print(f"soak: {surprise}", flush=True)
    bits, samples = lab.bits_off(run), lab.samples_off(run)
    needed, pace_of = min(
        (stepping_seconds(lab.reference), "the uninterrupted run"),
        (lab.steps / rate, f"{PACE_STEPS} steps at the start"),
    )
    facts = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    print("soak: its ledger: " + ", ".join(f"{k} {v:.1%}" for k, v in facts["time"].items()))
    faults = ", ".join(
        f"{len(seconds)} x {kind} ({statistics.mean(seconds):.1f} s)"
        for kind, seconds in sorted(it.downtimes.items())
    )
    place = "launch.standby" if hosts is None else "two hosts"
    what = (
        f"soak of {wall / 60:.1f} min, {lab.steps} steps, a checkpoint every {lab.every}, copies "
        f"in memory every {MEMORY_EVERY}, {place}: {sum(map(len, it.downtimes.values()))} "
        f"faults (to the next new step: {faults}), goodput {needed / wall:.1%} "
        f"at the pace of {pace_of}"
    )
    whole = run.step == lab.steps and bool(it.downtimes)
    held = whole and not (bits or samples or orphans or it.surprises)
    return Figures("F22", what, str(code), it.redone, wall, bits, samples, orphans, held)


def stepping_seconds(run: Run) -> float:
    """From the first row to the last one."""
    rows = run.rows()
    return float(rows[-1]["at"]) - float(rows[0]["at"])


def pace(folder: Path) -> float:
    """Steps a second of a short run."""
    lab = Lab(folder, steps=PACE_STEPS, every=EVERY)
    return (PACE_STEPS - 1) / stepping_seconds(lab.reference)


def main(argv: list[str] | None = None) -> int:
    """Soak, and put the row into docs/faults.md."""
    parser = argparse.ArgumentParser(prog="python -m tuneloom.launch.soak")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the whole command")
    parser.add_argument("--seed", type=int, default=0, help="decides faults, times and ranks")
    parser.add_argument("--hosts", action="store_true", help="on two hosts, one of which dies")
    parser.add_argument("--out", type=Path, default=REPORT, help="the table (docs/faults.md)")
    given = parser.parse_args(argv)
    ends = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        lab = Lab(Path(folder), every=EVERY)
        try:
            (lab.folder / "pace").mkdir()
            undisturbed = UNINTERRUPTED * 60 * given.minutes
            rate = pace(lab.folder / "pace")
            lab.steps = round(undisturbed * rate)
            print(f"soak: {lab.steps} steps", flush=True)
            with (
                tmpfs(lab.folder / "small", DISK_BYTES) as root,
                Hosts() if given.hosts else nullcontext() as hosts,
            ):
                rng = random.Random(given.seed)
                figure = soak(lab, root, rng, ends - undisturbed, rate, hosts)
        except TuneloomError as error:
            print(f"soak: {error}", file=sys.stderr)
            return error.exit_code
        finally:
            lab.sweep()
    print(figure, flush=True)
    book(given.out, figure, given.seed)
    return DONE if figure.held else TRAINING


if __name__ == "__main__":
    sys.exit(main())
