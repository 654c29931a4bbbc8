"""How many rows are packed and put in order together: the rows of one window.

A window loses about half the spread of its packs' costs, once, however long it is: long windows
balance ranks, short ones let the first step begin early. So the window that is chosen for you
begins with two steps, doubles, and ends at 64. It follows from lengths in the stream and from the
micro-batches of a step, never from the number of ranks.
"""

import numpy as np

PROBED = 512
"""Rows whose mean length decides the first window, which is at least this long."""
FIRST_STEPS, STEPS = 2, 64
"""Steps of the first window and of a full-grown one."""
LEAST, MOST = 4096, 1 << 20
"""Bounds of a full-grown window, in rows: enough to pack well, and soon planned."""


def given(window: int, index: int) -> int:
    """Rows of window `index` where `batch.window` is a number W. The first three are W/8, W/4 and
    W/2 long, so that the first step does not wait for a whole window to be tokenised."""
    return max(1, window >> max(0, 3 - index))


def first(lengths: np.ndarray, capacity: int) -> int:
    """Rows of the first chosen window; `lengths`: its first rows', `capacity`: tokens of a step."""
    return min(MOST, max(PROBED, FIRST_STEPS * _of_a_step(lengths, capacity)))


def following(width: int, lengths: np.ndarray, capacity: int) -> int:
    """Rows of the window after one of `width` rows with these lengths."""
    grown = min(MOST, max(LEAST, STEPS * _of_a_step(lengths, capacity)))
    return min(2 * width, grown)


def _of_a_step(lengths: np.ndarray, capacity: int) -> int:
    """Rows that fill a step at the mean of `lengths` (0: dropped); 1 where all are dropped.

    In integers, so that every machine finds the same.
    """
    total = int(lengths.astype(np.int64).sum())
    return -(-capacity * len(lengths) // total) if total else 1
