"""Loss spikes: a step whose loss stands far out of the last steps is named.

Robust z-score, in logarithms: (log x - median) / (1.4826 x MAD) over the last 64 steps, so that one
spike does not hide the next, as it would in a mean, and a new level is one after half of them.
Logarithms make it relative: a loss that has fallen to 0.01 spikes at 0.1. Upwards only. The norm of
the gradient is not judged: healthy runs of small batches reach 10 deviations (measured).
"""

import math
from collections import deque
from statistics import median

WINDOW = 64
"""Steps that a step is compared with; nothing is judged before so many were seen."""
LEAST = 0.01
"""Smallest spread in logarithms: where a loss hardly moves, 1 % either way is nothing."""


class Spikes:
    """Names the steps that stand out by more than `z`; 0 names none. Begins anew with a resume."""

    def __init__(self, z: float) -> None:
        self.z = z
        self._seen: deque[float] = deque(maxlen=WINDOW)

    def note(self, step: int, loss: float) -> dict[str, float]:
        """`train/spike`, the z of a step that spiked, which is also said; else nothing."""
        if not (self.z and math.isfinite(loss) and loss > 0):
            return {}  # not finite: refused and counted elsewhere (train.max_bad_steps)
        z = score(math.log(loss), self._seen) if len(self._seen) == WINDOW else 0.0
        self._seen.append(math.log(loss))
        if z <= self.z:
            return {}
        print(
            f"spike: step {step}: loss {loss:.3f} stands {z:.0f} deviations above the last "
            f"{WINDOW} steps; its rows are in exposure/",
            flush=True,
        )
        return {"train/spike": round(z, 3)}


def score(value: float, seen: deque[float]) -> float:
    """How many robust standard deviations `value` stands above the median of `seen`."""
    middle = median(seen)
    spread = 1.4826 * median(abs(one - middle) for one in seen)
    return (value - middle) / max(spread, LEAST)
