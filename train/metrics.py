"""metrics.jsonl always, a progress line, and where each second of the run went.

`python -m tuneloom.train.metrics RUN` writes the rows of metrics.jsonl that W&B's files of the run
lack into one more file, which `wandb sync` uploads.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuneloom.errors import DONE, ConfigError, DiskError, TrainingError, TuneloomError
from tuneloom.train import runs
from tuneloom.train.config import TrackerConfig
from tuneloom.train.tracker import Tracker, steps_written

PHASES = ("productive", "data", "collective", "checkpoint", "evaluation", "startup", "lost")
"""Where rank 0's wall time goes. `collective` is what it waits in the loop's own reductions of
numbers on the CPU (under gloo also that of the loss); waits inside the reduction of gradients are
part of the backward pass that they overlap with, and `speed/slowest_rank` tells of those. `lost` is
the time of steps that were done again, and between two attempts of one command."""


@dataclass(frozen=True)
class Kept:
    """What metrics.jsonl holds of earlier attempts."""

    total: dict[str, float]
    """Seconds by phase in the rows that stay."""
    dropped: float = 0.0
    """Seconds in the rows of steps that will be done again."""
    until: float = 0.0
    """When the last row, kept or not, was written; seconds of the epoch."""


class Clock:
    """Splits the wall time of a run, over all its attempts, into phases that sum to 100 %: what is
    in no phase is `productive` or `startup`.
    """

    def __init__(self, started: float | None = None, command: float | None = None) -> None:
        # The time of day is read once: a clock that is set during the run moves no second.
        self._epoch = time.time() - time.monotonic()
        now = self._now()
        self.command = command or float(os.environ.get("TUNELOOM_STARTED", now))
        """When the command was started that this attempt belongs to."""
        self.started = started or float(os.environ.get("TUNELOOM_ATTEMPT_STARTED", self.command))
        self.total: dict[str, float] = defaultdict(float)
        self.since_row: dict[str, float] = defaultdict(float)
        self._mark = self.started
        self._phase = "startup"
        self.changes = 0
        """Switches so far: while it grows, the run makes progress (`train/watchdog.py`)."""

    def _now(self) -> float:
        return self._epoch + time.monotonic()

    @property
    def now_in(self) -> str:
        """The phase that time is booked on."""
        return self._phase

    def switch(self, phase: str) -> str:
        """Book the time since the last switch on the phase that ends; returns that phase."""
        now = self._now()
        self.changes += 1
        self.total[self._phase] += now - self._mark
        self.since_row[self._phase] += now - self._mark
        ended, self._phase, self._mark = self._phase, phase, now
        return ended

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = self.switch(name)
        try:
            yield
        finally:
            self.switch(before)

    def carry_on(self, kept: Kept) -> float:
        """Take over what earlier attempts booked; returns the seconds that were lost: of steps that
        are done again, and since the last attempt of this command wrote.

        While no command runs nothing is lost: a run that is resumed the next day slept.
        """
        lost = kept.dropped + max(0.0, self.started - max(self.command, kept.until))
        for phase, seconds in kept.total.items():
            self.total[phase] += seconds
        self.total["lost"] += lost
        self.since_row["lost"] += lost
        return lost

    def shares(self) -> dict[str, float]:
        """Of the run's wall time so far, by phase; they sum to 1."""
        whole = sum(self.total.values())
        return {phase: self.total[phase] / whole for phase in PHASES}

    def row(self) -> dict[str, float]:
        """Seconds by phase since the last row, shares since the run began, and the time of day;
        starts the next row.
        """
        self.switch(self._phase)
        row = {f"time/{phase}": round(self.since_row[phase], 6) for phase in PHASES}
        row |= {f"goodput/{phase}": round(share, 6) for phase, share in self.shares().items()}
        self.since_row.clear()
        return row | {"at": round(self._mark, 6)}


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far: of the GPU's allocator, or this process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Metrics:
    """Rows of one run, on rank 0. `open_at` drops rows of steps that will be done again."""

    def __init__(self, folder: Path, tracker: Tracker) -> None:
        self.path = folder / "metrics.jsonl"
        self.tracker = tracker

    def open_at(self, step: int) -> Kept:
        """Keep rows up to `step`, and give W&B those that it lacks; returns where the seconds of
        all rows went.
        """
        if not self.path.exists():
            return Kept({})
        kept, total, dropped, until = [], dict.fromkeys(PHASES, 0.0), 0.0, 0.0
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            row = row_of(line)
            if row is None:
                continue
            until = max(until, row.get("at", 0.0))
            seconds = {phase: row.get(f"time/{phase}", 0.0) for phase in PHASES}
            if row["step"] > step:
                dropped += sum(seconds.values())
                continue
            kept.append(line)
            total = {phase: total[phase] + seconds[phase] for phase in PHASES}
        aside = self.path.with_suffix(".tmp")
        aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(aside, self.path)
        if self.tracker.run is not None:
            for row in lacking(self.path.parent):
                self.tracker.log(row)
        return Kept(total, dropped, until)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; raises DiskError where the disk does not take it."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise DiskError(
                f"{self.path}: the row of step {row['step']} could not be written "
                f"({error.strerror}); look at the disk that holds run.root"
            ) from error
        self.tracker.log(row)


