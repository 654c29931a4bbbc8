"""How many flipped labels are found in real rows, and how much of what is suspected was flipped.

    python -m benchmarks.labels

400 labels of the 8,000 rows of examples/debian, flipped anew with each seed; needs the extra
`labels`.
"""

from __future__ import annotations

import json
import random
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from tuneloom.data.labels import LabelIssuesConfig, find_issues

ROWS = Path(__file__).parents[1] / "examples/debian/packages.jsonl"
FLIPPED = 400
SEEDS = (0, 1, 2)
ODDS = (0.05, 0.02)


def measure(rows: list[dict[str, str]], seed: int, odds: float) -> dict[str, Any]:
    """Flip, suspect, compare."""
    rng = random.Random(seed)
    names = sorted({row["section"] for row in rows})
    truth = np.array([names.index(row["section"]) for row in rows], dtype=np.int32)
    labels, flipped = truth.copy(), rng.sample(range(len(rows)), FLIPPED)
    for row in flipped:
        labels[row] = rng.choice([n for n in range(len(names)) if n != truth[row]])

    def inputs(wanted: np.ndarray) -> list[str]:
        return [f"{rows[i]['package']}: {rows[i]['description']}" for i in wanted]

    config = LabelIssuesConfig(action="list", max_odds=odds)
    begun = time.process_time()
    suspected = find_issues(np.arange(len(rows)), labels, names, inputs, config).rows
    seconds = time.process_time() - begun
    found = int((labels[suspected] != truth[suspected]).sum())
    return {
        "seed": seed, "max_odds": odds, "flipped": FLIPPED, "suspected": len(suspected),
        "found": found, "recall": found / FLIPPED, "precision": found / len(suspected),
        "cpu_ms_per_row": 1000 * seconds / len(rows),
    }  # fmt: skip


def peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    lines = ROWS.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    before = peak_kib()
    runs = [measure(rows, seed, odds) for odds in ODDS for seed in SEEDS]
    grown = (peak_kib() - before) / len(rows)  # libraries, imported meanwhile, included
    for run in runs:
        print(
            f"max_odds {run['max_odds']}, seed {run['seed']}: {run['found']} of {FLIPPED} found "
            f"({run['recall']:.0%}), {run['precision']:.0%} of {run['suspected']} suspected right, "
            f"{run['cpu_ms_per_row']:.1f} ms a row"
        )
    print(f"peak memory grew by {grown:.1f} KiB a row")
    result = {"rows": len(rows), "runs": runs, "grown_kib_per_row": grown}
    print(record.write("labels", result, seed=SEEDS[0]))


if __name__ == "__main__":
    main()
