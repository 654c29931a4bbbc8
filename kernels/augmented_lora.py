"""Block-augmented LoRA: linears that share an input, and their adapters, as one matrix product.

    M = [[W_1, s_1 B_1, 0], [W_2, 0, s_2 B_2], [A_1, 0, 0], [A_2, 0, 0]]    (O + R, D + R)
    S = x A^T, in the spare columns of a copy of x:    [y_1 | y_2] = [x | S] M[:O]^T
    dS = dy (sB), in those of a copy of the dy_i:      dx = [dy | dS] M[:, :D]
    dA_i = dS_i^T x    dB_i = s_i dy_i^T S_i

One large library product forward and one for dx, for q, k and v together as for gate and up, and
no second pass over y or dx, which is what adapters cost elsewhere; a pass over x and one over dy,
their copies, are the price. R, the sum of ranks, is padded to a multiple of 64 so that rows stay
128-byte aligned.

`augment(model)` lays the frozen weights of every patched layer out so: W_i becomes a view into M,
so the weight is held once. `separate(model)` gives each weight its own memory back, which saving
needs. Adapters are copied into M in every forward (R (D + O) numbers), because optimizers write
parameters in ways that leave no trace. Not taken: linears with dropout, bias, quantised or
trained weights. No GPU has measured it yet (`python -m benchmarks.gpu lora_block` does), so it is
nobody's default: the trainer runs lora_linear.py's separate products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tuneloom.kernels.lora_linear import GROUP, Linear, Unsupported, linear_of

PAD = 64
LAYOUT = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)


@dataclass(frozen=True)
class Group:
    """The matrix M of some linears, and where each one sits in it."""

    matrix: Tensor
    """(O + R, D + R)"""
    outs: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def width(self) -> int:
        """O"""
        return sum(self.outs)

    @property
    def spare(self) -> int:
        """R, padded"""
        return self.matrix.shape[0] - self.width

    @property
    def depth(self) -> int:
        """D"""
        return self.matrix.shape[1] - self.spare

    def refresh(self, linears: Sequence[Linear]) -> None:
        """Copy the adapters in; everything else of M never changes."""
        row, rank = 0, 0
        for linear, out, size in zip(linears, self.outs, self.ranks, strict=True):
            assert linear.a is not None and linear.b is not None
            self.matrix[self.width + rank :][:size, : self.depth] = linear.a
            columns = slice(self.depth + rank, self.depth + rank + size)
            self.matrix[row : row + out, columns] = linear.b * linear.scale
            row, rank = row + out, rank + size

    def buffer(self, x: Tensor) -> Tensor:
        """x (T, D) in a (T, D + R) buffer whose spare columns hold x A^T."""
        wide = x.new_empty(x.shape[0], self.matrix.shape[1])
        wide[:, : self.depth] = x
        torch.mm(x, self.matrix[self.width :, : self.depth].t(), out=wide[:, self.depth :])
        return wide


def forward(group: Group, x: Tensor, linears: Sequence[Linear]) -> tuple[list[Tensor], Tensor]:
    """([y_i (T, O_i)], S (T, R)) of x (T, D); the y_i are columns of one tensor."""
    group.refresh(linears)
    wide = group.buffer(x)
    y = wide @ group.matrix[: group.width].t()
    return list(y.split(group.outs, dim=1)), wide[:, group.depth :].clone()


def backward(
    group: Group,
    dys: Sequence[Tensor],
    x: Tensor,
    products: Tensor,
    linears: Sequence[Linear],
) -> tuple[Tensor, list[Tensor | None]]:
    """dx (T, D), and gradients in the order of `Linear.tensors`."""
    wide = x.new_empty(x.shape[0], group.matrix.shape[0])  # [dy | dS]
    torch.cat(list(dys), dim=1, out=wide[:, : group.width])
    dy, ds = wide[:, : group.width], wide[:, group.width :]
    torch.mm(dy, group.matrix[: group.width, group.depth :], out=ds)
    dx = wide @ group.matrix[:, : group.depth]
    da = ds.t() @ x  # (R, D), all adapters at once
    gradients: list[Tensor | None] = []
    rank = 0
    for linear, size, dy_i in zip(linears, group.ranks, dys, strict=True):
        assert linear.a is not None and linear.b is not None
        db = (dy_i.t() @ products[:, rank : rank + size]).mul_(linear.scale)
        da_i = da[rank : rank + size]
        gradients += [None, None, da_i.to(linear.a.dtype), db.to(linear.b.dtype), None]
        rank += size
    return dx, gradients


def augment(model: nn.Module) -> dict[str, int]:
    """Lay out every layer that can be; returns how many groups were, and why others were not.

    Call it after the engine is built and the model is on its device, and after `patch(model)`.
    """
    counts: dict[str, int] = {}
    for layer in model.modules():
        if not type(layer).__name__.endswith("DecoderLayer"):
            continue
        for part, names in LAYOUT:
            modules = [getattr(getattr(layer, part, None), name, None) for name in names]
            outcome = _augment([m for m in modules if m is not None], len(names))
            counts[outcome] = counts.get(outcome, 0) + 1
    return counts


def _augment(modules: list[Any], expected: int) -> str:
    if len(modules) != expected:
        return "not augmented: no such linears"
    try:
        linears = [linear_of(module) for module in modules]
    except Unsupported as reason:
        return f"not augmented: {reason}"
    for linear in linears:
        if linear.a is None or linear.magnitude is not None:
            return "not augmented: no plain adapter"
        if linear.dropout or linear.bias is not None:
            return "not augmented: dropout or a bias"
        if linear.weight.dtype == torch.uint8 or linear.weight.requires_grad:
            return "not augmented: quantised or trained weights"
    group = _lay_out(linears)
    for module in modules:
        module.__dict__[GROUP] = group
    return "augmented"


def _lay_out(linears: Sequence[Linear]) -> Group:
    ranks = tuple(linear.a.shape[0] for linear in linears if linear.a is not None)
    outs = tuple(linear.weight.shape[0] for linear in linears)
    spare = -(-sum(ranks) // PAD) * PAD
    depth = linears[0].weight.shape[1]
    matrix = linears[0].weight.new_zeros(sum(outs) + spare, depth + spare, requires_grad=False)
    row = 0
    for linear, out in zip(linears, outs, strict=True):
        view = matrix[row : row + out, :depth]
        view.copy_(linear.weight.detach())
        linear.weight.data = view  # the weight's own memory is released here
        row += out
    return Group(matrix, outs, ranks)


def separate(model: nn.Module) -> int:
    """Undo `augment`: contiguous weights in memory of their own; returns how many."""
    separated = 0
    for module in model.modules():
        if module.__dict__.pop(GROUP, None) is not None:
            base: Any = module
            weight = base.get_base_layer().weight
            weight.data = weight.data.clone(memory_format=torch.contiguous_format)
            separated += 1
    return separated
