"""What was trained on: rows for labels and baseline, ids for the check of the scored rows."""

import json
from pathlib import Path

from tuneloom.data.records import Format
from tuneloom.data.rows import Rows, open_rows
from tuneloom.errors import DataError
from tuneloom.evals.tasks import Row, as_row, choose

MOST_ROWS = 50_000
"""Rows drawn for labels and baseline: more make logistic regression slow and hardly better."""


def open_training(data: str, train: str | None, *, format: Format) -> Rows | None:
    """The rows of `train` (a split of `data`, or a file); None where nobody knows which those are.

    Without `train`, a dataset folder's split `train` counts as what was trained on.
    """
    if train is not None and Path(train).is_file():
        return open_rows(train, format=format)
    split = train or "train"
    if not _has_split(data, split):
        if train is None:
            return None
        raise DataError(
            f"data.train: {train!r} is no file and no split of {data}; "
            "name the rows that were trained on, or leave it out"
        )
    return open_rows(data, split=split, format=format)


def drawn(rows: Rows | None, *, seed: int) -> list[Row]:
    """Training rows to learn labels and the baseline from: all, or as many as are useful."""
    if rows is None:
        return []
    return [as_row(rows[i]) for i in choose(len(rows), limit=MOST_ROWS, seed=seed)]


def count_seen(scored: set[str], *, run: Path | None, rows: Rows | None) -> int | None:
    """How many of the scored ids were trained on; None where nobody knows.

    exposure.parquet, the run's own record of each row of each step, goes before the split's ids.
    """
    exposure = run / "exposure.parquet" if run is not None else None
    if exposure is not None and exposure.exists():
        import pyarrow.parquet as pq

        ids = pq.read_table(exposure, columns=["record_id"])["record_id"].unique().to_pylist()
        return len(scored & set(ids))
    if rows is None:
        return None
    return len({rows[i].id for i in range(len(rows))} & scored)


def _has_split(path: str, split: str) -> bool:
    manifest = Path(path, "manifest.json")
    return manifest.exists() and split in json.loads(manifest.read_text("utf-8"))["splits"]
