"""SwiGLU and GeGLU: the gated product of an MLP, in one pass forward and one backward.

    h = act(e) * g    de = dh * g * act'(e)    dg = dh * act(e)
    silu(e) = e sigmoid(e)    gelu(e) = e Phi(e)    gelu_tanh: Phi by tanh (Gemma)

e (gate), g (up), h: (..., F) fp32, bf16, fp16; e and g may be the halves of one (..., 2 F) tensor
(Phi-3). Saved for backward: e and g, 2 F numbers a token where autograd keeps 3 F (e, act(e), g);
act(e) is recomputed. GLU variants: arXiv 2002.05202.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tuneloom.kernels.jit import CALLS, jit, plain_dtype, runs_triton, tl

Activation = Literal["silu", "gelu", "gelu_tanh"]
BLOCK = 2048
_CODE = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


def gated(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """act(gate) * up, in up's shape and dtype."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gated: expected gate like up, {tuple(up.shape)} {up.dtype}, "
            f"got {tuple(gate.shape)} {gate.dtype}"
        )
    h: Tensor = _Gated.apply(gate, up, activation)
    return h


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        CALLS["gated"] += 1
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return gate_forward(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup = (torch.empty(dh.shape, dtype=dh.dtype, device=dh.device) for _ in range(2))
        gate_backward(dh, gate, up, ctx.activation, dgate, dup)
        return dgate, dup, None


def gate_forward(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """h outside autograd."""
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if not runs_triton(gate):
        act, _ = _plain_activation(gate.to(plain_dtype(gate.dtype)), activation, slope=False)
        h.copy_(act * up)
        return h
    gate, up = (_rows(t) for t in (gate, up))
    rows, width = gate.shape
    _forward_kernel[(rows, -(-width // BLOCK))](
        gate, up, h, gate.stride(0), up.stride(0), width,
        ACTIVATION=_CODE[activation], BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return h


def gate_backward(
    dh: Tensor, gate: Tensor, up: Tensor, activation: Activation, dgate: Tensor, dup: Tensor
) -> None:
    """Write de and dg, contiguous, outside autograd."""
    if not runs_triton(gate):
        gradient, e = dh.to(plain_dtype(dh.dtype)), gate.to(plain_dtype(gate.dtype))
        act, slope = _plain_activation(e, activation, slope=True)
        assert slope is not None
        dgate.copy_(gradient * up * slope)
        dup.copy_(gradient * act)
        return
    dh, gate, up = (_rows(t) for t in (dh, gate, up))
    rows, width = gate.shape
    _backward_kernel[(rows, -(-width // BLOCK))](
        dh, gate, up, dgate, dup,
        dh.stride(0), gate.stride(0), up.stride(0), width,
        ACTIVATION=_CODE[activation], BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


def _plain_activation(
    e: Tensor, activation: Activation, *, slope: bool
) -> tuple[Tensor, Tensor | None]:
    """act(e), and act'(e) if wanted."""
    if activation == "silu":
        sigmoid = torch.sigmoid(e)
        act = e * sigmoid
        return act, sigmoid + act * (1 - sigmoid) if slope else None
    tanh = "tanh" if activation == "gelu_tanh" else "none"
    act = functional.gelu(e, approximate=tanh)
    if not slope:
        return act, None
    derivative = torch.ops.aten.gelu_backward(torch.ones_like(e), e, approximate=tanh)
    return act, derivative


def _rows(t: Tensor) -> Tensor:
    """(rows, F) with unit stride inside a row; a copy only where no view can do it."""
    flat = t.reshape(-1, t.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


@jit
def _forward_kernel(
    gate: tl.tensor,  # (rows, width)
    up: tl.tensor,
    h: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    width: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    e = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == 0:
        act = e * tl.sigmoid(e)
    elif ACTIVATION == 1:
        act = 0.5 * e * (1.0 + tl.erf(e * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (e + 0.044715 * e * e * e)
        act = e * tl.sigmoid(2.0 * inner)  # 0.5 (1 + tanh(u)) = sigmoid(2 u)
    tl.store(h + row * width + column, (act * g).to(h.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(
    dh: tl.tensor,  # (rows, width)
    gate: tl.tensor,
    up: tl.tensor,
    dgate: tl.tensor,
    dup: tl.tensor,
    dh_stride: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    width: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gradient = tl.load(dh + row * dh_stride + column, mask=inside, other=0.0).to(tl.float32)
    e = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == 0:
        share = tl.sigmoid(e)
        slope = share + e * share * (1.0 - share)
    elif ACTIVATION == 1:
        share = 0.5 * (1.0 + tl.erf(e * 0.7071067811865476))
        slope = share + e * 0.3989422804014327 * tl.exp(-0.5 * e * e)
    else:
        inner = 0.7978845608028654 * (e + 0.044715 * e * e * e)
        share = tl.sigmoid(2.0 * inner)
        steep = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * e * e)
        slope = share + 2.0 * e * share * (1.0 - share) * steep
    de = gradient * g * slope
    dg = gradient * e * share
    tl.store(dgate + row * width + column, de.to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + row * width + column, dg.to(dup.dtype.element_ty), mask=inside)
