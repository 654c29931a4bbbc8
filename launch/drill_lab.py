"""Where drills happen: a tiny model in a temporary folder, real runs of `tuneloom train` on it, and
what is measured about them.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tuneloom.errors import TrainingError

STEPS, EVERY = 120, 10
"""Ranks outlive their driver by 2 s, in which this model takes 17 to 40 steps (measured)."""
PATIENCE = 400.0
ENDING_SECONDS = 10.0
TAIL_BYTES = 16_384
MOST_LOST = {"F2": EVERY, "F5": 0, "F6": EVERY, "F7": 2 * EVERY - 1, "F18": 0, "F19": 3 * EVERY}
"""Steps that a fault may cost; the others at most what was done since the last save."""
HANG_SECONDS = 5
"""`train.hang_seconds` of the drills."""
MOST_SECONDS = {
    "F1": 45.0, "F3": 60.0, "F5": 30.0, "F12": HANG_SECONDS + 5.0, "F13": HANG_SECONDS + 5.0,
    "F15": 2.0, "F21": 45.0,
}  # fmt: skip
"""Seconds that a row of a fault may show; the others have no bar in seconds."""


@dataclass(frozen=True)
class Figures:
    """What one fault cost; None is not measured under this fault."""

    fault: str
    what: str
    exit_codes: str
    steps_lost: int | None
    seconds: float | None
    """From the fault (or the second start of the same command) to the first new step, or to what
    the row says; at most MOST_SECONDS.
    """
    differing_bits: int
    samples_off: int
    """Examples that were missing or came twice, against the uninterrupted run."""
    orphans: int
    held: bool


class Run:
    """One started `tuneloom train`."""

    def __init__(
        self, lab: "Lab", run_id: str, *more: str, root: Path | None = None,
        prefix: Sequence[str] = (), environment: dict[str, str] | None = None,
    ) -> None:  # fmt: skip

        self.lab, self.folder = lab, (root or lab.folder / "runs") / run_id
        self.started = time.monotonic()
        self.log = lab.folder / f"{run_id}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "tuneloom", "train",
                 *lab.overrides(self.folder), *more],
                stdout=log, stderr=log, cwd=lab.folder,
                env=environment or os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        """Training rows of metrics.jsonl that are whole."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(True)
        except FileNotFoundError:
            return []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [row for row in rows if "train/loss" in row]

    @property
    def step(self) -> int:
        """The last one of metrics.jsonl, read from its end."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
                lines = file.read().splitlines(True)
        except FileNotFoundError:
            return 0
        whole = [line for line in lines if line.startswith(b'{"step"') and line.endswith(b"\n")]
        return int(json.loads(whole[-1])["step"]) if whole else 0

    def inode(self) -> int:
        """Of metrics.jsonl: a resumed run replaces the file."""
        path = self.folder / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else 0

    def wait_for(self, ready: Any, what: str) -> None:
        """Poll every 10 ms; raises TrainingError when the run ends first, or after 400 s."""
        deadline = time.monotonic() + PATIENCE
        while not ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = self.log.read_text(errors="replace")[-1500:]
                raise TrainingError(f"drill: {self.folder.name} never saw {what}; its log: {tail}")
            time.sleep(0.01)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: self.step >= step, f"step {step}")

    def wait_for_save(self) -> None:
        """Until a save is under way."""
        root = self.folder / "checkpoints"
        self.wait_for(lambda: any(root.glob(".torn-step-*")), "a save")

    def wait_for_new_step(self, inode: int) -> None:
        """Until a resumed attempt, which replaces metrics.jsonl, has written a step of its own."""
        self.wait_for(lambda: self.inode() != inode, "a resumed attempt")
        kept = self.resumed_from()
        self.wait_for(lambda: self.step > kept, "a new step")

    def resumed_from(self) -> int:
        name = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))["resumed_from"]
        return int(name.removeprefix("step-")) if name else 0

    def ranks(self) -> list[int]:
        """Process ids of the ranks at work, which Ray names after the method they run."""
        return [pid for pid in standing_in(self.lab.folder) if is_rank(pid)]

    def end(self, seconds: float = PATIENCE) -> int:
        """Its exit code; killed and raised about when it does not end."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise TrainingError(
                f"drill: {self.folder.name} did not end in {seconds:.0f} s"
            ) from None


