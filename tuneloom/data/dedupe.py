"""Near-duplicates: MinHash over word shingles, bands to find candidates, clusters by union-find.

Signatures are made where rows are prepared, in every process; banding runs over the kept rows in
the order of their ids, so the clusters are the same for any number of processes.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from tuneloom.config import Config
from tuneloom.data.scratch import Column, Lowest, Scratch, buckets, release, slices
from tuneloom.errors import ConfigError

PERMUTATIONS = 128
SEED = 20261
WORD = re.compile(r"\w+")


class NearConfig(Config):
    action: Literal["off", "drop", "group"] = "off"
    """`drop` keeps the most trusted row of a cluster; `group` keeps all of it in one split."""
    threshold: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.8
    """Jaccard similarity of word shingles from which two rows are near-duplicates."""
    shingle: Annotated[int, Field(ge=1, le=16)] = 5
    """Words a shingle."""
    engine: Literal["rensa", "datasketch"] = "rensa"
    """rensa is Rust; datasketch is the pure Python fallback, about 20 times slower."""


def shingles(text: str, size: int) -> list[str]:
    """Runs of `size` lower-case words; of a shorter text the whole."""
    words = WORD.findall(text.lower())
    if len(words) <= size:
        return [" ".join(words)]
    return [" ".join(words[i : i + size]) for i in range(len(words) - size + 1)]


def signature(text: str, config: NearConfig) -> bytes:
    """128 little-endian uint32 (512 bytes)."""
    tokens = shingles(text, config.shingle)
    if config.engine == "rensa":
        sketch = _rensa()(num_perm=PERMUTATIONS, seed=SEED)
        sketch.update(tokens)
        return np.array(sketch.digest(), dtype="<u4").tobytes()
    sketch = _datasketch()(num_perm=PERMUTATIONS, seed=SEED)
    sketch.update_batch([token.encode("utf-8") for token in tokens])
    return np.asarray(sketch.hashvalues, dtype="<u4").tobytes()


def _rensa() -> Any:
    try:
        from rensa import RMinHash
    except ImportError:
        raise ConfigError(
            "data.near.engine: rensa is not installed; pip install 'tuneloom[data]'"
        ) from None
    return RMinHash


def _datasketch() -> Any:
    try:
        from datasketch import MinHash
    except ImportError:
        raise ConfigError(
            "data.near.engine: datasketch is not installed; pip install 'tuneloom[data]'"
        ) from None
    return MinHash


def rows_a_band(threshold: float) -> int:
    """The widest bands that still find a pair at the threshold with 99 % probability."""
    fitting = [
        width
        for width in range(1, 33)
        if 1.0 - (1.0 - threshold**width) ** (PERMUTATIONS // width) >= 0.99
    ]
    return max(fitting, default=1)


def clusters(
    scratch: Scratch,
    signatures: np.ndarray,
    rank: np.ndarray,
    kept: np.ndarray,
    config: NearConfig,
) -> np.ndarray:
    """(N,) int64: of each row the row that stands for its cluster; its own index where it has none.

    signatures: (N, 128) uint32, may be mapped; rank: (N,) int, the smallest stands for its cluster,
    then the first; kept: (N,) bool, other rows are in no cluster. Within a band's bucket every row
    is compared with the bucket's first and with the one before it.
    """
    parent = scratch.numbers(len(signatures))
    bands = _bands(scratch, signatures, rows_a_band(config.threshold))
    while bands:
        for bucket in buckets(scratch, bands.pop(), kept):
            for left, right in _candidates(bucket):
                for a, b in _similar(signatures, left, right, config.threshold):
                    _union(parent, a, b)
        release(signatures)
    _flatten(parent)
    return _leaders(scratch, parent, rank)


def _bands(scratch: Scratch, signatures: np.ndarray, width: int) -> list[np.ndarray]:
    """Of each band (N,) uint64, made in one pass over the signatures."""
    columns = [Column(scratch, "u8") for _ in range(PERMUTATIONS // width)]
    for rows in slices(len(signatures)):
        for band, column in enumerate(columns):
            hashes = np.zeros(rows.stop - rows.start, dtype=np.uint64)
            for place in range(band * width, (band + 1) * width):
                hashes = (hashes ^ signatures[rows, place]) * np.uint64(0x9E3779B97F4A7C15)
                hashes ^= hashes >> np.uint64(29)
            column.add(hashes)
        release(signatures)
    return [column.whole() for column in columns]


def _candidates(
    bucket: list[tuple[np.ndarray, ...]],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each row with the row of its hash before it, and with the first, over chunks of a bucket."""
    if len(bucket) == 1:
        yield from _candidates_of_one(*bucket[0])
        return
    firsts, lasts = Lowest("i8"), Lowest("i8")
    for rows, hashes in bucket:
        # What earlier chunks know of a hash goes before its rows here: at most one row of each.
        known = np.isin(lasts.keys, hashes)
        rows = np.append(-lasts.numbers[known], rows)
        hashes = np.append(lasts.keys[known], hashes)
        firsts.add(hashes, rows)
        lasts.add(hashes, -rows)
        order = np.argsort(hashes, kind="stable")
        later = np.flatnonzero(np.append(False, hashes[order][1:] == hashes[order][:-1]))
        left = rows[order[later]]
        yield left, rows[order[later - 1]]
        yield left, firsts.of(hashes[order[later]])


