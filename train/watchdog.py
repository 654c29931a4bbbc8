"""Hangs: when a rank makes no progress for `train.hang_seconds`, all stacks and one sentence, then
the end of the process, so that the launcher starts again from the newest checkpoint.

    runs/<id>/hang/beat-00001.json   where a rank stood a moment ago, while the run lasts
    runs/<id>/hang/rank-00001.txt    stacks of all threads of a rank
    runs/<id>/hang/flight_rank_1     on CUDA, its NCCL flight recorder: torchfrtrace --prefix
    runs/<id>/hang/nccl_ras.txt      on CUDA, what NCCL itself says of all communicators (`ncclras`)
    runs/<id>/hang/report.json       its kind, the ranks at fault, and the sentence that was printed

gloo says `timed out` after 30 minutes and not which rank was missed (measured, torch 2.13). A rank
that is stopped, or whose host is gone, writes nothing: that is how it is found, and its last beat
says where it stood. py-spy reads the stacks of a stopped one, where it runs on a host with another
that answers and the system allows it. Nothing here has met a GPU.

Start-up is watched from the moment the run is claimed. It has parts, that all ranks enter together,
and each may take longer than a step: see `STARTUP_SECONDS` and `READING_SECONDS`.
"""

import faulthandler
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from tuneloom.errors import TRAINING
from tuneloom.train.distributed import FLIGHT, World
from tuneloom.train.hangs import (
    FOLDER,
    Seen,
    Standing,
    judge,
    last_report,
    standings,
    write,
    written,
)
from tuneloom.train.metrics import Clock

PATIENCE_SECONDS = 3.0
"""How long the first rank that notices waits for the reports of the others."""
END_SECONDS = 10.0
"""A report that takes longer waits for a disk or a driver itself; then the process ends without."""
STARTUP_SECONDS = 300.0
"""What a part of start-up may take where `train.hang_seconds` is less: connecting, compiling."""
READING_SECONDS = 1800.0
"""The same for a part that downloads or reads the base, data or a checkpoint: 140 GB at 80 MB/s.
Who needs longer sets `train.hang_seconds` higher."""
SLOWEST_BEAT_SECONDS = 30.0
"""1,024 ranks then write 34 small files a second."""
COLLECTIVES = ("torch/distributed/distributed_c10d.py", "deepspeed/comm/")
CODE = Path(__file__).resolve().parents[1]


def collective_seconds(hang_seconds: int) -> int:
    """When a collective gives up by itself: later than any watchdog, which names who it waits
    for.
    """
    return int(max(hang_seconds, READING_SECONDS)) + 60