class Progress:
    """A live line on a terminal (rich), one plain line now and then elsewhere."""

    def __init__(self, *, every_seconds: float = 10.0) -> None:
        self.every_seconds, self._last = every_seconds, 0.0
        self._live: Any = None
        if sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(refresh_per_second=4)
            self._live.start()

    def show(self, row: dict[str, Any], progress: float) -> None:
        line = (
            f"step {row['step']:>6}  {100 * progress:5.1f} %  loss {row['train/loss']:.4f}  "
            f"grad {row['train/grad_norm']:.3f}  lr {row['train/lr']:.2e}  "
            f"{row['speed/tokens_per_second']:,.0f} tok/s  {row['memory/peak_gib']:.2f} GiB"
        )
        if self._live is not None:
            from rich.text import Text

            # One row of an 80-column terminal, cut rather than wrapped.
            self._live.update(Text(" ".join(line.split()), no_wrap=True, overflow="crop"))
        elif time.monotonic() - self._last >= self.every_seconds or row["step"] == 1:
            self._last = time.monotonic()
            print(line, flush=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


def row_of(line: str) -> dict[str, Any] | None:
    """A row; None for the last line of a killed writer, or what a bad disk made of one."""
    try:
        row = json.loads(line)
        row["step"] + row.get("at", 0.0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return dict(row)


def lacking(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of metrics.jsonl whose step W&B's files of the run do not have."""
    there = steps_written(folder)
    with (folder / "metrics.jsonl").open(encoding="utf-8", errors="replace") as lines:
        rows = map(row_of, lines)
        yield from (row for row in rows if row is not None and row["step"] not in there)


def fill(folder: Path) -> str:
    """Write what W&B's files of a run lack; returns what was done.

    Raises ConfigError for a folder that holds no run, RefusedError while it is being written, and
    TrainingError when rows are lacking still.
    """
    found = runs.recorded(folder)
    if not found or not (folder / "metrics.jsonl").exists():
        raise ConfigError(f"{folder}: no run with a metrics.jsonl is here; give a run's folder")
    with runs.locked(folder):
        before = list(lacking(folder))
        if not before:
            return f"W&B's files of {folder} have every row of metrics.jsonl"
        settings = TrackerConfig(mode="offline", project=found["config"]["tracker"]["project"])
        tracker = Tracker(settings, folder, found["config"]["run"]["id"], found["config"])
        for row in before:
            tracker.log(row)
        tracker.finish()
        if left := len(list(lacking(folder))):
            raise TrainingError(f"{folder}/wandb: {left} rows are lacking still; look at its disk")
    return f"{len(before)} rows written; `wandb sync {folder}/wandb/offline-run-*` uploads them"


def main(argv: list[str] | None = None) -> int:
    """`fill` as a command."""
    parser = argparse.ArgumentParser(prog="python -m tuneloom.train.metrics")
    parser.add_argument("run", type=Path, help="folder of a run")
    try:
        print(f"tracker: {fill(parser.parse_args(argv).run.resolve())}")
    except TuneloomError as error:
        print(f"tuneloom.train.metrics: {error}", file=sys.stderr)
        return error.exit_code
    return DONE


if __name__ == "__main__":
    sys.exit(main())