def _candidates_of_one(
    rows: np.ndarray, hashes: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same of a bucket in one piece, as most are: one sort does."""
    order = np.argsort(hashes, kind="stable")
    fresh = np.append(True, hashes[order][1:] != hashes[order][:-1])
    later, rows = np.flatnonzero(~fresh), rows[order]
    first = np.maximum.accumulate(np.where(fresh, np.arange(len(order)), 0))
    yield rows[later], rows[later - 1]
    yield rows[later], rows[first[later]]


def _flatten(parent: np.ndarray) -> None:
    """Every row's parent becomes its root; parents come first, so one pass over the rows does."""
    for rows in slices(len(parent)):
        roots = parent[rows]
        while (parent[roots] != roots).any():
            roots = parent[roots]
        parent[rows] = roots


def _leaders(scratch: Scratch, roots: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """(N,) int64: of each row's tree the row of the smallest rank, and of those the first."""
    count = len(roots)
    least = scratch.array(count, "i8", np.iinfo(np.int64).max)
    best = scratch.array(count, "i8", count)
    for rows in slices(count):
        np.minimum.at(least, roots[rows], rank[rows].astype(np.int64))
    for rows in slices(count):
        chosen = np.flatnonzero(rank[rows] == least[roots[rows]])
        np.minimum.at(best, roots[rows][chosen], chosen + rows.start)
    for rows in slices(count):
        least[rows] = best[roots[rows]]
    return least


def _similar(
    signatures: np.ndarray, left: np.ndarray, right: np.ndarray, threshold: float
) -> Iterable[tuple[int, int]]:
    """Pairs whose signatures agree in at least `threshold` of 128 places, 10,000 at a time."""
    for start in range(0, len(left), 10_000):
        a, b = left[start : start + 10_000], right[start : start + 10_000]
        agree = (signatures[a] == signatures[b]).mean(axis=1) >= threshold
        yield from zip(a[agree].tolist(), b[agree].tolist(), strict=True)


def _root(parent: np.ndarray, row: int) -> int:
    """The root of a row's tree, whose path is shortened on the way."""
    while parent[row] != row:
        parent[row] = parent[parent[row]]
        row = int(parent[row])
    return row


def _union(parent: np.ndarray, a: int, b: int) -> None:
    """Join two trees under the smaller root, so that the order of pairs does not show."""
    low, high = sorted((_root(parent, a), _root(parent, b)))
    parent[high] = low
