"""`python -m tuneloom.launch.soak [--minutes 30] [--seed 0]`: drill F22, one run under a random
fault each 30 to 60 s for so long, then on to its last step; its figures against the uninterrupted
run.

Faults: kill -9 of a rank (between saves and inside one) or of the driver, SIGTERM to either,
SIGSTOP of a rank, a full disk. What ends the command is answered by the same command. Between two
faults the run makes steps for at least 10 s. Exit 0 when the bar held, 5 when not.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tuneloom.errors import DONE, STOPPED, TRAINING, TrainingError, TuneloomError
from tuneloom.launch.drill import REPORT, book
from tuneloom.launch.drill_lab import PATIENCE, Figures, Lab, Run
from tuneloom.launch.faults import tmpfs

STEPS_A_MINUTE = 600
"""More than the run makes under these faults on two busy cores, so that faults come to the end."""
EVERY = 100
PAUSE_SECONDS = (30.0, 60.0)
STEPPING_SECONDS = 10.0
"""How long the run makes steps between two faults, however long it needed to start again."""
HANG_SECONDS = 5
FULL_BYTES = 60_000
"""What is left when the disk is full: a few rows of metrics, no checkpoint."""


class Soak:
    """The run, struck again and again; `root` is a small disk."""

    def __init__(self, lab: Lab, root: Path, rng: random.Random) -> None:
        self.lab, self.root, self.rng = lab, root, rng
        self.struck: Counter[str] = Counter()
        self.surprises: list[str] = []
        self.redone, self.commands = 0, 0
        self._inode = self._seen = self._struck_inode = 0
        self.run = self._command()

    def _command(self) -> Run:
        self.commands += 1
        return Run(
            self.lab, "soak", f"train.hang_seconds={HANG_SECONDS}", "launch.max_restarts=1000",
            "checkpoint.keep=1", root=self.root,
        )  # fmt: skip

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
        return fresh and run.step > run.resumed_from() and len(run.ranks()) == 2

    def until(self, ready: Callable[[], bool], what: str, seconds: float = 300.0) -> None:
        """Look on until `ready` or the end of the command."""
        deadline = time.monotonic() + seconds
        while self.look() and not ready():
            if time.monotonic() > deadline:
                tail = self.run.log.read_text(errors="replace")[-1500:]
                raise TrainingError(f"soak: no {what} in {seconds:.0f} s; its log: {tail}")

    def fault(self) -> None:
        """One, at random; then the command again where it ended."""
        kind, strike, code = self.rng.choice([
            ("kill -9 of a rank", self._rank(signal.SIGKILL), None),
            ("kill -9 of a rank in a save", self._in_a_save, None),
            ("SIGSTOP of a rank", self._rank(signal.SIGSTOP), None),
            ("SIGTERM to a rank", self._rank(signal.SIGTERM), STOPPED),
            ("SIGTERM to the driver", self._driver(signal.SIGTERM), STOPPED),
            ("kill -9 of the driver", self._driver(signal.SIGKILL), -signal.SIGKILL),
            ("disk full", self._disk_full, TRAINING),
        ])  # fmt: skip
        at, self._struck_inode = self.run.step, self.run.inode()
        strike()
        self.struck[kind] += 1
        print(f"soak: {kind} at step {at}", flush=True)
        if code is None:
            return
        self.until(lambda: False, "end of the command")
        if self.run.process.returncode != code:
            self.surprises.append(f"{kind}: exit {self.run.process.returncode}, not {code}")
        (self.root / "ballast").unlink(missing_ok=True)
        if left := self.lab.orphans():
            self.surprises.append(f"{kind}: {left} processes left")
        if self.run.process.returncode != DONE:
            self.run = self._command()

    def _rank(self, number: int) -> Callable[[], None]:
        return lambda: os.kill(self.rng.choice(self.run.ranks()), number)

    def _driver(self, number: int) -> Callable[[], None]:
        return lambda: self.run.process.send_signal(number)

    def _in_a_save(self) -> None:
        checkpoints = self.run.folder / "checkpoints"
        self.until(lambda: any(checkpoints.glob(".torn-step-*")), "save")
        self._rank(signal.SIGKILL)()

    def _disk_full(self) -> None:
        free = shutil.disk_usage(self.root).free
        (self.root / "ballast").write_bytes(bytes(max(0, free - FULL_BYTES)))


def soak(lab: Lab, root: Path, rng: random.Random, minutes: float) -> Figures:
    """Strike for `minutes`, then let it reach its last step."""
    started = time.monotonic()
    it = Soak(lab, root, rng)
    while it.run.process.poll() is None and time.monotonic() < started + 60 * minutes:
        due = time.monotonic() + rng.uniform(*PAUSE_SECONDS)
        it.until(it.goes_on, "new step")
        due = max(due, time.monotonic() + STEPPING_SECONDS)
        it.until(lambda due=due: time.monotonic() > due, "time")  # type: ignore[misc]
        if it.run.process.poll() is None:
            it.fault()
    it.until(lambda: False, "end", PATIENCE + lab.steps)
    wall = time.monotonic() - started
    run, code = it.run, it.run.process.returncode
    if code != DONE:
        it.surprises.append(f"the run ended with exit {code}")
    facts = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    productive = facts["time"]["productive"] * facts["seconds"]
    orphans = lab.orphans()
    for surprise in it.surprises:
        print(f"soak: {surprise}", flush=True)
    faults = ", ".join(f"{count} x {kind}" for kind, count in sorted(it.struck.items()))
    print(f"soak: goodput {productive / wall:.1%} of {wall / 60:.1f} min; its ledger: "
          + ", ".join(f"{k} {v:.1%}" for k, v in facts["time"].items()), flush=True)  # fmt: skip
    bits, samples = lab.bits_off(run), lab.samples_off(run)
    what = (
        f"soak of {wall / 60:.1f} min, {lab.steps} steps, a checkpoint every {lab.every}: "
        f"{it.struck.total()} faults ({faults}), goodput {productive / wall:.1%}"
    )
    held = not (bits or samples or orphans or it.surprises) and run.step == lab.steps
    return Figures("F22", what, str(code), it.redone, wall, bits, samples, orphans, held)


def main(argv: list[str] | None = None) -> int:
    """Soak, and put the row into docs/faults.md."""
    parser = argparse.ArgumentParser(prog="python -m tuneloom.launch.soak")
    parser.add_argument("--minutes", type=float, default=30.0, help="how long faults come")
    parser.add_argument("--seed", type=int, default=0, help="decides faults, times and ranks")
    parser.add_argument("--out", type=Path, default=REPORT, help="the table (docs/faults.md)")
    given = parser.parse_args(argv)
    steps = round(given.minutes * STEPS_A_MINUTE)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        lab = Lab(Path(folder), steps=steps, every=EVERY)
        try:
            with tmpfs(lab.folder / "small", 256 << 20) as root:
                figure = soak(lab, root, random.Random(given.seed), given.minutes)
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
