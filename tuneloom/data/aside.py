"""The third pass: kept rows into the shards of their splits, the others into set_aside.parquet."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tuneloom.data.decide import Decision
from tuneloom.data.gather import Spill
from tuneloom.data.recipe import Recipe
from tuneloom.data.splits import SPLITS
from tuneloom.data.store import COLUMNS, ShardWriter

ASIDE = pa.schema([
    ("id", pa.string()), ("source", pa.string()), ("line", pa.int64()), ("fate", pa.string()),
    ("reason", pa.string()), ("kept", pa.string()), ("record", pa.string()), ("note", pa.string()),
    ("meta", pa.string()),
])  # fmt: skip
LENGTHS = (50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 50_000, 200_000, 1_000_000)
"""Characters a record, as the report counts them; no record is longer than a raw row may be."""


@dataclass
class Written:
    """What the manifest says of the shards."""

    splits: dict[str, Any]
    lengths: np.ndarray  # (len(LENGTHS),) int64


def write_rows(
    spill: Spill,
    draft: Path,
    decision: Decision,
    aside: pq.ParquetWriter,
    recipe: Recipe,
    ids: np.ndarray,
) -> Written:
    """Third pass: kept rows into the shards of their splits, the others into set_aside.parquet.

    ids: (N,) S64, of all unique rows; empty where no near-duplicates were looked for.
    """
    writers = {name: ShardWriter(draft, name, recipe.rows_per_shard) for name in SPLITS}
    lengths = np.zeros(len(LENGTHS), dtype=np.int64)
    start = 0
    for table in spill.unique():
        rows = slice(start, start + len(table))
        start += len(table)
        columns = table.select(COLUMNS)
        for code, writer in enumerate(writers.values()):
            writer.add(columns.filter(pa.array(decision.split[rows] == code)))
        kept_rows = table["record"].filter(pa.array(decision.fate[rows] == 0))
        lengths += lengths_of(kept_rows)
        for code in np.unique(decision.fate[rows]):
            kind, reason = decision.fates[code]
            if kind != "kept":
                chosen = decision.fate[rows] == code
                numbers = np.flatnonzero(chosen) + rows.start
                kept = _kept_instead(ids, decision.leader, numbers)
                part = table.filter(pa.array(chosen))
                stored = kind == "quarantined" and reason != "held_out"
                notes = [decision.notes.get(i) for i in numbers.tolist()]
                aside.write_table(aside_rows(part, kind, reason, kept, records=stored, notes=notes))
    return Written({name: writer.close() for name, writer in writers.items()}, lengths)


def lengths_of(records: pa.ChunkedArray) -> np.ndarray:
    """(len(LENGTHS),) int64: records up to each length and over the one before."""
    bins = np.searchsorted(LENGTHS[:-1], pc.utf8_length(records).to_numpy())
    return np.bincount(bins, minlength=len(LENGTHS))


def _kept_instead(ids: np.ndarray, leader: np.ndarray, rows: np.ndarray) -> list[str | None]:
    """Of each row the id of the row that was kept for it; None where that is itself."""
    kept: list[str | None] = [None] * len(rows)
    for place in np.flatnonzero(leader[rows] != rows).tolist():
        kept[place] = ids[leader[rows[place]]].decode()
    return kept


def aside_rows(
    table: pa.Table,
    fate: str,
    reason: str,
    kept: Any,
    *,
    records: bool,
    notes: list[str | None] | None = None,
) -> pa.Table:
    """Rows that are not in the dataset, as set_aside.parquet lists them.

    Where the record stands, so does its meta, which says whose it is: it may have to be erased.
    """
    count = len(table)
    columns = [
        table["id"], table["source"], table["line"], pa.array([fate] * count, pa.string()),
        pa.array([reason] * count, pa.string()),
        kept if isinstance(kept, pa.ChunkedArray) else pa.array(kept, pa.string()),
        table["record"] if records else pa.nulls(count, pa.string()),
        pa.array(notes or [None] * count, pa.string()),
        table["meta"] if records else pa.nulls(count, pa.string()),
    ]  # fmt: skip
    return pa.Table.from_arrays(columns, schema=ASIDE)
