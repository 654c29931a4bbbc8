"""F15: W&B refuses, never answers, answers 500, is lost in the middle of a run, or has a full disk;
no step waits for it and no row is lost.
"""

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tuneloom.errors import DONE
from tuneloom.launch.drill_lab import Figures, Lab, Run, figures
from tuneloom.launch.faults import tmpfs
from tuneloom.launch.wandb_server import Mode, Server, serving
from tuneloom.testing import free_port
from tuneloom.train.uploader import SYNC

TURNS = 3
WANDB_BYTES = 64 << 10
LOST_STEPS = 1000
"""Of the runs that lose their server: in half a minute it has taken rows, which needs some 5 s."""
Way = Callable[[], AbstractContextManager[str]]


def tracker_unreachable(lab: Lab, rng: random.Random) -> Iterator[Figures]:
    """Seconds are what the whole command took more than with tracker=offline."""
    ways: dict[str, Way] = {"refuses": _nobody, "never answers": _silent, "answers 500": _broken}
    yield from tracker_disk_full(lab, rng)
    for what, run, added, seconds in _against_offline(lab, ways):
        kept = _tracked(run.folder)
        yield figures(lab, run, "F15", f"W&B {what}; {kept} of {lab.steps} rows in its file; added "
                      f"{added}", [run.process.returncode], [DONE], lost=0, seconds=seconds,
                      held=kept == lab.steps)  # fmt: skip
    yield from tracker_lost(lab)


def tracker_lost(lab: Lab) -> Iterator[Figures]:
    """A server that takes rows of a run, and then nothing more until the run is over."""
    (lab.folder / "f15").mkdir()
    lab = Lab(lab.folder / "f15", steps=LOST_STEPS)
    counts: dict[str, tuple[int, int]] = {}

    def losing(what: str, mode: Mode) -> Way:
        @contextmanager
        def way() -> Iterator[str]:
            with serving() as server:
                server.after_rows = mode
                yield server.url
                counts[what] = _synced_later(lab, server)

        return way

    ends: dict[str, Mode] = {"answers 500": "fails", "never answers": "hangs"}
    ways = {what: losing(what, mode) for what, mode in ends.items()}
    for what, run, added, seconds in _against_offline(lab, ways):
        before, after = counts[what]
        row = (f"W&B {what} from the middle of a run on: {before} of {lab.steps} rows on the "
               f"server, {after} after `wandb sync`; added {added}")  # fmt: skip
        yield figures(lab, run, "F15", row, [run.process.returncode], [DONE], lost=0,
                      seconds=seconds, held=0 < before < after == lab.steps)  # fmt: skip


def _synced_later(lab: Lab, server: Server) -> tuple[int, int]:
    """Rows of its run on the server, before and after the sync that the run's last line names."""
    run = server.names[-1]
    before = _taken(server, run)
    server.mode = server.after_rows = "answers"
    (folder,) = (lab.folder / "runs" / run / "wandb").glob("offline-run-*")
    subprocess.run([*SYNC, str(folder)], env=_keys(server.url), check=True, capture_output=True)
    return before, _taken(server, run)


def _taken(server: Server, run: str) -> int:
    return len(
        {row["_step"] for row in server.history.get(run, {}).values() if "train/loss" in row}
    )


def _keys(url: str) -> dict[str, str]:
    keys = {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40, "OMP_NUM_THREADS": "1"}
    return os.environ | keys


def _against_offline(lab: Lab, ways: dict[str, Way]) -> Iterator[tuple[str, Run, str, float]]:
    """The last run of each way, and what it took more than offline ones: in words and in seconds,
    medians of runs that take turns.
    """
    offline: list[list[float]] = []
    spent: dict[str, list[list[float]]] = {what: [] for what in ways}
    last: dict[str, Run] = {}
    for turn in range(TURNS):
        offline.append(_phases(lab, f"f15-{turn}", "tracker=offline")[1])
        for what, server in ways.items():
            with server() as url:
                last[what], phases = _phases(
                    lab, f"f15-{what.replace(' ', '-')}-{turn}", "tracker=online",
                    environment=_keys(url),
                )  # fmt: skip
            spent[what].append(phases)
    usual = np.median(offline, axis=0)
    for what, run in last.items():
        start, steps, end = (np.median(spent[what], axis=0) - usual).tolist()
        added = (f"{start:+.1f} s to the first step, {steps:+.1f} s in all steps, {end:+.1f} s at "
                 f"the end, medians of {TURNS}")  # fmt: skip
        yield what, run, added, start + steps + end


def tracker_disk_full(lab: Lab, rng: random.Random) -> list[Figures]:
    """F15: a full disk under W&B's own files, and no other; then room again, and its rows."""
    folder = lab.folder / "runs" / "f15-full"
    folder.mkdir(parents=True)
    with tmpfs(folder / "wandb", WANDB_BYTES) as disk:
        run = Run(lab, folder.name, "tracker=offline")
        code, before = run.end(), _tracked(folder)
        said = "no row is lost" in run.log.read_text(errors="replace")
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        subprocess.run([sys.executable, "-m", "tuneloom.train.metrics", folder], check=True)
        after = _tracked(folder)
    what = (f"disk of W&B's files full; {before} of {lab.steps} rows in them, {after} after "
            "`python -m tuneloom.train.metrics`")  # fmt: skip
    return [figures(lab, run, "F15", what, [code], [DONE], lost=0,
                    held=said and before < after == lab.steps)]  # fmt: skip


def _phases(lab: Lab, run_id: str, *more: str, **options: Any) -> tuple[Run, list[float]]:
    """A whole run, and its seconds to the first row, from there to the last, and to the exit."""
    begun = time.time()
    run = Run(lab, run_id, *more, **options)
    run.end()
    ended, at = time.time(), [float(row["at"]) for row in run.rows()]
    return run, [at[0] - begun, at[-1] - at[0], ended - at[-1]]


def _tracked(run: Path) -> int:
    """Training rows in W&B's own file."""
    from tuneloom.train.tracker import rows_written

    return sum("train/loss" in row for row in rows_written(run))


@contextmanager
def _nobody() -> Iterator[str]:
    yield f"http://127.0.0.1:{free_port()}"


@contextmanager
def _silent() -> Iterator[str]:
    """Takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def _broken() -> Iterator[str]:
    with serving() as server:
        server.mode = "fails"
        yield server.url


FAULTS: dict[str, Callable[[Lab, random.Random], Iterable[Figures]]] = {"F15": tracker_unreachable}
