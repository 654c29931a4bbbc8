"""B2's other half: do balanced steps learn what random steps learn?

    python -m benchmarks.balance_parity

Balancing puts packs of like cost into one step, so long documents meet long ones. The same packs
are trained on twice, once as the plan arranges them and once in random order, for each of several
seeds; the losses on held-out documents are compared with how far seeds lie apart. Documents are
Debian package records, one to ten to a document, up to 128 tokens, in steps of 8 packs. `EVEN`
is scaled from 32,768 to 128, so that costs differ as they do at 32k. Two runs
at a time; 10 minutes on two cores.
"""

import json
import os
import random
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import record
from tuneloom.config import build, compose
from tuneloom.data import balance
from tuneloom.train.config import TrainConfig
from tuneloom.train.feed import Feed
from tuneloom.train.loop import fit

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (0, 1)
LONGEST, GROUP, EPOCHS = 128, 8, 4
DOCUMENTS, HELD_OUT = 5_200, 200
WAYS = {"balanced": "true", "random": "false"}


def write_documents(folder: Path, count: int) -> None:
    """rows.jsonl and held_out.jsonl: documents of very different lengths."""
    lines = (ROOT / "examples/debian/packages.jsonl").read_text("utf-8").splitlines()
    packages = [json.loads(line) for line in lines]
    texts = [f"{p['package']}: {p['description']} ({p['section']})" for p in packages]
    draws = random.Random(0)
    documents = []
    for _ in range(count):
        size = min(10, max(1, round(draws.lognormvariate(0.0, 1.0))))
        documents.append(json.dumps({"text": "\n".join(draws.sample(texts, size))}))
    (folder / "held_out.jsonl").write_text("\n".join(documents[:HELD_OUT]) + "\n", "utf-8")
    (folder / "rows.jsonl").write_text("\n".join(documents[HELD_OUT:]) + "\n", "utf-8")


def train(folder: Path, way: str, seed: int) -> dict[str, Any]:
    """Held-out loss at the end, and the slowest over the mean pack of the steps, as trained."""
    name = f"{way}-{seed}"
    overrides = [
        "model=tiny_base", "model.dtype=fp32", f"model.path={ROOT / 'examples/tiny-base'}",
        "objective=pretrain", "tracker=off", "zero=stage0", f"seed={seed}",
        f"batch.balance={WAYS[way]}", f"epochs={EPOCHS}", "train.validate_every=50",
        f"data.path={folder}/rows.jsonl", f"data.validation={folder}/held_out.jsonl",
        f"batch.max_length={LONGEST}", f"batch.tokens={LONGEST}", f"batch.accumulation={GROUP}",
        "batch.over_length=truncate", "batch.max_lost_answer_tokens=1.0", "optim.lr=2e-3",
        "checkpoint.every=0", "train.drill=false", f"run.root={folder}", f"run.id={name}",
    ]  # fmt: skip
    costs: list[np.ndarray] = []

    def noted(feed: Feed) -> list[np.ndarray]:
        bins = next_step(feed)
        if bins and all(len(members) for members in bins):
            rows = np.concatenate(bins)
            lengths = np.zeros(rows.max() + 1, np.int64)
            lengths[rows] = feed.store.lengths(rows)
            costs.append(balance.costs_of(bins, lengths))
        return bins

    next_step = Feed.next_step
    with mock.patch.object(balance, "EVEN", LONGEST), mock.patch.object(Feed, "next_step", noted):
        mapping = compose("train", overrides)
        del mapping["launch"]
        fit(build(TrainConfig, mapping))
    rows = [json.loads(x) for x in (folder / name / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval/loss"] for row in rows if "eval/loss" in row]
    slowest = balance.straggling(np.concatenate(costs), GROUP)
    return {"eval_loss": losses[-1], "eval_losses": losses, "straggling": slowest,
            "steps": len(costs)}  # fmt: skip


def main() -> int:
    """All seeds both ways, and the verdict: is the gap inside what seeds make?"""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="balance-") as made:
        write_documents(Path(made), DOCUMENTS)
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            asked = [(way, pool.submit(train, Path(made), way, seed))
                     for seed in SEEDS for way in WAYS]  # fmt: skip
            for way, run in asked:
                found[way].append(run.result())
                print(way, found[way][-1], flush=True)
    losses = {way: [run["eval_loss"] for run in runs] for way, runs in found.items()}
    gaps = [a - b for a, b in zip(losses["balanced"], losses["random"], strict=True)]
    result = {
        "runs": found,
        "straggling": {w: statistics.mean(r["straggling"] for r in rs) for w, rs in found.items()},
        "eval_loss": {way: statistics.mean(values) for way, values in losses.items()},
        "mean_gap": statistics.mean(gaps),
        "gap_deviation": statistics.stdev(gaps),
        "seed_deviation": statistics.stdev(losses["random"]),
        "gap_share": statistics.mean(gaps) / statistics.mean(losses["random"]),
    }
    print(json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=1))
    print(record.write("balance_parity", result, seed=SEEDS[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
