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

from tuneloom.kernels.jit import CALLS, jit, next_power_of_2, plain_dtype, runs_triton, tl

TILE = 4096  # numbers a program passes over: several rows of a head's norm, one hidden size


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
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, s, r) of contiguous x, outside autograd."""
    width = x.shape[-1]
    if weight.shape != (width,):
        raise ValueError(f"rms_norm: expected weight ({width},), got {tuple(weight.shape)}")
    rows = x.numel() // width
    y = torch.empty_like(x)
    if not runs_triton(x):
        total = x if residual is None else x + residual
        accurate = total.to(plain_dtype(x.dtype))
        scale = torch.rsqrt(accurate.square().mean(-1) + eps)  # (...,)
        result = accurate * scale.unsqueeze(-1) * (offset + weight.to(accurate.dtype))
        y.copy_(result)
        return y, total, scale.reshape(rows)
    total = x if residual is None else torch.empty_like(x)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = next_power_of_2(width)
    tile_rows = min(16, max(1, TILE // block))
    _forward_kernel[(-(-rows // tile_rows),)](
        x, residual, weight, y, total, scale,
        rows, width, eps, offset,
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
    # Each program walks over many rows and keeps its own partial dw: no atomics, reproducible.
    programs = min(rows, _processors(total.device) * 32 // warps(block))
    ds = torch.empty_like(total)
    partial = torch.empty(programs if wants_weight else 0, width, device=dy.device)
    _backward_kernel[(programs,)](
        dy, total, weight, scale, dtotal, ds, partial,
        rows, width, offset,
        RESIDUAL=dtotal is not None, WEIGHT=wants_weight, BLOCK=block, num_warps=warps(block),
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
    accurate, gradient = (t.to(plain_dtype(total.dtype)) for t in (total, dy))
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
    """Warps of a program that holds `block` numbers at once: 16 a thread, 32 in the widest."""
    return min(16, max(1, block // 512))


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@jit
def _forward_kernel(
    x: tl.tensor,  # (rows, width)
    residual: tl.tensor,  # (rows, width) or None
    weight: tl.tensor,  # (width,)
    y: tl.tensor,  # (rows, width)
    total: tl.tensor,  # (rows, width); written only with a residual
    scale: tl.tensor,  # (rows,) fp32
    rows: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    offset: tl.tensor,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program ROWS rows in turn: a 2-D tile of one row would put the row in every warp."""
    column = tl.arange(0, BLOCK)
    inside = column < width
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
    for i in tl.static_range(ROWS):
        row = (tl.program_id(0) * ROWS + i).to(tl.int64)
        if row < rows:
            s = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
            if RESIDUAL:
                s += tl.load(residual + row * width + column, mask=inside, other=0.0).to(tl.float32)
                rounded = s.to(total.dtype.element_ty)
                tl.store(total + row * width + column, rounded, mask=inside)
                s = rounded.to(tl.float32)
            r = tl.rsqrt(tl.sum(s * s, 0) / width + eps)
            tl.store(y + row * width + column, (s * r * w).to(y.dtype.element_ty), mask=inside)
            tl.store(scale + row, r)


@jit
def _backward_kernel(
    dy: tl.tensor,  # (rows, width)
    total: tl.tensor,  # (rows, width)
    weight: tl.tensor,  # (width,)
    scale: tl.tensor,  # (rows,) fp32
    dtotal: tl.tensor,  # (rows, width) or None
    ds: tl.tensor,  # (rows, width)
    partial: tl.tensor,  # (programs, width) fp32
    rows: tl.tensor,
    width: tl.tensor,
    offset: tl.tensor,
    RESIDUAL: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Program p takes rows p, p + programs, ..., and row p of `partial`."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
    dweight = tl.zeros((BLOCK,), tl.float32)
    at = program.to(tl.int64) * width + column
    step = tl.num_programs(0).to(tl.int64) * width
    for row in range(program, rows, tl.num_programs(0)):
        r = tl.load(scale + row)
        unit = tl.load(total + at, mask=inside, other=0.0).to(tl.float32) * r
        gradient = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        v = gradient * w
        result = r * (v - unit * (tl.sum(v * unit, 0) / width))
        if RESIDUAL:
            result += tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(ds + at, result.to(ds.dtype.element_ty), mask=inside)
        at += step
        if WEIGHT:
            dweight += gradient * unit
    if WEIGHT:
        tl.store(partial + program.to(tl.int64) * width + column, dweight, mask=inside)
