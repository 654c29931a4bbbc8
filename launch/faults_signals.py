"""F5 counted: SIGTERM seventy times to ranks of real runs, in each phase, and forty times to the
driver; all ranks save the same step, end 75.

The two ranks of the seventy are processes that train one run after another, so that all these runs
cost the imports of one. The forty are commands as they are typed.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneloom.errors import STOPPED, Stopped
from tuneloom.launch.drill_lab import EVERY, Figures, Lab, Run
from tuneloom.testing import Gang, chat_rows, small_config
from tuneloom.train import checkpoint
from tuneloom.train.metrics import Clock

TRIALS = 10
"""Of each way."""
SKEW_SECONDS = 5.0
STAY_SECONDS = 0.05
SHOWN = "TUNELOOM_DRILL_PHASES"
"""Names the folder where drill and ranks agree on a phase to be struck in."""
GRACE_SECONDS = 30.0


@dataclass
class Trial:
    """A run at work on both ranks of a gang."""

    gang: Gang
    folder: Path
    rng: random.Random
    inside: int = 0
    """The rank that is in the phase waited for, of phases that ranks show."""

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Every millisecond; AssertionError after two minutes or when a rank ended by itself."""
        deadline = time.monotonic() + 120.0
        while not ready():
            assert time.monotonic() < deadline and self.running(0), f"{self.folder} did not come on"
            time.sleep(0.001)

    def running(self, rank: int) -> bool:
        return not self.gang.pipes[rank].poll()

    def strike(self, rank: int) -> None:
        """SIGTERM, unless the rank has left its run already."""
        if self.running(rank):
            os.kill(int(self.gang.processes[rank].pid or 0), signal.SIGTERM)

    def in_phase(self, phase: str) -> None:
        """Wait until the run is there, then up to half a second more where it stays there."""
        if phase in ("data", "evaluation"):
            self._inside(phase)
            return
        marks = {"warm-up": "run.json", "a save": "checkpoints/.torn-step-*"}
        mark = marks.get(phase, "metrics.jsonl")
        self.wait_for(lambda: any(self.folder.glob(mark)))
        if phase == "steps":  # forward, backward, optimizer: wherever it falls
            time.sleep(self.rng.random() / 2)

    def _inside(self, phase: str) -> None:
        """Wait until a rank is in that phase, which it stays in for 50 ms."""
        self.wait_for((self.folder / "metrics.jsonl").exists)
        place = Path(os.environ[SHOWN])
        asked = place / f"asked-{phase}"
        for left in place.glob("in-*"):  # of a rank that came in while it was taken back
            left.unlink()
        asked.touch()
        self.wait_for(lambda: any(place.glob(f"in-{phase}-*")))
        self.inside = int(next(place.glob(f"in-{phase}-*")).name[-1])
        asked.unlink()


def phases_shown() -> None:
    """In a rank: stay in a phase that is asked for, and say so."""
    place = Path(os.environ[SHOWN])
    switch = Clock.switch

    def shown(clock: Clock, phase: str) -> str:
        ended = switch(clock, phase)
        if (place / f"asked-{phase}").exists():
            (place / f"in-{phase}-{os.environ['RANK']}").touch()
            time.sleep(STAY_SECONDS)
        return ended

    setattr(Clock, "switch", shown)  # noqa: B010 - mypy takes no method of that name


def one_rank(trial: Trial) -> None:
    trial.strike(trial.rng.randrange(2))


def the_one_inside(trial: Trial) -> None:
    trial.strike(trial.inside)


def both_apart(trial: Trial) -> None:
    first = trial.rng.randrange(2)
    trial.strike(first)
    time.sleep(trial.rng.random() * SKEW_SECONDS)
    trial.strike(1 - first)


def both_twice(trial: Trial) -> None:
    for _ in range(2):
        trial.strike(0)
        trial.strike(1)
        time.sleep(0.02)


WAYS: list[tuple[str, Callable[[Trial], None], str]] = [
    ("to one rank in warm-up", one_rank, "warm-up"), ("to one rank in steps", one_rank, "steps"),
    ("to a rank reading data", the_one_inside, "data"),
    ("to a rank in an evaluation", the_one_inside, "evaluation"),
    ("to one rank in a save", one_rank, "a save"),
    ("to both, 0 to 5 s apart", both_apart, "steps"), ("to both, twice", both_twice, "steps"),
]  # fmt: skip


