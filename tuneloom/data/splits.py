"""Which split a row belongs to: by the hash of its key, balanced over labels if there are any."""

import hashlib

import numpy as np

from tuneloom.data.recipe import SplitConfig
from tuneloom.data.scratch import Column, Lowest, Scratch, buckets, slices

SPLITS = ("train", "validation", "test")


def mixed(keys: np.ndarray, split: SplitConfig) -> np.ndarray:
    """keys: (N,) uint64 -> (N,) uint64, every key another number, evenly spread."""
    salt = int.from_bytes(hashlib.sha256(f"split {split.seed}".encode()).digest()[:8], "big")
    number = keys ^ np.uint64(salt)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        number = (number ^ (number >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray(number ^ (number >> np.uint64(31)))


def place(numbers: np.ndarray) -> np.ndarray:
    """(N,) uint64 -> (N,) float64 in [0, 1): where each falls, on any machine."""
    return (numbers >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def place_of(text: str) -> float:
    """Where one text falls in [0, 1)."""
    number = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")
    return (number >> 11) / float(1 << 53)


CODES = np.array([2, 1, 0], dtype=np.int8)
"""Indices into SPLITS, in the order in which places are given to them."""


def assign(
    scratch: Scratch,
    keys: np.ndarray,
    labels: np.ndarray | None,
    kept: np.ndarray,
    split: SplitConfig,
) -> np.ndarray:
    """(N,) int8 index into SPLITS, -1 for a row that is not kept. Rows of one key share a split.

    keys: (N,) uint64; labels: (N,) int or None; kept: (N,) bool. Without labels a key's split
    depends on nothing but the key. With labels, the keys of each label are cut at exact shares of
    their order by hash; a key of two labels counts for the lesser.
    """
    found = scratch.array(len(keys), "i1", -1)
    if labels is not None:
        _assign_balanced(scratch, keys, labels, kept, split, found)
        return found
    for rows in slices(len(keys)):
        codes = CODES[np.searchsorted(_edges(split), place(mixed(keys[rows], split)), side="right")]
        found[rows] = np.where(kept[rows], codes, np.int8(-1))
    return found


def _edges(split: SplitConfig) -> np.ndarray:
    """(2,) where test ends, and validation."""
    return np.array([split.test, split.test + split.validation])


def _assign_balanced(
    scratch: Scratch,
    keys: np.ndarray,
    labels: np.ndarray,
    kept: np.ndarray,
    split: SplitConfig,
    found: np.ndarray,
) -> None:
    """Buckets come in the order of places: first each label's keys are counted, then numbered."""
    numbers = Column(scratch, "u8")
    for rows in slices(len(keys)):
        numbers.add(mixed(keys[rows], split))
    by_place = [numbers.whole(), kept, keys, labels]
    most = 1 + max((int(labels[rows].max()) for rows in slices(len(labels))), default=0)
    sizes = sum(
        (np.bincount(_label_of_keys(bucket).numbers, minlength=most)
         for bucket in buckets(scratch, *by_place)), np.zeros(most, np.int64),
    )  # fmt: skip
    before = np.zeros(most, np.int64)
    for bucket in buckets(scratch, *by_place):
        heads = _label_of_keys(bucket)
        own, counted = heads.numbers, np.bincount(heads.numbers, minlength=most)
        order = np.lexsort((place(mixed(heads.keys, split)), own))
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order)) - (np.cumsum(counted) - counted)[own[order]]
        quantile = (before[own] + rank + 0.5) / sizes[own]
        heads.numbers = CODES[np.searchsorted(_edges(split), quantile, side="right")]
        for numbered, _, key, _ in bucket:
            found[numbered] = heads.of(key)
        before += counted


def _label_of_keys(bucket: list[tuple[np.ndarray, ...]]) -> Lowest:
    """The least label of each key."""
    heads = Lowest("i4")
    for _, _, key, label in bucket:
        heads.add(key, label)
    return heads
