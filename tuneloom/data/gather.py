"""Prepared blocks merged on disk into unique rows in the order of their ids, in little memory.

Each block is one Arrow file sorted by id. A range of ids is read from all of them at once (memory
maps, no copy), sorted, and of equal ids the first source and line is kept.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

RANGE_BYTES = 96 << 20
SHARED = [("id", "ascending"), ("source", "ascending"), ("line", "ascending")]


class Spill:
    """The prepared blocks of one ingest on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes = 0
        self.files: list[Path] = []

    def add(self, number: int, table: pa.Table) -> None:
        """Write one block's rows, which are sorted by id."""
        path = self.folder / f"block-{number:07d}.arrow"
        write(path, table)
        self.files.append(path)
        self.bytes += table.nbytes

    def keep(self, number: int, table: pa.Table) -> pa.Table:
        """Write a range of unique rows; returns it as a table over the memory map."""
        path = self.folder / f"unique-{number:07d}.arrow"
        write(path, table)
        return read(path)

    def ranges(self) -> Iterator[pa.Table]:
        """All rows, one range of ids after the other, each sorted by id, source, line."""
        tables = [read(path) for path in self.files]
        starts = [prefixes(table) for table in tables]
        count = max(1, math.ceil(self.bytes / RANGE_BYTES))
        edges = [int(i * (1 << 64) / count) for i in range(1, count)]
        cuts = [
            [0, *np.searchsorted(s, np.array(edges, np.uint64)).tolist(), len(s)] for s in starts
        ]
        for i in range(count):
            parts = [t.slice(c[i], c[i + 1] - c[i]) for t, c in zip(tables, cuts, strict=True)]
            joined = pa.concat_tables(parts)
            yield joined.take(pc.sort_indices(joined, sort_keys=SHARED))


def write(path: Path, table: pa.Table) -> None:
    """A table as one Arrow file of one batch."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def read(path: Path) -> pa.Table:
    """An Arrow file as a table over the memory map."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def prefixes(table: pa.Table) -> np.ndarray:
    """(N,) uint64: the first 16 hex digits of each id, in the table's order."""
    short = pc.utf8_slice_codeunits(table["id"], 0, 16).to_pylist()
    return np.array([int(digits, 16) for digits in short], dtype=np.uint64)


def first_of_each(table: pa.Table) -> np.ndarray:
    """(N,) bool: True where a sorted table's id is not the one above it."""
    ids = table["id"].combine_chunks()
    fresh = np.ones(len(ids), dtype=bool)
    if len(ids) > 1:
        fresh[1:] = pc.not_equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
    return fresh
