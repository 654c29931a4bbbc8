"""Fused linear cross-entropy: the loss of a language model's head without ever holding its logits.

    z = cap(h W^T + b)    loss = sum over kept rows t of  logsumexp(z_t) - z_t[label_t]
    dz = (softmax(z) - onehot) * cap'    dh = dz W    dW = dz^T h    db = sum_t dz_t
    cap(l) = softcap * tanh(l / softcap), or l

hidden: (T, D) or (B, S, D) fp32, bf16, fp16; weight: (V, D); bias: (V,) or None; labels: (T,)
int64, `labels[t]` being what `hidden[t]` must predict (shift before), -100 where there is no loss.

How it differs from Liger 0.8.5 (whose idea it is to compute gradients in the forward pass,
arXiv 2410.10989) for fine-tuning: rows without loss are dropped before the matrix product, so a
prompt that is half of the tokens costs nothing; chunks are large (1,024 rows at V = 128,256 where
Liger takes T/32), so the weight is read a few times rather than 32; a frozen head pays two matrix
products, not three. The chunk of logits becomes its own gradient in place. Backward multiplies by
one number and needs no weight, which is also why a ZeRO-3 weight may be released after forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tuneloom.kernels.jit import CALLS, jit, plain_dtype, runs_triton, tl

IGNORED = -100
CHUNK_BYTES = 256 * 2**20  # 1,024 rows at V = 128,256 in bf16: large enough for full-speed GEMMs
CPU_CHUNK_BYTES = 4 * 2**20  # a chunk that stays in cache while softmax passes over it


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    kept: Tensor | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Sum of the token losses, a scalar fp32 (fp64 for fp64 input); divide by the tokens yourself.

    `kept`: (K,) int64, the flat positions whose label is not -100. Passing it saves the one host
    sync of finding them on a GPU. `chunk`: rows of logits held at once. A label outside [0, V) is
    an error on the CPU and a NaN loss on a GPU.
    """
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if hidden.shape[0] != labels.shape[0] or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: expected hidden (T, D), weight (V, D) and labels (T,), got "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(labels.shape)}"
        )
    if kept is None:
        kept = torch.nonzero(labels != IGNORED).squeeze(1)
    rows = chunk or rows_per_chunk(weight.shape[0], hidden)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, kept, softcap, rows)
    return loss


