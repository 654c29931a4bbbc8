"""Prepared blocks merged on disk into unique rows in the order of their ids, in little memory.

Each block is one Arrow file, a run of rows sorted by id. The rows of one range of ids are taken
from all runs and sorted, and of equal ids the most trusted source's first line is kept. Ranges are
cut so that each holds about RANGE_BYTES, and runs that are too many to open for every range are
first joined into longer ones, so neither memory nor open files grow with the input.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from tuneloom.data.questions import asked_and_answered

RANGE_BYTES = 48 << 20
FAN_IN = 512
"""Runs beyond which they are joined first; opening one takes as long as sorting 500 rows."""
MAPPED = 16
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
        return self.folder / f"block-{number:09d}.arrow"

    def ranges(self) -> Iterator[pa.Table]:
        """All rows, one range of ids after the other, each in order."""
        runs = sorted(self.folder.glob("block-*.arrow"))
        if len(runs) > FAN_IN:
            runs = [self._join(runs, group) for group in _groups(runs)]
        count = -(-sum(run.stat().st_size for run in runs) // RANGE_BYTES)
        edges = [f"{(i << 64) // count:016x}".encode() for i in range(count)]
        for first, last in itertools.pairwise([*edges, b"g"]):  # no id begins with g
            yield _sorted(runs, first, last)

    def _join(self, runs: list[Path], group: slice) -> Path:
        """Several runs as one file, in place of the first."""
        chosen = runs[group]
        write_run(chosen[0], _sorted(chosen, b"", b"g"))
        for run in chosen[1:]:
            run.unlink()
        return chosen[0]

    def keep(self, number: int, table: pa.Table) -> None:
        """Write a range of unique rows for the second pass."""
        write_run(self.folder / f"unique-{number:07d}.arrow", table)

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


def write_run(path: Path, table: pa.Table) -> None:
    """A table that is sorted by id, as one batch."""
    fresh = path.with_suffix(".new")  # the run that stood there may be mapped, and part of `table`
    with pa.OSFile(str(fresh), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    fresh.rename(path)


def _groups(runs: Sequence[Path]) -> Iterator[slice]:
    """Neighbours that together fill a range."""
    start, size = 0, 0
    for number, run in enumerate(runs):
        size += run.stat().st_size
        if size >= RANGE_BYTES or number == len(runs) - 1:
            yield slice(start, number + 1)
            start, size = number + 1, 0


def _rows_between(run: Path, first: bytes, last: bytes) -> pa.Table:
    """The rows of a run with first <= id < last; only their pages of the file are read."""
    with pa.memory_map(str(run)) as file:
        table = pa.ipc.open_file(file).read_all()
    if not len(table):
        return table
    ids = np.frombuffer(table["id"].chunk(0).buffers()[2], "S64")  # 64 hex digits each
    start, end = np.searchsorted(ids, np.array([first, last], "S64"))
    return table.slice(start, end - start)


def _sorted(runs: list[Path], first: bytes, last: bytes) -> pa.Table:
    """The rows of several runs with first <= id < last in one chunk, in order.

    Few runs are mapped at once: Linux maps 64 KiB around every page that is touched, which for 250
    runs came to 500 MiB.
    """
    parts = []
    for start in range(0, len(runs), MAPPED):
        group = [_rows_between(run, first, last) for run in runs[start : start + MAPPED]]
        parts.append(pa.concat_tables(group).combine_chunks())  # a copy
    table = pa.concat_tables(parts).combine_chunks()
    del parts
    return table.take(pc.sort_indices(table, sort_keys=IN_ORDER))


def first_of_each(table: pa.Table) -> np.ndarray:
    """(N,) bool: True where a sorted table's id is not the one above it."""
    ids = table["id"].combine_chunks()
    fresh = np.ones(len(ids), dtype=bool)
    if len(ids) > 1:
        fresh[1:] = pc.not_equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
    return fresh