def seventy_times(lab: Lab, rng: random.Random) -> list[Figures]:
    """Each way ten times; `held` when every one was as it should be."""
    chat_rows(lab.folder / "validation.jsonl", 16, seed=1)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # inherited: a late signal ends no rank
    os.environ[SHOWN] = str(lab.folder)
    gang = Gang(2, setup=phases_shown)
    signal.signal(signal.SIGTERM, before)
    good: Counter[str] = Counter()
    slowest = 0.0
    try:
        for number in range(TRIALS):
            for place, (way, strike, phase) in enumerate(WAYS):
                trial = Trial(gang, lab.folder / "runs" / f"f5-{number}-{place}", rng)
                fault, seconds = stopped(lab, trial, strike, phase)
                good[way] += fault is None
                slowest = max(slowest, seconds)
                if fault:
                    print(f"drill: SIGTERM {way}: {fault}", flush=True)
    finally:
        gang.close()
        del os.environ[SHOWN]
    counts = ", ".join(f"{way} {good[way]} of {TRIALS}" for way, _, _ in WAYS)
    what = f"SIGTERM, all ranks save the same step and end 75: {counts}; seconds of the slowest"
    return [Figures("F5", what, str(STOPPED), 0, slowest, 0, 0, 0,
                    good.total() == TRIALS * len(WAYS))]  # fmt: skip


def stopped(
    lab: Lab, trial: Trial, strike: Callable[[Trial], None], phase: str
) -> tuple[str | None, float]:
    """Train, strike, wait; what was wrong, None when nothing, and how long it took."""
    config = small_config(
        lab.folder, trial.folder.name, steps=1_000_000, epochs=1e6, zero__stage=2,
        checkpoint__every=20, train__validate_every=7,
        data__validation=str(lab.folder / "validation.jsonl"),
    )  # fmt: skip
    for pipe in trial.gang.pipes:
        pipe.send(config)
    trial.in_phase(phase)
    struck = time.monotonic()
    strike(trial)
    outcomes: list[Any] = []
    for pipe in trial.gang.pipes:
        if not pipe.poll(GRACE_SECONDS):
            return f"a rank did not end in {GRACE_SECONDS:.0f} s", GRACE_SECONDS
        outcomes.append(pipe.recv())
    seconds = time.monotonic() - struck
    if not all(isinstance(outcome, Stopped) for outcome in outcomes):
        return f"the ranks ended with {outcomes}", seconds
    found = checkpoint.newest(trial.folder / "checkpoints")
    said = {str(outcome) for outcome in outcomes}
    if found is None or len(said) != 1 or f"after step {found.step} " not in said.pop():
        return f"the ranks said {[str(o) for o in outcomes]}, saved was {found}", seconds
    return None, seconds


def _starting(run: Run, _: random.Random) -> None:
    run.wait_for(run.ranks, "ranks")


def _stepping(run: Run, rng: random.Random) -> None:
    run.wait_for_step(rng.randrange(1, 3 * EVERY))
    time.sleep(rng.random() / 10)


def _saving(run: Run, _: random.Random) -> None:
    run.wait_for_step(EVERY - 1)
    run.wait_for_save()


DRIVER_WAYS: list[tuple[str, Callable[[Run, random.Random], None], int]] = [
    ("while ranks start", _starting, 1), ("in steps", _stepping, 1), ("in a save", _saving, 1),
    ("in a save, twice", _saving, 2),
]  # fmt: skip
"""What is waited for, and how many signals follow."""


def forty_times(lab: Lab, rng: random.Random) -> list[Figures]:
    """The command's own process is struck; `held` when each ended 75 with its last step saved."""
    good: Counter[str] = Counter()
    slowest, left = 0.0, 0
    for number in range(TRIALS):
        for place, (way, ready, signals) in enumerate(DRIVER_WAYS):
            run = Run(lab, f"f5-driver-{number}-{place}")
            ready(run, rng)
            struck = time.monotonic()
            for _ in range(signals):
                run.process.terminate()
                time.sleep(0.3)
            code = run.end()
            slowest = max(slowest, time.monotonic() - struck)
            saved = checkpoint.newest(run.folder / "checkpoints")
            kept = saved.step if saved else 0
            good[way] += code == STOPPED and kept == run.step
            left = max(left, lab.orphans())
            if code != STOPPED or kept != run.step:
                print(f"drill: {way}: exit {code}, step {kept} saved of {run.step}", flush=True)
    counts = ", ".join(f"{way} {good[way]} of {TRIALS}" for way, _, _ in DRIVER_WAYS)
    what = (
        f"SIGTERM to the driver, its last step saved and exit 75: {counts}; seconds of the slowest"
    )
    held = good.total() == TRIALS * len(DRIVER_WAYS) and not left
    return [Figures("F5", what, str(STOPPED), 0, slowest, 0, 0, left, held)]


FAULTS: dict[str, Callable[[Lab, random.Random], Iterable[Figures]]] = {
    "F5x70": seventy_times, "F5x40": forty_times,
}  # fmt: skip
