"""metrics.jsonl always, a progress line, and where each second of the run went."""

import json
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tuneloom.train.tracker import Tracker

PHASES = ("productive", "data", "checkpoint", "evaluation", "startup", "lost")


class Clock:
    """Splits wall time into phases that sum to 100 %: what is in no phase is `productive` or
    `startup`.
    """

    def __init__(self, started: float | None = None) -> None:
        self.started = started or float(os.environ.get("TUNELOOM_STARTED", time.time()))
        self.total: dict[str, float] = defaultdict(float)
        self.since_row: dict[str, float] = defaultdict(float)
        self._mark = self.started
        self._phase = "startup"
        self.changes = 0
        """Switches so far: while it grows, the run makes progress (`train/watchdog.py`)."""

    @property
    def now_in(self) -> str:
        """The phase that time is booked on."""
        return self._phase

    def switch(self, phase: str) -> str:
        """Book the time since the last switch on the phase that ends; returns that phase."""
        now = time.time()
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

    def lost(self, seconds: float) -> None:
        """Time of an earlier attempt whose steps are done again."""
        self.total["lost"] += seconds
        self.since_row["lost"] += seconds

    def row(self) -> dict[str, float]:
        """Seconds by phase since the last row; starts the next."""
        self.switch(self._phase)
        row = {f"time/{phase}": round(self.since_row[phase], 6) for phase in PHASES}
        self.since_row.clear()
        return row


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

    def open_at(self, step: int, *, restarted: float | None = None) -> float:
        """Keep rows up to `step`; returns the seconds that the dropped rows had taken.

        `restarted` is when the attempt began that takes over from a lost one: what passed between
        the last row and then is lost as well.
        """
        if not self.path.exists():
            return 0.0
        kept, lost = [], 0.0
        if restarted is not None:
            lost = max(0.0, restarted - self.path.stat().st_mtime)
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the last line of a killed writer
                continue
            if row["step"] <= step:
                kept.append(line)
            else:
                lost += sum(v for k, v in row.items() if k.startswith("time/"))
        aside = self.path.with_suffix(".tmp")
        aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(aside, self.path)
        return lost

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
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
