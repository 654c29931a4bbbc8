"""Intervals and tests for a proportion, and for two proportions or losses on the same rows."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054
"""The 97.5th percentile of the normal distribution: 95 % two-sided."""
RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(correct: int, n: int) -> Interval:
    """Wilson's score interval (1927): right near 0 and 1, where the normal one is not."""
    if n == 0:
        raise ValueError("wilson: no rows were scored, so there is no proportion")
    share, square = correct / n, Z95 * Z95
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = Z95 / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def paired_difference(base: NDArray[np.bool_], tuned: NDArray[np.bool_]) -> Interval:
    """tuned - base on the same rows, by Newcombe's method 10 (Stat. Med. 17, 1998, 2635-2650).

    It corrects for the correlation of the pairs, and holds up where one side is at 0 or at 1.
    """
    n = len(base)
    before, after = wilson(int(base.sum()), n), wilson(int(tuned.sum()), n)
    both = int((base & tuned).sum())
    neither = int((~base & ~tuned).sum())
    only_base, only_tuned = int((base & ~tuned).sum()), int((~base & tuned).sum())
    margins = (both + only_base) * (only_tuned + neither) * (both + only_tuned)
    margins *= only_base + neither
    phi = 0.0
    if margins:
        product: float = both * neither - only_base * only_tuned
        if product > 0:
            product = max(product - n / 2, 0)
        phi = product / math.sqrt(margins)
    value = after.value - before.value
    below = _span(after.value - after.low, before.high - before.value, phi)
    above = _span(after.high - after.value, before.value - before.low, phi)
    return Interval(value, max(-1.0, value - below), min(1.0, value + above))


def _span(one: float, other: float, phi: float) -> float:
    """Length of the sum of two correlated half-widths."""
    return math.sqrt(max(0.0, one * one - 2 * phi * one * other + other * other))


def mcnemar(only_base: int, only_tuned: int) -> float:
    """Exact two-sided p of McNemar's test: a fair coin for each row on which the two differ."""
    n, few = only_base + only_tuned, min(only_base, only_tuned)
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(few + 1))
    return min(1.0, float(2 * tail / (1 << n)) if n < 1000 else _normal_p(only_base, only_tuned))


def _normal_p(only_base: int, only_tuned: int) -> float:
    """McNemar with continuity correction; from 1,000 differing rows on it equals the exact one."""
    n = only_base + only_tuned
    return math.erfc(max(0.0, abs(only_base - only_tuned) - 1) / math.sqrt(2 * n))


def paired_loss_difference(
    base: NDArray[np.float64],
    tuned: NDArray[np.float64],
    tokens: NDArray[np.int64],
    *,
    seed: int,
) -> Interval:
    """tuned - base loss per target token, by a paired bootstrap over rows.

    base, tuned: (N,) summed loss a row; tokens: (N,) target tokens a row.
    """
    gain = tuned - base  # (N,)
    generator = np.random.default_rng(seed)
    n = len(gain)
    values = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, 100):  # 100 x N indices at a time
        index = generator.integers(0, n, size=(100, n))
        values[start : start + 100] = gain[index].sum(1) / tokens[index].sum(1)
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(gain.sum() / tokens.sum()), float(low), float(high))
