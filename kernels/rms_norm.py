"""RMSNorm, alone or with the residual added first: one pass forward, one pass backward.

    s = x + residual (rounded)    r = rsqrt(mean(s^2) + eps)    y = s * r * (offset + w)
    with v = dy * (offset + w):    ds = r * v - s * r^3 * mean(v * s) + ds_in    dw = sum dy * s * r

x, residual, y, s: (..., D) fp32, bf16, fp16; w: (D,); r: one fp32 a row. offset: 0 for Llama,
Qwen, Mistral, Phi; 1 for Gemma. Arithmetic is fp32 with one rounding at the end (Llama's extra one,
of x * r to bf16, is left out: nearer to float64 than transformers). Saved for backward: s, w and r.
A frozen w gets no dw and its pass is not compiled in. RMSNorm: arXiv 1910.07467; the fused residual
is what Liger 0.8.5 ships but puts into no model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tuneloom.kernels.jit import CALLS, jit, next_power_of_2, runs_triton, tl

TILE = 4096  # elements a program holds: several rows of a head's norm, one of a hidden size


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """y, in x's shape and dtype."""
    y: Tensor = _RMSNorm.apply(x, None, weight, eps, offset)
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(y, s): the norm of x + residual, and that sum, which is the next residual."""
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"add_rms_norm: expected residual like x, {tuple(x.shape)} {x.dtype}, got "
            f"{tuple(residual.shape)} {residual.dtype}"
        )
    y, total = _RMSNorm.apply(x, residual, weight, eps, offset)
    return y, total


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        CALLS["rms_norm" if residual is None else "add_rms_norm"] += 1
        if residual is not None:
            residual = residual.contiguous()
        y, total, scale = normalise(x.contiguous(), weight, eps, offset, residual=residual)
        ctx.save_for_backward(total, weight, scale)
        ctx.offset, ctx.has_residual = offset, residual is not None
        return y if residual is None else (y, total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor | None = None) -> tuple[Tensor | None, ...]:
        total, weight, scale = ctx.saved_tensors
        ds, dweight = normalise_backward(
            dy.contiguous(),
            total,
            weight,
            scale,
            ctx.offset,
            dtotal=None if dtotal is None else dtotal.contiguous(),
            wants_weight=ctx.needs_input_grad[2],
        )
        return ds, ds if ctx.has_residual else None, dweight, None, None


def normalise(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, s, r) of contiguous x, outside autograd; `out`: (rows, D) with any row stride for y."""
    width = x.shape[-1]
    rows = x.numel() // width
    y = torch.empty_like(x) if out is None else out
    if not runs_triton(x):
        total = x if residual is None else x + residual
        accurate = total.to(_accurate(x.dtype))
        scale = torch.rsqrt(accurate.square().mean(-1) + eps)  # (...,)
        result = accurate * scale.unsqueeze(-1) * (offset + weight.to(accurate.dtype))
        y.copy_(result.view(y.shape))
        return y, total, scale.reshape(rows)
    total = x if residual is None else torch.empty_like(x)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = next_power_of_2(width)
    tile_rows = max(1, TILE // block)
    _forward_kernel[(-(-rows // tile_rows),)](
        x, residual, weight, y, total, scale,
        rows, width, y.stride(-2) if y.dim() > 1 else width, eps, offset,
        RESIDUAL=residual is not None, ROWS=tile_rows, BLOCK=block, num_warps=warps(block),
    )  # fmt: skip
    return y, total, scale


def normalise_backward(
    dy: Tensor,
    total: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: float,
    *,
    dtotal: Tensor | None,
    wants_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """(ds, dw) outside autograd; all contiguous."""
    width = total.shape[-1]
    rows = total.numel() // width
    if not runs_triton(total):
        return _plain_backward(dy, total, weight, scale, offset, dtotal, wants_weight)
    block = next_power_of_2(width)
    tile_rows = max(1, TILE // block)
    # Each program walks over many tiles and keeps its own partial dw: no atomics, reproducible.
    programs = min(-(-rows // tile_rows), 4 * _processors(total.device))
    ds = torch.empty_like(total)
    partial = torch.empty(programs if wants_weight else 0, width, device=dy.device)
    _backward_kernel[(programs,)](
        dy, total, weight, scale, dtotal, ds, partial,
        rows, width, offset,
        RESIDUAL=dtotal is not None, WEIGHT=wants_weight, ROWS=tile_rows, BLOCK=block,
        num_warps=warps(block),
    )  # fmt: skip
    return ds, partial.sum(0).to(weight.dtype) if wants_weight else None


def _plain_backward(
    dy: Tensor,
    total: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: float,
    dtotal: Tensor | None,
    wants_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    accurate, gradient = (t.to(_accurate(total.dtype)) for t in (total, dy))
    r = scale.view(*total.shape[:-1], 1)
    unit = accurate * r
    v = gradient * (offset + weight.to(accurate.dtype))
    ds = r * (v - unit * (v * unit).mean(-1, keepdim=True))
    if dtotal is not None:
        ds += dtotal
    dweight = None
    if wants_weight:
        dweight = (gradient * unit).reshape(-1, total.shape[-1]).sum(0).to(weight.dtype)
    return ds.to(total.dtype), dweight


def warps(block: int) -> int:
    """Warps of a program whose tile is the larger of TILE and one row."""
    return 8 if block <= 8192 else 16


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@jit
def _forward_kernel(
    x: Any,  # (rows, width)
    residual: Any,  # (rows, width) or None
    weight: Any,  # (width,)
    y: Any,  # (rows, width), row stride `y_stride`
    total: Any,  # (rows, width); written only with a residual
    scale: Any,  # (rows,) fp32
    rows: Any,
    width: Any,
    y_stride: Any,
    eps: Any,
    offset: Any,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program a tile of ROWS x BLOCK."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    s = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        s += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        rounded = s.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        s = rounded.to(tl.float32)
    r = tl.rsqrt(tl.sum(s * s, 1) / width + eps)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + offset
    result = s * r[:, None] * w[None, :]
    to = row[:, None] * y_stride + column[None, :]
    tl.store(y + to, result.to(y.dtype.element_ty), mask=inside)
    tl.store(scale + row, r, mask=row < rows)


@jit
def _backward_kernel(
    dy: Any,  # (rows, width)
    total: Any,  # (rows, width)
    weight: Any,  # (width,)
    scale: Any,  # (rows,) fp32
    dtotal: Any,  # (rows, width) or None
    ds: Any,  # (rows, width)
    partial: Any,  # (programs, width) fp32
    rows: Any,
    width: Any,
    offset: Any,
    RESIDUAL: tl.constexpr,
    WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Program p takes tiles p, p + programs, ..., and row p of `partial`."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + offset
    dweight = tl.zeros((BLOCK,), tl.float32)
    for start in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        r = tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
        unit = tl.load(total + at, mask=inside, other=0.0).to(tl.float32) * r
        gradient = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        v = gradient * w[None, :]
        result = r * (v - unit * (tl.sum(v * unit, 1) / width)[:, None])
        if RESIDUAL:
            result += tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(ds + at, result.to(ds.dtype.element_ty), mask=inside)
        if WEIGHT:
            dweight += tl.sum(gradient * unit, 0)
    if WEIGHT:
        tl.store(partial + program * width + column, dweight, mask=column < width)
