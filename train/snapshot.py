"""A copy in host memory of everything that a checkpoint is made of; its buffers are used again.

Fresh memory costs a page fault every 4 KiB, so the first copy is the slow one.
"""

import copy
import pickle
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)
"""Subclasses (bitsandbytes' 4-bit weights) carry more than their values and copy themselves."""

ATOMS = (str, int, float, bool, type(None), torch.dtype, torch.Size)


class Snapshot:
    """Buffers of one rank, in the order in which its tensors come; the last copy is overwritten."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._used = 0
        self._seen: dict[tuple[Any, ...], Tensor] = {}

    def begin(self) -> None:
        """Forget the last copy: its buffers are free."""
        self._used = 0
        self._seen.clear()

    def copied(self, value: Any) -> Any:
        """`value` with nothing in it that training will change; tensors on the CPU."""
        if type(value) in PLAIN:
            return self._tensor(value.detach())
        if isinstance(value, dict):
            whole = copy.copy(value)  # keeps what a state dict carries beside its entries
            for key, entry in value.items():
                whole[key] = self.copied(entry)
            return whole
        if type(value) in (list, tuple):
            return type(value)(self.copied(entry) for entry in value)
        # All of it is about to be pickled, which copies five times as fast as deepcopy does.
        return value if type(value) in ATOMS else pickle.loads(pickle.dumps(value))

    def complete(self) -> None:
        """Copies from a GPU run beside the host; after this they are there."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _tensor(self, tensor: Tensor) -> Tensor:
        """Two names of one tensor stay one tensor."""
        where = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if where not in self._seen:
            self._seen[where] = self._buffer(tensor).copy_(tensor, non_blocking=True)
        return self._seen[where]

    def _buffer(self, tensor: Tensor) -> Tensor:
        """The next buffer, made anew where it does not fit."""
        wanted = (tensor.shape, tensor.dtype)
        if self._used == len(self._buffers):
            self._buffers.append(_empty(tensor))
        elif (self._buffers[self._used].shape, self._buffers[self._used].dtype) != wanted:
            self._buffers[self._used] = _empty(tensor)
        self._used += 1
        return self._buffers[self._used - 1]


def _empty(tensor: Tensor) -> Tensor:
    """Host memory for a tensor; pinned where a GPU copies into it."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
