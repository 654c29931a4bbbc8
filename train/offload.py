"""Inputs of recomputed layers in host memory: between a layer's forward and its backward the device
holds nothing of it.

Copies run on the stream that computes, so they are ordered and not hidden behind it.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MOVED: Counter[str] = Counter()
"""Inputs and bytes that went to the host since `MOVED.clear()`; effects.json is written from it."""


def checkpoint_on_host(layer: Callable[..., Any], hidden: Tensor, *rest: Any) -> Any:
    """`layer(hidden, *rest)`, recomputed in backward from a copy of `hidden` in host memory.

    torch.autograd.graph.save_on_cpu would not do: checkpoints hold their arguments, not saved
    tensors.
    """
    parked = _Parked(hidden)
    del hidden

    def run(*rest: Any) -> Any:
        return layer(parked.take(), *rest)

    return checkpoint(run, *rest, use_reentrant=False)


class _Parked:
    """A tensor for two uses: the live one first, then its copy."""

    def __init__(self, live: Tensor) -> None:
        self._live: Tensor | None = live
        self._device, self._wants_gradient = live.device, live.requires_grad
        pinned = live.device.type == "cuda"
        self._copy = torch.empty(live.shape, dtype=live.dtype, device="cpu", pin_memory=pinned)
        self._copy.copy_(live.detach(), non_blocking=True)
        MOVED["inputs"] += 1
        MOVED["bytes"] += live.numel() * live.element_size()

    def take(self) -> Tensor:
        if self._live is not None:
            live, self._live = self._live, None
            return live
        back = self._copy.to(self._device, non_blocking=True).detach()
        return back.requires_grad_(self._wants_gradient)
