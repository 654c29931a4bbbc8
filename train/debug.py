"""`debug=true`: at most 20 steps with anomalies named, then "safe to scale" or why not.

tuneloom train launch=inline debug=true ... is one process in which a debugger works.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tuneloom.errors import TrainingError

STEPS = 20


@contextmanager
def anomalies_named() -> Iterator[None]:
    """A NaN in backward ends the run with the operation that made it; torch prints where in
    forward that was called. Twice as slow, hence only here.
    """
    try:
        with torch.autograd.detect_anomaly(check_nan=True):
            yield
    except RuntimeError as error:
        if "nan values" not in str(error):
            raise
        raise TrainingError(
            f"debug: {str(error).rstrip('.')}; torch's warning above shows the line of forward"
        ) from error


def verdict(folder: Path) -> str:
    """The last line of a debug run that went through; raises TrainingError with what it saw."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "train/loss" in row][-STEPS:]
    losses, skipped = [row["train/loss"] for row in rows], sum(row["train/skipped"] for row in rows)
    if skipped:
        raise TrainingError(
            f"debug: not safe to scale: {skipped} of {len(losses)} steps had gradients that were "
            "not finite; lower optim.lr, or set model.dtype=bf16"
        )
    quarter = max(1, len(losses) // 4)
    first, last = sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter
    if last >= first:
        raise TrainingError(
            f"debug: not safe to scale: loss went from {first:.4f} to {last:.4f} in {len(losses)} "
            "steps; look at optim.lr, optim.warmup_steps and `tuneloom inspect`"
        )
    return f"safe to scale: {len(losses)} steps, loss {first:.4f} -> {last:.4f}, nothing skipped"