class Watchdog:
    """Two threads beside the loop. One watches: progress is any change of phase that the clock
    books. One writes beats, which a disk may hold up.
    """

    def __init__(
        self, folder: Path, world: World, clock: Clock, *, seconds: float, hosts: list[str],
        step: Callable[[], int],
    ) -> None:  # fmt: skip
        self.folder, self.world, self.clock = folder / FOLDER, world, clock
        self.seconds, self.hosts, self.step = seconds, hosts, step
        self.every = min(0.5, seconds / 8)
        self.beat_every = max(2 * self.every, min(SLOWEST_BEAT_SECONDS, seconds / 60))
        self.begin_part()
        self._loop = threading.get_ident()
        self._over = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True, name="beats")
        self._beats.start()
        self._ending = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._watcher.start()

    def begin_part(self, seconds: float = STARTUP_SECONDS) -> None:
        """Start-up goes on with a part that may take so long, or `self.seconds` where that is
        more.
        """
        self._part_seconds = max(seconds, self.seconds)
        self.clock.switch("startup")

    @property
    def limit(self) -> float:
        """Seconds that may pass without progress now."""
        return self._part_seconds if self.clock.now_in == "startup" else self.seconds

    def close(self) -> None:
        """Watch no longer; the beats of a rank that is done tell nothing."""
        if self._ending.is_set():  # the loop fell out of its collective, as a peer has left already
            self._watcher.join()  # it ends this process, with the code of a hang
        self._over.set()
        self._beats.join(PATIENCE_SECONDS)

    def _watch(self) -> None:
        seen, since = self.clock.changes, time.monotonic()
        while not self._over.wait(self.every):
            if self.clock.changes != seen:
                seen, since = self.clock.changes, time.monotonic()
            elif time.monotonic() - since > self.limit:
                self._end()

    def _beat(self) -> None:
        beat = self._file("beat", "json")
        while not self._over.is_set():
            with suppress(OSError):  # a full disk, or no run folder any more: the last beat stays
                self.folder.mkdir(exist_ok=True)
                write(beat, self._standing())
            self._over.wait(self.beat_every)
        with suppress(OSError):  # another rank's beat is there, or a report
            beat.unlink(missing_ok=True)
            self.folder.rmdir()

    def _end(self) -> None:
        """Report and leave; never returns."""
        self._ending.set()
        faulthandler.dump_traceback_later(END_SECONDS, exit=True, file=2)  # needs no interpreter
        limit, started = self.limit, time.time()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._file("rank", "txt").open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        write(self._file("rank", "json"), self._standing())
        reports = time.monotonic() + PATIENCE_SECONDS
        first = self.world.rank == min(self._living(), default=self.world.rank)
        if first:  # who reports does so before it asks the driver for anything
            keep_ras(self.folder, self.world)
        else:
            keep_flight(self.folder, self.world)
        self._keep_stacks_of_the_stopped()
        time.sleep(max(0.0, reports - time.monotonic()))
        found = standings(self.folder, since=started - limit)
        if found and found[0].rank == self.world.rank:
            self._report(found, limit)
        if first:
            keep_flight(self.folder, self.world)
        # Another may have noticed a moment later: it would not outlive this rank.
        while time.monotonic() < reports + PATIENCE_SECONDS:
            if last_report(self.folder.parent, since=started - limit):
                break
            time.sleep(0.1)
        sys.stdout.flush()
        time.sleep(0.5)  # the others read nothing more, the launcher reads the sentence
        os._exit(TRAINING)

    def _report(self, answered: list[Standing], limit: float) -> None:
        """What the ranks say, and the last beats of those that do not."""
        beats, ranks = self._last_beats(), {s.rank for s in answered}
        living = self._living()
        late = [seen.standing for rank, seen in beats.items() if rank in living - ranks]
        found = sorted([*answered, *late], key=lambda s: s.rank)
        report = judge(found, self.hosts, limit, beats)
        write(self.folder / "report.json", report)
        print(f"hang: {report.sentence}", flush=True)

    def _last_beats(self) -> dict[int, Seen]:
        """By rank; ages by the clock of the disk, as hosts may differ in theirs."""
        own = self._file("rank", "json")
        own.touch()
        now = own.stat().st_mtime
        beats = [Seen(standing, now - at) for standing, at in written(self.folder, "beat")]
        return {b.standing.rank: b for b in beats if b.standing.rank < self.world.size}

    def _living(self) -> set[int]:
        """Ranks with a beat of late: those that do not report wait for less long than this one."""
        beats = self._last_beats()
        return {rank for rank, beat in beats.items() if beat.seconds_ago < 3 * self.beat_every}

    def _keep_stacks_of_the_stopped(self) -> None:
        """Those of silent ranks on this host, kept by the lowest one here that lives."""
        spy = shutil.which("py-spy", path=f"{Path(sys.executable).parent}:{os.defpath}")
        host, living = socket.gethostname(), self._living()
        here = {r: s for r, s in self._last_beats().items() if s.standing.host == host}
        if spy is None or self.world.rank != min(living & here.keys(), default=self.world.rank):
            return
        for rank in sorted(here.keys() - living - {self.world.rank}):
            words = [spy, "dump", "--nonblocking", "--pid", str(here[rank].standing.pid)]
            path = self.folder / f"rank-{rank:05d}.txt"
            with path.open("w", encoding="utf-8") as file, suppress(subprocess.TimeoutExpired):
                subprocess.run(words, stdout=file, stderr=subprocess.DEVNULL, check=False,
                               timeout=PATIENCE_SECONDS / 2)  # fmt: skip
            if not path.stat().st_size:  # no such process, or not allowed
                path.unlink()

    def _file(self, kind: str, suffix: str) -> Path:
        return self.folder / f"{kind}-{self.world.rank:05d}.{suffix}"

    def _standing(self) -> Standing:
        frames = list(_frames(sys._current_frames().get(self._loop)))
        ours = next((f for f in frames if _is_ours(Path(f.f_code.co_filename))), None)
        waits = [f for f in frames if any(c in f.f_code.co_filename for c in COLLECTIVES)]
        return Standing(
            self.world.rank, socket.gethostname(), os.getpid(), self.step(), self.clock.now_in,
            _line(ours), _collective(waits),
        )  # fmt: skip


def keep_ras(folder: Path, world: World) -> None:
    """What NCCL's monitors of all ranks say (RAS, NCCL 2.24), where its client is on this host."""
    client = shutil.which("ncclras")
    if world.device.type != "cuda" or client is None:
        return
    path = folder / "nccl_ras.txt"
    with path.open("w", encoding="utf-8") as file, suppress(subprocess.TimeoutExpired):
        subprocess.run([client, "-v", "-t", f"{PATIENCE_SECONDS - 1:.0f}"], stdout=file,
                       stderr=file, check=False, timeout=PATIENCE_SECONDS)  # fmt: skip


def keep_flight(folder: Path, world: World) -> None:
    """What NCCL's flight recorder holds of this rank, in the file that torch would write after a
    time-out of its own.
    """
    library: Any = torch._C
    dump = getattr(library._distributed_c10d, "_dump_nccl_trace", None)
    if world.device.type == "cuda" and dump is not None:
        (folder / f"{FLIGHT}{world.rank}").write_bytes(dump())


def _frames(frame: FrameType | None) -> Iterable[FrameType]:
    """Innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_ours(path: Path) -> bool:
    """Of this project, and not of an environment that lies in its folder (`make install`)."""
    return CODE in path.parents and "site-packages" not in path.relative_to(CODE).parts


def _line(frame: FrameType | None) -> str:
    if frame is None:
        return "outside this project"
    path = Path(frame.f_code.co_filename).resolve().relative_to(CODE)
    return f"{path}:{frame.f_lineno} in {frame.f_code.co_name}"


def _collective(waits: list[FrameType]) -> str | None:
    """The outermost call into torch's or DeepSpeed's communication, decorators left out."""
    names = [f.f_code.co_name for f in waits if f.f_code.co_name not in ("wrapper", "log_wrapper")]
    return names[-1] if names else None