def rows_per_chunk(classes: int, hidden: Tensor) -> int:
    """Rows whose logits fill the budget: a multiple of 128, so that GEMM tiles are full."""
    budget = CPU_CHUNK_BYTES if hidden.device.type == "cpu" else CHUNK_BYTES
    return max(128, budget // (classes * hidden.element_size()) // 128 * 128)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        kept: Tensor,
        softcap: float | None,
        rows: int,
    ) -> Tensor:
        CALLS["linear_cross_entropy"] += 1
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wants_gradient = need_hidden or need_weight or need_bias
        used = weight.to(hidden.dtype)
        loss = hidden.new_zeros((), dtype=plain_dtype(hidden.dtype))
        dhidden = torch.zeros_like(hidden) if need_hidden else None
        # A sum over all tokens, which the loss scale comes after, may pass fp16's 65504.
        sums = torch.float32 if used.dtype == torch.float16 else used.dtype
        dweight = torch.zeros_like(used, dtype=sums) if need_weight else None
        dbias = torch.zeros_like(bias) if bias is not None and need_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for index in kept.split(rows):
                part = hidden.index_select(0, index)  # (R, D)
                logits = part @ used.t()  # (R, V)
                if bias is not None:
                    logits += bias.to(logits.dtype)
                loss += cross_entropy_(logits, labels[index], softcap, wants_gradient).sum()
                if dhidden is not None:
                    dhidden.index_copy_(0, index, logits @ used)
                if dweight is not None:
                    # Rounds once a chunk, in the weight's dtype; fp16 not at all.
                    dweight.addmm_(logits.t().to(sums), part.to(sums))
                if dbias is not None:
                    dbias += logits.sum(0)
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(dhidden, dweight, dbias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight, dbias = ctx.saved_tensors
        # Of one dimension: beside a 0-dim factor a GPU rounds that to the gradient's dtype first.
        factor = dloss.reshape(1)
        if dhidden is not None:
            dhidden = torch.mul(dhidden, factor, out=torch.empty_like(dhidden))
        if dweight is not None:  # in place: it is gigabytes. Autograd refuses a second
            for part in dweight.split(4096):  # a CPU multiplies bf16 and fp32 in copies as fp32
                part.mul_(factor)
            dweight = dweight.to(ctx.weight_dtype)
        if dbias is not None:
            dbias = torch.mul(dbias, factor, out=torch.empty_like(dbias))
        return dhidden, dweight, dbias, None, None, None, None


def cross_entropy_(
    logits: Tensor, labels: Tensor, softcap: float | None, wants_gradient: bool
) -> Tensor:
    """Losses (R,) of logits (R, V), which become their own gradient in place if that is wanted."""
    if not runs_triton(logits):
        return _plain_cross_entropy_(logits, labels, softcap, wants_gradient)
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    _cross_entropy_kernel[(logits.shape[0],)](
        logits,
        labels,
        losses,
        logits.stride(0),
        logits.shape[1],
        softcap or 1.0,
        CAPPED=softcap is not None,
        GRADIENT=wants_gradient,
        BLOCK=4096,
        num_warps=8,
    )
    return losses


def _plain_cross_entropy_(
    logits: Tensor, labels: Tensor, softcap: float | None, wants_gradient: bool
) -> Tensor:
    scores = logits.to(plain_dtype(logits.dtype))
    tanh = None
    if softcap is not None:
        tanh = torch.tanh(scores / softcap)
        scores = softcap * tanh
    softmax = torch.softmax(scores, dim=1)
    # From the largest probability: log_softmax().exp_() takes 5 times as long on a CPU.
    log_sum = scores.amax(1) - softmax.amax(1).log()
    losses = log_sum - scores.gather(1, labels[:, None]).squeeze(1)
    if wants_gradient:
        softmax[torch.arange(len(labels), device=labels.device), labels] -= 1
        if tanh is not None:
            softmax *= 1 - tanh.square_()
        logits.copy_(softmax)
    return losses


@jit
def _cross_entropy_kernel(
    logits: tl.tensor,  # (R, V), row stride `stride`; overwritten by its gradient if GRADIENT
    labels: tl.tensor,  # (R,) int64
    losses: tl.tensor,  # (R,) fp32
    stride: tl.tensor,
    classes: tl.tensor,
    softcap: tl.tensor,
    CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program a row. The second read of the row hits L2 (132 SMs x 256 KB = 34 of 50 MB)."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    # Not -inf: -inf - -inf would be NaN in lanes that no column reaches.
    maximum = tl.full((BLOCK,), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, classes, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < classes
        score = tl.load(logits + column, mask=inside, other=0.0).to(tl.float32)
        if CAPPED:
            score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)  # tanh
        score = tl.where(inside, score, -float("inf"))
        larger = tl.maximum(maximum, score)
        total = total * tl.exp(maximum - larger) + tl.exp(score - larger)
        maximum = larger
    # Before the reductions, whose barriers keep it before the gradients that other warps store.
    known = (label >= 0) & (label < classes)
    target = tl.load(logits + label, mask=known, other=0.0).to(tl.float32)
    peak = tl.max(maximum, 0)
    log_sum = peak + tl.log(tl.sum(total * tl.exp(maximum - peak), 0))
    if CAPPED:
        target = softcap * (2.0 * tl.sigmoid(2.0 * target / softcap) - 1.0)
    tl.store(losses + row, tl.where(known, log_sum - target, float("nan")))
    if GRADIENT:
        for start in range(0, classes, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < classes
            score = tl.load(logits + column, mask=inside, other=0.0).to(tl.float32)
            slope = tl.full((BLOCK,), 1.0, tl.float32)
            if CAPPED:
                tanh = 2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0
                score = softcap * tanh
                slope = 1.0 - tanh * tanh
            gradient = (tl.exp(score - log_sum) - tl.where(column == label, 1.0, 0.0)) * slope
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=inside)
