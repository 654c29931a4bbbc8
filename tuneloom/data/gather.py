"""Prepared blocks merged on disk into unique rows in the order of their ids, in little memory.

Each block is one Arrow file of 256 batches, by the first byte of the id. The same few batches of
all blocks are read together and sorted, and of equal ids the most trusted source's first line is
kept.
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from tuneloom.data.questions import asked_and_answered

BATCHES = 256
RANGE_BYTES = 32 << 20
IN_ORDER = [
    ("id", "ascending"),
    ("rank", "ascending"),
    ("source", "ascending"),
    ("line", "ascending"),
]


class Spill:
    """The rows of one ingest on disk: blocks as they were prepared, then ranges of unique rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def block(self, number: int) -> Path:
        """Where a block's file lies."""
        return self.folder / f"block-{number:07d}.arrow"

    def ranges(self) -> Iterator[pa.Table]:
        """All rows, one range of ids after the other, each in order."""
        files = [pa.OSFile(str(path)) for path in sorted(self.folder.glob("block-*.arrow"))]
        readers = [pa.ipc.open_file(file) for file in files]
        size = sum(file.size() for file in files)
        count = min(BATCHES, max(1, math.ceil(size / RANGE_BYTES)))
        edges = [i * BATCHES // count for i in range(count + 1)]
        for first, last in itertools.pairwise(edges):
            batches = [reader.get_batch(i) for reader in readers for i in range(first, last)]
            table = pa.Table.from_batches(batches).combine_chunks()
            yield table.take(pc.sort_indices(table, sort_keys=IN_ORDER))

    def keep(self, number: int, table: pa.Table) -> None:
        """Write a range of unique rows for the second pass."""
        path = self.folder / f"unique-{number:07d}.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table.combine_chunks())

    def questions(self, rows: np.ndarray) -> list[str]:
        """The input side of some unique rows, which are numbered from 0 in their order."""
        found: list[str] = []
        start = 0
        for table in self.unique():
            here = rows[(rows >= start) & (rows < start + len(table))]
            records = table["record"].take(pa.array(here - start)).to_pylist()
            found += [asked_and_answered(orjson.loads(record))[0] for record in records]
            start += len(table)
        return found

    def unique(self) -> Iterator[pa.Table]:
        """The ranges that were kept, in order."""
        for path in sorted(self.folder.glob("unique-*.arrow")):
            with pa.OSFile(str(path)) as file:
                yield pa.ipc.open_file(file).read_all()


def write_block(path: Path, table: pa.Table) -> None:
    """A table that is sorted by id, as 256 batches."""
    digits = pc.utf8_slice_codeunits(table["id"], 0, 2).to_pylist()
    prefixes = np.array([int(pair, 16) for pair in digits], dtype=np.int64)
    cuts = np.searchsorted(prefixes, np.arange(BATCHES + 1))
    whole = table.combine_chunks().to_batches()
    batch = whole[0] if whole else pa.RecordBatch.from_pylist([], schema=table.schema)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        for start, end in itertools.pairwise(cuts.tolist()):
            writer.write_batch(batch.slice(start, end - start))


def first_of_each(table: pa.Table) -> np.ndarray:
    """(N,) bool: True where a sorted table's id is not the one above it."""
    ids = table["id"].combine_chunks()
    fresh = np.ones(len(ids), dtype=bool)
    if len(ids) > 1:
        fresh[1:] = pc.not_equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
    return fresh
