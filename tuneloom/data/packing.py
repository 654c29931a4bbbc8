"""Best-fit-decreasing packing on the histogram of lengths: examples into packs of a budget.

Equal lengths are placed in groups: a group either fills a group of bins that have exactly that
room left, or the tightest that fit. A bit mask of the rooms in use answers "tightest room of at
least v" in one big-integer operation, so 100,000 lengths take tens of milliseconds.
"""

from dataclasses import dataclass, field

import numpy as np


def pack(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Bins of indices into `lengths`, each bin's sum at most `budget`; every index exactly once.

    Deterministic: equal lengths keep their order. Lengths: int, 1 to budget.
    """
    lengths = np.asarray(lengths, np.int64)
    if not len(lengths):
        return []
    assert lengths.min() > 0 and lengths.max() <= budget, (lengths.min(), lengths.max(), budget)
    order = np.argsort(-lengths, kind="stable")
    bins = _place(*np.unique(-lengths[order], return_counts=True), budget)
    by_bin = np.argsort(bins, kind="stable")
    cuts = np.flatnonzero(np.diff(bins[by_bin])) + 1
    return [np.sort(members) for members in np.split(order[by_bin], cuts)]


def split(bins: list[np.ndarray], most: int | None) -> list[np.ndarray]:
    """The same bins, those of more than `most` members in even parts."""
    if most is None:
        return bins
    return [part for b in bins for part in np.array_split(b, -(-len(b) // most))]


@dataclass
class _Open:
    """Open bins as ranges (first, last + 1), stacked by the room they have left."""

    ranges: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    mask: int = 0  # bit r is set when some bin has exactly r tokens of room

    def add(self, room: int, first: int, last: int) -> None:
        if room:
            self.ranges.setdefault(room, []).append((first, last))
            self.mask |= 1 << room

    def take(self, length: int, count: int) -> tuple[int, int, int] | None:
        """Up to `count` bins of the tightest room that holds `length`: (room, first, last + 1)."""
        fitting = self.mask >> length
        if not fitting:
            return None
        room = (fitting & -fitting).bit_length() - 1 + length
        first, last = self.ranges[room].pop()
        if last - first > count:
            self.ranges[room].append((first + count, last))
            last = first + count
        elif not self.ranges[room]:
            self.mask &= ~(1 << room)
        return room, first, last


def _place(negated: np.ndarray, counts: np.ndarray, budget: int) -> np.ndarray:
    """Bin number of each example, examples in decreasing length."""
    bins = np.empty(int(counts.sum()), np.int64)
    opened, at, used = _Open(), 0, 0
    for length, count in zip((-negated).tolist(), counts.tolist(), strict=True):
        while count:
            found = opened.take(length, count)
            if found is None:
                break
            room, first, last = found
            bins[at : at + last - first] = np.arange(first, last)
            opened.add(room - length, first, last)
            at, count = at + last - first, count - (last - first)
        each = budget // length
        fresh = used + np.arange(count) // each
        bins[at : at + count] = fresh
        full, rest = divmod(count, each)
        if full:
            opened.add(budget - each * length, used, used + full)
        if rest:
            opened.add(budget - rest * length, used + full, used + full + 1)
        at, used = at + count, used + full + bool(rest)
    return bins
