"""Learning rate as a pure function of the step and of how far the run is, in [0, 1].

Progress, not a step count, drives the decay: with streamed tokenising nobody knows at step 1 how
many packs an epoch will make, but rows consumed over rows to come is known exactly.
"""

import math

from tuneloom.train.config import OptimConfig


def lr_at(step: int, progress: float, optim: OptimConfig) -> float:
    """Factor on the base learning rate at `step` (0-based), in [0, 1].

    constant: 1. linear, cosine: from 1 to min_lr_ratio over the run. wsd: 1, then linear to
    min_lr_ratio over the last decay_fraction (arXiv 2404.06395). All after a linear warm-up.
    """
    warmup = min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else 1.0
    return warmup * _decay(min(max(progress, 0.0), 1.0), optim)


def _decay(progress: float, optim: OptimConfig) -> float:
    low = optim.min_lr_ratio
    if optim.schedule == "linear":
        return 1.0 - (1.0 - low) * progress
    if optim.schedule == "cosine":
        return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress))
    if optim.schedule == "wsd" and optim.decay_fraction:
        into = (progress - (1.0 - optim.decay_fraction)) / optim.decay_fraction
        return 1.0 - (1.0 - low) * min(max(into, 0.0), 1.0)
    return 1.0
