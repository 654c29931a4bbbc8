"""Hangs: when a rank makes no progress for `train.hang_seconds`, all stacks and one sentence, then
the end of the process, so that the launcher starts again from the newest checkpoint.

    runs/<id>/hang/rank-00001.txt    stacks of all threads of a rank
    runs/<id>/hang/report.json       its kind, the ranks at fault, and the sentence that was printed

gloo says `timed out` after 30 minutes and not which rank was missed (measured, torch 2.13). A rank
that is stopped, or whose host is gone, writes nothing: that is how it is found.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from tuneloom.errors import TRAINING
from tuneloom.train.distributed import World
from tuneloom.train.metrics import Clock

FOLDER = "hang"
PATIENCE_SECONDS = 3.0
"""How long the first rank that notices waits for the reports of the others."""
COLLECTIVES = ("torch/distributed/distributed_c10d.py", "deepspeed/comm/")
CODE = Path(__file__).resolve().parents[1]
STALLS = {"data": "data stall", "checkpoint": "save stall", "evaluation": "evaluation stall"}


@dataclass(frozen=True)
class Standing:
    """Where one rank stands."""

    rank: int
    host: str
    phase: str
    line: str
    """Innermost line of this project that the main thread is in."""
    collective: str | None
    """The collective that it waits in, None when it computes, reads or sleeps."""


@dataclass(frozen=True)
class Report:
    kind: str
    ranks: list[int]
    sentence: str


class Watchdog:
    """A thread beside the loop; progress is any change of phase that the clock books."""

    def __init__(
        self, folder: Path, world: World, clock: Clock, *, seconds: float, hosts: list[str]
    ) -> None:
        self.folder, self.world, self.clock = folder / FOLDER, world, clock
        self.seconds, self.hosts = seconds, hosts
        self._loop = threading.get_ident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def close(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        seen, since = self.clock.changes, time.monotonic()
        while not self._over.wait(min(1.0, self.seconds / 4)):
            if self.clock.changes != seen:
                seen, since = self.clock.changes, time.monotonic()
            elif time.monotonic() - since > self.seconds:
                self._end()

    def _end(self) -> None:
        """Report and leave; never returns."""
        started = time.time()
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank-{self.world.rank:05d}.txt").open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        own = self.folder / f"rank-{self.world.rank:05d}.json"
        own.write_text(json.dumps(asdict(self._standing())), encoding="utf-8")
        time.sleep(PATIENCE_SECONDS)
        found = standings(self.folder, since=started - self.seconds)
        if found and found[0].rank == self.world.rank:
            report = judge(found, self.hosts, self.seconds)
            path = self.folder / "report.json"
            path.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
            print(f"hang: {report.sentence}", flush=True)
        sys.stdout.flush()
        time.sleep(0.5)  # the others read nothing more, the launcher reads the sentence
        os._exit(TRAINING)

    def _standing(self) -> Standing:
        frames = list(_frames(sys._current_frames().get(self._loop)))
        ours = next((f for f in frames if CODE in Path(f.f_code.co_filename).parents), None)
        waits = [f for f in frames if any(c in f.f_code.co_filename for c in COLLECTIVES)]
        return Standing(
            self.world.rank, socket.gethostname(), self.clock.now_in, _line(ours),
            _collective(waits),
        )  # fmt: skip


def _frames(frame: FrameType | None) -> Iterable[FrameType]:
    """Innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _line(frame: FrameType | None) -> str:
    if frame is None:
        return "outside this project"
    path = Path(frame.f_code.co_filename).resolve().relative_to(CODE)
    return f"{path}:{frame.f_lineno} in {frame.f_code.co_name}"


def _collective(waits: list[FrameType]) -> str | None:
    """The outermost call into torch's or DeepSpeed's communication, decorators left out."""
    names = [f.f_code.co_name for f in waits if f.f_code.co_name not in ("wrapper", "log_wrapper")]
    return names[-1] if names else None


def standings(folder: Path, *, since: float) -> list[Standing]:
    """What ranks wrote after `since` (seconds of the epoch), in rank order."""
    files = [f for f in sorted(folder.glob("rank-*.json")) if f.stat().st_mtime >= since]
    return [Standing(**json.loads(file.read_text(encoding="utf-8"))) for file in files]


def last_report(run: Path, *, since: float) -> Report | None:
    """What the watchdogs of a run wrote after `since`, None when they wrote nothing."""
    path = run / FOLDER / "report.json"
    if not path.exists() or path.stat().st_mtime < since:
        return None
    return Report(**json.loads(path.read_text(encoding="utf-8")))


def judge(found: list[Standing], hosts: list[str], seconds: float) -> Report:
    """Which ranks the others wait for, and why; `hosts` holds every rank's, in rank order."""
    silent = sorted(set(range(len(hosts))) - {s.rank for s in found})
    head = f"no progress for {seconds:.0f} s; "
    if silent:
        named = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in silent)
        others = f"; rank {found[0].rank} waits at {found[0].line}"
        return Report(
            "missing rank", silent, f"{head}missing rank: {named} does not answer{others}"
        )
    working = [s for s in found if s.collective is None]
    if working:
        kind = STALLS.get(working[0].phase, "stalled rank")
        at = "; ".join(f"rank {s.rank} on {s.host} stands at {s.line}" for s in working)
        return Report(kind, [s.rank for s in working], f"{head}{kind}: {at}")
    at = "; ".join(f"rank {s.rank} on {s.host} is in {s.collective} at {s.line}" for s in found)
    if len({(s.collective, s.line) for s in found}) == 1:
        return Report(
            "no connection", [s.rank for s in found],
            f"{head}no connection: all ranks wait in the same call and nothing passes; look at the "
            f"network between the hosts; {at}",
        )  # fmt: skip
    return Report(
        "mismatched collective", [s.rank for s in found], f"{head}mismatched collective: {at}"
    )
