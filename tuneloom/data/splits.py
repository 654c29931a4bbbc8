"""Which split a row belongs to: by the hash of its key, balanced over labels if there are any."""

import hashlib

import numpy as np

from tuneloom.data.recipe import SplitConfig

SPLITS = ("train", "validation", "test")


def place(keys: np.ndarray, split: SplitConfig) -> np.ndarray:
    """keys: (N,) uint64 -> (N,) float64 in [0, 1): where each key falls, on any machine."""
    salt = int.from_bytes(hashlib.sha256(f"split {split.seed}".encode()).digest()[:8], "big")
    mixed = keys ^ np.uint64(salt)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def place_of(text: str) -> float:
    """Where one text falls in [0, 1)."""
    number = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")
    return (number >> 11) / float(1 << 53)


def assign(keys: np.ndarray, labels: np.ndarray | None, split: SplitConfig) -> np.ndarray:
    """(N,) int8 index into SPLITS. Rows of one key always share a split.

    Without labels a key's split depends on nothing but the key. With labels (N,) int, the keys of
    each label are cut at exact shares of their order by hash; a key of two labels counts for the
    lesser.
    """
    position = place(keys, split)
    edges = np.array([split.test, split.test + split.validation])
    codes = np.array([2, 1, 0], dtype=np.int8)
    if labels is None:
        return codes[np.searchsorted(edges, position, side="right")]
    order = np.lexsort((labels, keys))
    first = np.ones(len(keys), dtype=bool)
    first[1:] = keys[order][1:] != keys[order][:-1]
    group_of_row = np.empty(len(keys), dtype=np.int64)
    group_of_row[order] = np.cumsum(first) - 1
    heads = order[first]
    group_label, group_position = labels[heads], position[heads]
    by_label = np.lexsort((group_position, group_label))
    sorted_labels = group_label[by_label]
    starts = np.searchsorted(sorted_labels, sorted_labels, side="left")
    sizes = np.searchsorted(sorted_labels, sorted_labels, side="right") - starts
    rank = np.arange(len(by_label)) - starts
    quantile = (rank + 0.5) / sizes
    group_code = np.empty(len(heads), dtype=np.int8)
    group_code[by_label] = codes[np.searchsorted(edges, quantile, side="right")]
    return group_code[group_of_row]
