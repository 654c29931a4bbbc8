"""Rotary position embedding of queries and keys in one launch, as half-split pairs (i, i + R/2).

    y_i = x_i cos_i - x_j sin_i    y_j = x_j cos_i + x_i sin_i    j = i + R/2, i < R/2
    backward is the rotation by the opposite angle

q: (B, H, T, C), k: (B, K, T, C) fp32, bf16, fp16, any strides with the last one 1; cos, sin:
(B or 1, T, R), R <= C, whose second half repeats the first, as transformers builds them; columns
from R on pass through (Phi). Nothing but cos and sin is saved for backward. RoPE: arXiv 2104.09864.
The result is new tensors, not q and k in place: nobody keeps the unrotated ones, so what that would
save is one layer's q and k at its peak.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tuneloom.kernels.jit import CALLS, jit, next_power_of_2, runs_triton, tl


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """(q, k) rotated. `unsqueeze_dim` 1: heads before tokens; 2: tokens before heads."""
    if unsqueeze_dim == 2:
        rotated = _Rope.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return rotated[0].transpose(1, 2), rotated[1].transpose(1, 2)
    rotated_q, rotated_k = _Rope.apply(q, k, cos, sin)
    return rotated_q, rotated_k


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        CALLS["rope"] += 1
        ctx.save_for_backward(cos, sin)
        q, k = _unit_stride(q), _unit_stride(k)
        out_q, out_k = torch.empty_like(q), torch.empty_like(k)
        _rotate(q, k, out_q, out_k, cos, sin, backward=False)
        return out_q, out_k

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dq, dk = _unit_stride(dq), _unit_stride(dk)
        out_q, out_k = torch.empty_like(dq), torch.empty_like(dk)
        _rotate(dq, dk, out_q, out_k, cos, sin, backward=True)
        return out_q, out_k, None, None


def _rotate(
    q: Tensor, k: Tensor, out_q: Tensor, out_k: Tensor, cos: Tensor, sin: Tensor, backward: bool
) -> None:
    batch, heads, tokens, width = q.shape
    rotated = cos.shape[-1]
    if rotated > width or rotated % 2 or cos.shape[1] != tokens or cos.shape[0] not in (1, batch):
        raise ValueError(
            f"rope: expected cos (1 or {batch}, {tokens}, an even number up to {width}), "
            f"got {tuple(cos.shape)}"
        )
    like = (batch, k.shape[1], tokens, width)
    if k.shape != like or sin.shape != cos.shape:
        raise ValueError(
            f"rope: expected k {like} as q {tuple(q.shape)} has it and sin like cos "
            f"{tuple(cos.shape)}, got k {tuple(k.shape)} and sin {tuple(sin.shape)}"
        )
    if not tokens:
        return
    if not runs_triton(q):
        _plain_rotate(q, out_q, cos, sin, backward)
        _plain_rotate(k, out_k, cos, sin, backward)
        return
    if any(t.stride(-1) != 1 for t in (q, k, out_q, out_k) if t.shape[-1] > 1):
        raise ValueError("rope: expected neighbouring columns in q and k; call .contiguous()")
    cos, sin = (_unit_stride(t).expand(batch, -1, -1) for t in (cos, sin))
    _rope_kernel[(tokens, batch)](
        q, k, out_q, out_k, cos, sin,
        *q.stride()[:3], *k.stride()[:3], *out_q.stride()[:3], *out_k.stride()[:3],
        *cos.stride()[:2], *sin.stride()[:2], heads, k.shape[1],
        WIDTH=width, HALF=rotated // 2, BACKWARD=backward,
        Q_HEADS=next_power_of_2(heads), K_HEADS=next_power_of_2(k.shape[1]),
        HALF_BLOCK=next_power_of_2(rotated // 2), REST_BLOCK=next_power_of_2(width - rotated),
        num_warps=4,
    )  # fmt: skip


def _unit_stride(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _plain_rotate(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> None:
    half = cos.shape[-1] // 2
    cos, sin = (t[..., :half].unsqueeze(1) for t in (cos, -sin if backward else sin))
    first, second = x[..., :half], x[..., half : 2 * half]
    out[..., :half] = first * cos - second * sin
    out[..., half : 2 * half] = second * cos + first * sin
    out[..., 2 * half :] = x[..., 2 * half :]


@jit
def _rope_kernel(
    q: tl.tensor,  # (B, H, T, WIDTH)
    k: tl.tensor,  # (B, K, T, WIDTH)
    out_q: tl.tensor,
    out_k: tl.tensor,
    cos: tl.tensor,  # (B, T, 2 HALF)
    sin: tl.tensor,
    q_b: tl.tensor,  # strides: tensor_axis
    q_h: tl.tensor,
    q_t: tl.tensor,
    k_b: tl.tensor,
    k_h: tl.tensor,
    k_t: tl.tensor,
    oq_b: tl.tensor,
    oq_h: tl.tensor,
    oq_t: tl.tensor,
    ok_b: tl.tensor,
    ok_h: tl.tensor,
    ok_t: tl.tensor,
    cos_b: tl.tensor,
    cos_t: tl.tensor,
    sin_b: tl.tensor,
    sin_t: tl.tensor,
    q_heads: tl.tensor,
    k_heads: tl.tensor,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    BACKWARD: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
) -> None:
    """One program a token: cos and sin are read once for all heads of q and k."""
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    pair = tl.arange(0, HALF_BLOCK)
    c = tl.load(cos + batch * cos_b + token * cos_t + pair, mask=pair < HALF, other=0.0)
    s = tl.load(sin + batch * sin_b + token * sin_t + pair, mask=pair < HALF, other=0.0)
    c = c.to(tl.float32)[None, :]
    s = s.to(tl.float32)[None, :]
    if BACKWARD:
        s = -s
    for which in tl.static_range(2):
        if which == 0:
            source = q + batch * q_b + token * q_t
            target = out_q + batch * oq_b + token * oq_t
            head = tl.arange(0, Q_HEADS)[:, None]
            from_head = head.to(tl.int64) * q_h
            to_head = head.to(tl.int64) * oq_h
            present = head < q_heads
        else:
            source = k + batch * k_b + token * k_t
            target = out_k + batch * ok_b + token * ok_t
            head = tl.arange(0, K_HEADS)[:, None]
            from_head = head.to(tl.int64) * k_h
            to_head = head.to(tl.int64) * ok_h
            present = head < k_heads
        inside = present & (pair < HALF)[None, :]
        x = tl.load(source + from_head + pair[None, :], mask=inside, other=0.0).to(tl.float32)
        z = tl.load(source + from_head + HALF + pair[None, :], mask=inside, other=0.0)
        z = z.to(tl.float32)
        kind = target.dtype.element_ty
        tl.store(target + to_head + pair[None, :], (x * c - z * s).to(kind), mask=inside)
        tl.store(target + to_head + HALF + pair[None, :], (z * c + x * s).to(kind), mask=inside)
        if WIDTH > 2 * HALF:
            rest = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
            kept = present & (rest < WIDTH)
            tl.store(
                target + to_head + rest, tl.load(source + from_head + rest, mask=kept), mask=kept
            )
