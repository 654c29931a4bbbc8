"""F12 twenty times: a rank that is stopped, in another collective, or stands in its data or in a
save; each time the report names the rank, or both of a mismatch, and the kind, in time.

Two ranks as torchrun starts them, which end with their report; struck by `launch.injected`.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tuneloom.errors import TRAINING
from tuneloom.launch.drill_lab import EVERY, Figures, Lab
from tuneloom.launch.faults_inside import Pair

TRIALS = 5
"""Of each way."""
SMALL_SECONDS = 3
"""`train.hang_seconds` of these runs."""
GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Way:
    """A hang: its name here and in `launch.injected`, and the kind that the report must give."""

    what: str
    fault: str
    kind: str


WAYS = [
    Way("a rank stopped", "stopped", "missing rank"),
    Way("a rank in another collective", "crossed", "mismatched collective"),
    Way("a rank standing in its data", "data", "data stall"),
    Way("a rank standing in a save", "save", "save stall"),
]


def twenty_times(lab: Lab, rng: random.Random) -> list[Figures]:
    """Each way five times; `held` when every report was right and in time."""
    good: Counter[str] = Counter()
    slowest = 0.0
    for number in range(TRIALS):
        for way in WAYS:
            fault, seconds = hung(lab, way, f"f12-{way.fault}-{number}", rng)
            good[way.what] += fault is None
            slowest = max(slowest, seconds)
            if fault:
                print(f"drill: {way.what}: {fault}", flush=True)
    counts = ", ".join(f"{way.what} {good[way.what]} of {TRIALS}" for way in WAYS)
    most = SMALL_SECONDS + GRACE_SECONDS
    what = (f"hangs, train.hang_seconds={SMALL_SECONDS}, rank and kind named within {most:.0f} s: "
            f"{counts}; seconds of the slowest report")  # fmt: skip
    return [Figures("F12", what, str(TRAINING), None, slowest, 0, 0, lab.orphans(),
                    good.total() == TRIALS * len(WAYS))]  # fmt: skip


def hung(lab: Lab, way: Way, run_id: str, rng: random.Random) -> tuple[str | None, float]:
    """Train, hang, wait for the report; what was wrong, and its seconds since the last step."""
    victim, at = rng.randrange(2), rng.randrange(EVERY + 2, 2 * EVERY)
    run = Pair(lab, run_id, way.fault, victim, at, f"train.hang_seconds={SMALL_SECONDS}")
    pair = (run.process, run.peer)
    report = run.folder / "hang/report.json"
    deadline = time.monotonic() + 120.0
    while not report.exists() and time.monotonic() < deadline and None in [p.poll() for p in pair]:
        time.sleep(0.05)
    if way.fault == "stopped":  # it never ends by itself, and its peer would crash at its end
        pair[1 - victim].wait(60)
        pair[victim].kill()
    codes = [process.wait(60) for process in pair]
    if not report.exists():
        return f"no report; exit codes {codes}", 0.0
    seconds = report.stat().st_mtime - float(run.rows()[-1]["at"])
    said = json.loads(report.read_text(encoding="utf-8"))
    ranks = [0, 1] if way.fault == "crossed" else [victim]
    if (said["kind"], said["ranks"]) != (way.kind, ranks):
        return f"rank {victim}, the report says {said['sentence']}", seconds
    late = seconds > SMALL_SECONDS + GRACE_SECONDS
    survivors = [
        code for rank, code in enumerate(codes) if way.fault != "stopped" or rank != victim
    ]
    if late or set(survivors) != {TRAINING}:
        return f"the report after {seconds:.1f} s, exit codes {codes}", seconds
    return None, seconds


FAULTS: dict[str, Callable[[Lab, random.Random], Iterable[Figures]]] = {"F12x20": twenty_times}
