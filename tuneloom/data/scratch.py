"""Numbers of every row in mapped files, so that what grows with the rows is not process memory.

The kernel writes pages of a mapped file back and takes them when memory is short; what a process
must hold is a chunk. Files have no name: however the process ends, the disk is free again.
"""

import itertools
import mmap
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from tuneloom.errors import RefusedError

CHUNK = 1 << 18
"""Rows worked on at once: 2 MiB a column of numbers."""


def slices(count: int) -> Iterator[slice]:
    """All of `count` rows, a chunk at a time."""
    for start in range(0, count, CHUNK):
        yield slice(start, min(start + CHUNK, count))


class Scratch:
    """A folder for arrays that live as long as somebody holds them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def array(self, count: int, dtype: DTypeLike, fill: int = 0) -> np.ndarray:
        """(count,) of one value."""
        column = Column(self, dtype)
        for rows in slices(count):
            column.add(np.full(rows.stop - rows.start, fill, dtype))
        return column.whole()

    def numbers(self, count: int) -> np.ndarray:
        """(count,) int64: 0, 1, 2, ..."""
        column = Column(self, "i8")
        for rows in slices(count):
            column.add(np.arange(rows.start, rows.stop))
        return column.whole()


class Column:
    """An array that is written piece by piece: a full disk is an error here, not a dead process."""

    def __init__(self, scratch: Scratch, dtype: DTypeLike) -> None:
        self.folder, self.dtype, self.count = scratch.folder, np.dtype(dtype), 0
        self.file = tempfile.TemporaryFile(buffering=0, dir=scratch.folder)  # noqa: SIM115

    def add(self, piece: np.ndarray) -> None:
        """Append numbers."""
        left = memoryview(np.ascontiguousarray(piece, self.dtype).tobytes())
        try:
            while left:
                left = left[self.file.write(left) :]
        except OSError as error:
            raise RefusedError(
                f"{self.folder}: no room for the numbers of {self.count + len(piece):,} rows "
                f"({error.strerror}); free some, or set root to another disk"
            ) from None
        self.count += len(piece)

    def whole(self) -> np.ndarray:
        """All that was added, mapped and writable; a plain view, since memmap's own is slow."""
        with self.file:
            if not self.count:
                return np.empty(0, self.dtype)
            return np.memmap(self.file, self.dtype, "r+", shape=(self.count,)).view(np.ndarray)


def release(array: np.ndarray) -> None:
    """Let go of the pages of a mapped array that were looked at; the file keeps what they hold."""
    owner: Any = array
    while owner is not None and not isinstance(owner, mmap.mmap):
        owner = owner.base
    if owner is not None:
        owner.madvise(mmap.MADV_DONTNEED)


class Lowest:
    """The least number given for each key, so far."""

    def __init__(self, kind: str = "u8") -> None:
        self.keys, self.numbers = np.empty(0, np.uint64), np.empty(0, kind)

    def add(self, keys: np.ndarray, numbers: np.ndarray) -> None:
        """Take more keys, in any order, each any number of times."""
        keys, numbers = np.append(self.keys, keys), np.append(self.numbers, numbers)
        order = np.lexsort((numbers, keys))
        first = order[np.append(True, keys[order][1:] != keys[order][:-1])] if len(keys) else order
        self.keys, self.numbers = keys[first], numbers[first]

    def of(self, keys: np.ndarray) -> np.ndarray:
        """The number of each key; all of them were added."""
        return self.numbers[np.searchsorted(self.keys, keys)]


def buckets(
    scratch: Scratch, hashes: np.ndarray, wanted: np.ndarray, *columns: np.ndarray
) -> Iterator[list[tuple[np.ndarray, ...]]]:
    """Wanted rows, parted by their hash's first bits: rows of one hash are in one bucket.

    hashes: (N,) uint64, evenly spread; wanted: (N,) bool; columns: (N,) each. A bucket holds about
    a chunk of different hashes and comes in chunks, since one hash may be that of every row; a
    chunk is the rows' numbers, rising, and their hashes and columns.
    """
    bits = max(0, (len(hashes) - 1) // CHUNK).bit_length()
    if not bits:
        rows = np.flatnonzero(wanted)
        yield [(rows, hashes[rows], *(c[rows] for c in columns))] if len(rows) else []
        return
    sizes = np.zeros(1 << bits, np.int64)
    for part in slices(len(hashes)):
        sizes += np.bincount(_codes(hashes[part][wanted[part]], bits), minlength=1 << bits)
    ends = np.cumsum(sizes)
    free, carried = ends - sizes, (hashes, *columns)
    kinds = [np.dtype("i8"), *(column.dtype for column in carried)]
    grouped = [scratch.array(int(ends[-1]), kind) for kind in kinds]
    for part in slices(len(hashes)):
        chosen = np.flatnonzero(wanted[part])
        codes = _codes(hashes[part][chosen], bits)
        order = np.argsort(codes, kind="stable")
        codes, chosen = codes[order], chosen[order]
        here = np.bincount(codes, minlength=1 << bits)
        places = free[codes] + np.arange(len(codes)) - (np.cumsum(here) - here)[codes]
        for into, values in zip(
            grouped, (chosen + part.start, *(c[part][chosen] for c in carried)), strict=True
        ):
            into[places] = values
        free += here
    for start, end in itertools.pairwise([0, *ends.tolist()]):
        yield [tuple(g[start:end][rows] for g in grouped) for rows in slices(end - start)]


def _codes(hashes: np.ndarray, bits: int) -> np.ndarray:
    """The first `bits` bits of each hash."""
    return (hashes >> np.uint64(64 - bits)).astype(np.int64)
