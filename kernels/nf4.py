"""NF4 weights as matrices, each made while the one before it is used.

    main stream | wait for W_1 in A | y = x W_1^T | wait for W_2 in B | y = x W_2^T | ...
    side stream | after the last use of B: W_2 | after the last use of A: W_3 | ...

bitsandbytes unpacks a weight on the stream that multiplies by it, so the product waits. Each
micro-batch asks for the same weights in the same order, forward then backward: `Prefetch` remembers
what followed each ask and unpacks that one next, on a GPU on a stream of its own, on a CPU at once
(same order, same buffers, no gain). Two buffers of the largest weight take turns (117 MB each for
an 8B MLP in bf16).

A wrong guess (the first batch after a validation, a cut micro-batch) costs what no guess costs: the
weight is unpacked where it is used, in memory of its own, and the new order is remembered. A matrix
holds until the next one is asked for: callers multiply by it and keep nothing of it for backward,
which asks again.

Block constants of doubly quantised weights are unpacked into memory that the side stream allocates:
it returns to that stream's own pool and is reused in its order. The buffers are marked as used by
it, so that their memory is not given away while a weight is still written. NF4: arXiv 2305.14314.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, cuda, nn

Turn = Literal["forward", "backward"]
PREFETCH = "_tuneloom_prefetch"
"""Attribute of an NF4 weight whose network has a `Prefetch`."""


def matrix(weight: Tensor, turn: Turn) -> Tensor:
    """A packed weight as (O, D) in the dtype it was quantised from, valid until the next call."""
    prefetch: Prefetch | None = getattr(weight, PREFETCH, None)
    return unpack(weight) if prefetch is None else prefetch.matrix(weight, turn)


def unpack(weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Dequantise on the current stream, into `out` (O, D) if given."""
    from bitsandbytes.functional import dequantize_4bit

    state: Any = weight
    if out is None or not out.is_cuda:  # bitsandbytes 0.50.2 writes into `out` on a GPU only
        fresh: Tensor = dequantize_4bit(weight.detach(), state.quant_state)
        return fresh if out is None else out.copy_(fresh)
    dequantize_4bit(weight.detach(), state.quant_state, out=out)
    return out


@dataclass(frozen=True)
class Ahead:
    """A weight that was unpacked before it was asked for."""

    weight: Tensor
    version: int
    address: int
    state: Any
    slot: int
    matrix: Tensor
    """(O, D), in the buffer of that slot."""
    ready: Any
    """Event of the side stream behind the last write; None on a CPU."""

    def holds(self, weight: Tensor) -> bool:
        """Whether it is this weight, and as it was then."""
        same = self.weight is weight and self.version == weight._version
        return same and self.address == weight.data_ptr() and self.state is _state(weight)


class Prefetch:
    """Two buffers in which the NF4 weights of one network take turns."""

    def __init__(self, weights: Sequence[Tensor], *, side: Any = None) -> None:
        """`weights` in the order of a forward pass, as a first guess; `side`: a GPU's stream."""
        (device,) = {weight.device for weight in weights}
        size = max(_bytes(weight) for weight in weights)
        self.buffers = tuple(torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
        self.counts: Counter[str] = Counter()
        self._side = side
        self._device = device
        self._lent_to: Any = None  # the stream that uses the last matrix
        self._ahead: Ahead | None = None
        self._last: tuple[int, Turn] | None = None
        self._after: dict[tuple[int, Turn], tuple[Tensor, Turn]] = {
            (id(first), "forward"): (second, "forward") for first, second in pairwise(weights)
        }
        if side is not None and device.type == "cuda":
            for buffer in self.buffers:
                buffer.record_stream(side)

    @property
    def bytes(self) -> int:
        """Of both buffers."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def matrix(self, weight: Tensor, turn: Turn) -> Tensor:
        """`weight` unpacked; what followed this ask the last time is unpacked next."""
        ahead, self._ahead = self._ahead, None
        self._release()
        if ahead is not None and ahead.holds(weight):
            self._receive(ahead)
            self.counts["hits"] += 1
            found, free = ahead.matrix, 1 - ahead.slot
        else:
            self.counts["misses"] += 1
            found, free = unpack(weight), ahead.slot if ahead is not None else 0
        following = self._learn(weight, turn)
        if following is not None:
            self._ahead = self._fetch(following, free)
        return found

    def _release(self) -> None:
        """Nothing is written from here on before every use so far of the last matrix is over."""
        if self._side is None:
            return
        current = cuda.current_stream(self._device)
        self._side.wait_event((self._lent_to or current).record_event())
        self._lent_to = current

    def _receive(self, ahead: Ahead) -> None:
        """Nothing is read from here on before that weight is there whole."""
        if self._side is not None:
            self._lent_to.wait_event(ahead.ready)

    def _learn(self, weight: Tensor, turn: Turn) -> Tensor | None:
        """Remember that this ask followed the last one; returns what is to follow this one."""
        if self._last is not None:
            self._after[self._last] = (weight, turn)
        self._last = (id(weight), turn)
        following = self._after.get(self._last)
        return None if following is None else following[0]

    def _fetch(self, weight: Tensor, slot: int) -> Ahead:
        """Unpack into a buffer, on the side stream where there is one."""
        state, ready = _state(weight), None
        view = self.buffers[slot][: _bytes(weight)].view(state.dtype).view(state.shape)
        if self._side is None:
            unpack(weight, out=view)
        else:
            with cuda.stream(self._side):
                unpack(weight, out=view)
            ready = self._side.record_event()
        return Ahead(weight, weight._version, weight.data_ptr(), state, slot, view, ready)


def install(network: nn.Module) -> Prefetch:
    """Give every NF4 weight of `network`, which is on its device by now, one `Prefetch`."""
    modules: list[Any] = [
        module for module in network.modules()
        if type(module).__name__ == "Linear4bit" and not hasattr(module, "lora_A")
    ]  # fmt: skip
    weights: list[Tensor] = [module.weight for module in modules]
    assert weights and all(_state(weight) is not None for weight in weights), "no NF4 weights"
    device = weights[0].device
    prefetch = Prefetch(weights, side=cuda.Stream(device) if device.type == "cuda" else None)
    for weight in weights:
        setattr(weight, PREFETCH, prefetch)
    return prefetch


def of(network: nn.Module) -> Prefetch | None:
    """What `install` gave this network."""
    found = (getattr(parameter, PREFETCH, None) for parameter in network.parameters())
    return next((prefetch for prefetch in found if prefetch is not None), None)


def _state(weight: Tensor) -> Any:
    return getattr(weight, "quant_state", None)


def _bytes(weight: Tensor) -> int:
    """Of the matrix."""
    state = _state(weight)
    return math.prod(state.shape) * int(state.dtype.itemsize)