class Lab:
    """The temporary folder with model and rows, and the uninterrupted run."""

    def __init__(self, folder: Path, *, steps: int = STEPS, every: int = EVERY) -> None:
        from tuneloom.testing import chat_rows, tiny_model

        self.folder, self.steps, self.every = folder.resolve(), steps, every
        tiny_model(folder / "base")
        chat_rows(folder / "rows.jsonl", 48)

    @cached_property
    def reference(self) -> Run:
        """The uninterrupted run, made when it is first compared with."""
        run = Run(self, "reference")
        if run.end(PATIENCE + self.steps) != 0:
            tail = run.log.read_text(errors="replace")[-1500:]
            raise TrainingError(f"drill: the uninterrupted run failed: {tail}")
        return run

    def overrides(self, run: Path) -> list[str]:
        return [
            f"run.root={run.parent}", f"run.id={run.name}", f"model.path={self.folder}/base",
            "model.dtype=fp32", f"data.path={self.folder}/rows.jsonl", "data.validation=null",
            "batch.max_length=128", "batch.tokens=512", "batch.window=64", "optim.lr=5e-3",
            "optim.warmup_steps=2", "tracker=off", "zero=stage2", "epochs=100000",
            f"steps={self.steps}",
            "train.drill=false", f"checkpoint.every={self.every}", "launch=local",
            "launch.workers=2",
        ]  # fmt: skip

    def orphans(self) -> int:
        """Processes of drilled runs that live ENDING_SECONDS from now; ends as none does."""
        deadline = time.monotonic() + ENDING_SECONDS
        while (left := standing_in(self.folder)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return len(left)

    def sweep(self) -> None:
        """End what a failed drill left behind."""
        for pid in standing_in(self.folder):
            os.kill(pid, signal.SIGKILL)

    def bits_off(self, run: Run) -> int:
        """Bits that differ in the losses of all steps, as float64."""
        from struct import pack

        def losses(rows: list[dict[str, Any]]) -> dict[int, int]:
            return {
                row["step"]: int.from_bytes(pack(">d", row["train/loss"]), "big") for row in rows
            }

        ours, wanted = losses(run.rows()), losses(self.reference.rows())
        return sum(
            (ours.get(step, bits ^ (2**64 - 1)) ^ bits).bit_count() for step, bits in wanted.items()
        )

    def samples_off(self, run: Run) -> int:
        """Examples missing or twice, by record and step, against the uninterrupted run."""
        ours, wanted = (exposed(r.folder / "exposure.parquet") for r in (run, self.reference))
        return (ours - wanted).total() + (wanted - ours).total()


def exposed(path: Path) -> Counter[tuple[str, int]]:
    table = pq.read_table(path, columns=["record_id", "step"])
    return Counter(zip(*(column.to_pylist() for column in table.columns), strict=True))


def standing_in(folder: Path) -> list[int]:
    """Processes whose working directory is `folder`: what a run starts inherits it, orphaned or
    not.
    """
    pids = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal())
    return sorted(pid for pid in pids if _directory(pid) == str(folder))


def is_rank(pid: int) -> bool:
    """Ray names a process after the method it runs."""
    return b"Worker.run" in command_of(pid)


def _directory(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:  # it ended meanwhile, or is another user's
        return None


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def in_time(fault: str, seconds: float | None) -> bool:
    """Whether a fault kept its bar in seconds, where it has one and they were measured."""
    return seconds is None or seconds <= MOST_SECONDS.get(fault, seconds)


def figures(
    lab: Lab, run: Run, fault: str, what: str, codes: list[int], wanted: list[int], *,
    lost: int, seconds: float | None = None, orphans: int | None = None, held: bool = True,
    exact: bool = True,
) -> Figures:  # fmt: skip
    """Figures of a run that has ended, and whether they meet the bar."""
    bits, samples = lab.bits_off(run), lab.samples_off(run)
    left = max(lab.orphans(), orphans or 0)
    most = MOST_LOST.get(fault, EVERY - 1)
    good = codes == wanted and 0 <= lost <= most and not samples and not left
    return Figures(
        fault=fault, what=what, exit_codes=", ".join(map(str, codes)), steps_lost=lost,
        seconds=seconds, differing_bits=bits, samples_off=samples, orphans=left,
        held=held and good and (not bits or not exact),
    )  # fmt: skip
