"""How much a run has to do: rows, tokens and steps, from a sample of its data; and its speed.

A speed is given (`plan.tokens_per_second`) or was measured by an earlier run with the same config
on as many devices of the same kind; none is ever made up.
"""

import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tuneloom.errors import DataError
from tuneloom.train import runs
from tuneloom.train.config import TrainConfig

SAMPLE = 256
"""Rows that are rendered, spread evenly over the split."""
FULL = 0.99
"""Share of a packed micro-batch that holds real tokens (best fit, measured on 100,000 lengths)."""
PACE = ("zero", "batch", "debug")
"""Of a config, what the digest leaves out in part, as it moves no loss, and decides the speed."""


@dataclass(frozen=True)
class Workload:
    """None means unknown, and `why` says what is missing."""

    rows: int | None
    tokens_per_row: float | None
    tokens: int | None
    """Real tokens of the whole run."""
    steps: int | None
    tokens_per_step: int
    why: str


@dataclass(frozen=True)
class Speed:
    tokens_per_second: float
    source: str


def workload(config: TrainConfig, *, ranks: int) -> Workload:
    """Rows, tokens and steps of this run; what cannot be known here stays None."""
    rows, mean, why = _measure(config)
    batch = config.batch
    shares = ranks // batch.sequence_parallel  # of a step's micro-batches
    typical = mean or batch.max_length
    full = round(_examples(config, typical) * typical * shares * batch.accumulation)
    by_epochs = None
    if config.epochs is not None and rows is not None and mean is not None:
        group = _examples(config, mean) * shares * batch.accumulation
        by_epochs = math.ceil(rows * config.epochs / group)
    known = [n for n in (config.steps, by_epochs) if n is not None]
    # Steps alone bound the run only where epochs do not, or are known too.
    steps = min(known) if known and (by_epochs is not None or config.epochs is None) else None
    tokens = None
    if steps is not None:
        tokens = steps * full
        if by_epochs is not None and steps == by_epochs and rows is not None and mean is not None:
            tokens = round(rows * mean * (config.epochs or 1))
    return Workload(rows, mean, tokens, steps, full, why)


def _examples(config: TrainConfig, mean: float) -> float:
    """Of a micro-batch: a pack is full, or has as many as it may."""
    from tuneloom.train.feed import frame_of

    batch = config.batch
    if not batch.packing:
        return batch.sequences
    frame = frame_of(config)
    most = frame.documents if frame else batch.documents
    full = batch.tokens * FULL / mean
    return full if most is None else min(full, most)


def _measure(config: TrainConfig) -> tuple[int | None, float | None, str]:
    """Rows of the split, mean tokens of a rendered one, or what is missing to know them."""
    from tuneloom.data.render import Renderer
    from tuneloom.data.rows import open_rows
    from tuneloom.data.tokenizer import load_tokenizer

    if not Path(config.data.path).exists():
        return None, None, f"data.path: {config.data.path} is not here yet"
    rows = open_rows(config.data.path, config.data.split, config.data.format, verify=False)
    picked = np.unique(np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).astype(np.int64))
    try:
        tokenizer = load_tokenizer(config.model.path, config.model.revision)
    except DataError:
        return len(rows), None, f"the tokenizer of {config.model.path} is not here"
    batch = config.batch
    renderer = Renderer(tokenizer, config.objective.kind, batch.max_length, "drop")
    records = [rows[int(i)] for i in picked]
    examples = renderer.render_many(records, [rows.where(int(i)) for i in picked])
    limit = batch.max_length
    lengths = [
        min(e.tokens, limit)
        for e in examples
        if e.tokens <= limit or batch.over_length == "truncate"
    ]
    if not lengths:
        raise DataError(
            f"batch.max_length: all {len(picked)} sampled rows of {config.data.path} are longer "
            f"than {limit} tokens; raise it, or set batch.over_length=truncate"
        )
    kept = round(len(rows) * len(lengths) / len(picked))
    return kept, statistics.fmean(lengths), f"a sample of {len(picked)} rows"


def speed(config: TrainConfig, *, given: float | None, ranks: int, device: str) -> Speed | None:
    """Real tokens a second of all ranks: the figure given, or the newest run with this config on as
    many devices of this kind.
    """
    if given is not None:
        return Speed(given, "plan.tokens_per_second")
    digest, ours = runs.digest(config), runs.plain(config)
    found = sorted(Path(config.run.root).glob("*/run.json"), key=lambda p: -p.stat().st_mtime)
    for record in found:
        facts = runs.recorded(record.parent)
        if facts.get("config_digest") != digest or facts.get("world_size") != ranks:
            continue
        if not same_kind(str(facts.get("device")), device):
            continue
        if any(facts["config"].get(key) != ours[key] for key in PACE):
            continue
        rate = _measured(record.parent / "metrics.jsonl")
        if rate is not None:
            return Speed(rate, f"run {record.parent.name}")
    return None


def same_kind(measured: str, planned: str) -> bool:
    """Whether a run's device, as torch names it, is a plan's: nvidia-smi's name, CPU, or such as
    `a100-40`.
    """
    if measured.lower() == planned.lower():
        return True
    words = re.findall(r"[a-z0-9]+", measured.lower())
    kind, _, size = planned.partition("-")
    sizes = [word for word in words if re.fullmatch(r"\d+gb", word)]
    return kind.removeprefix("rtx") in words and sizes in ([], [f"{size}gb"])


def _measured(metrics: Path) -> float | None:
    """Median of the last 50 steps' speed."""
    from tuneloom.train.metrics import row_of

    if not metrics.exists():
        return None
    lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    rates = [row.get("speed/tokens_per_second") for row in map(row_of, lines) if row]
    known = [rate for rate in rates if isinstance(rate, int | float) and rate > 0]
    return statistics.median(known[-50:]) if known else None
