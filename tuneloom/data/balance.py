"""Which micro-batches share a step, so that no rank waits long for the slowest one.

Packs of equal tokens differ in cost, because attention grows with the square of a document's
length: dealt at random to 64 ranks, packs of 32k tokens lose 46 % of the time to waiting. Inside a
window, bins of like cost are put in one step, and the dearest wait for more of their like: once,
and while windows grow; where random order loses little anyway, it stays random.
"""

import numpy as np

EVEN = 32_768
"""Tokens at which a document's attention costs as much as its linear layers: 4N / (7 * layers *
width) is 32,700 for LoRA on Llama-3-8B. Others have other numbers (5,900 for Qwen3-0.6B), and the
same order: full packs are ranked by the sum of their squared lengths, whatever it is. It decides
where random order loses less than TOLERATED, and their waiting is benchmarks/packing.py's."""
TOLERATED = 1.02
"""Slowest over mean rank time below which the order stays random."""


def costs_of(bins: list[np.ndarray], lengths: np.ndarray) -> np.ndarray:
    """Time of every pack in units of a token's linear layers: (bins,) float64.

    Summed in integers: the same bits on every machine. No bin may be empty.
    """
    sizes = lengths[np.concatenate(bins)].astype(np.int64)
    starts = np.cumsum([0, *(len(members) for members in bins[:-1])])
    return np.add.reduceat(sizes * (EVEN + sizes), starts) / EVEN


def straggling(costs: np.ndarray, group: int) -> float:
    """Slowest over mean, if consecutive `group` bins run side by side; 1.0 loses nothing."""
    whole = len(costs) // group * group
    if not whole:
        return 1.0
    steps = costs[:whole].reshape(-1, group)
    return float(steps.max(axis=1).sum() / steps.mean(axis=1).sum())


def dearest(
    costs: np.ndarray, free: np.ndarray, group: int, phase: int, generator: np.random.Generator
) -> np.ndarray:
    """Bins that are better sent in the next window, of those `free` to wait: indices.

    They are the bins beyond the last whole step and those of one step more: costs are far apart
    there, and half as far once the next window's join them. None where order stays random; at
    least one step is left.
    """
    steps = (phase + len(costs)) // group
    if not steps or straggling(generator.permutation(costs), group) <= TOLERATED:
        return np.empty(0, np.int64)
    sent = max(1, steps - 1) * group - phase
    ranked = np.argsort(-costs, kind="stable")
    return ranked[free[ranked]][: len(costs) - sent]


def arrange(
    costs: np.ndarray, group: int, phase: int, generator: np.random.Generator
) -> np.ndarray:
    """Order of the bins of a window: a permutation of range(len(costs)).

    `phase` bins of the current step were sent by the window before. The bins that finish that step,
    and those that begin the one after the last whole step, are the cheapest: they differ least.
    """
    order = generator.permutation(len(costs))
    if straggling(costs[order], group) <= TOLERATED:
        return order
    ranked = order[np.argsort(costs[order], kind="stable")]
    head = min(-phase % group, len(ranked))
    tail = (len(ranked) - head) % group
    steps = ranked[head + tail :].reshape(-1, group)
    steps = generator.permuted(generator.permutation(steps), axis=1)
    return np.concatenate([ranked[:head], steps.ravel(), ranked[head : head + tail]])
