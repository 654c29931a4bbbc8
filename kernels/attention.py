"""One attention for packed and padded batches: picks flash-attn, varlen, SDPA or eager, and says
which.

No attention is written here: `varlen` is `torch.nn.attention.varlen` (FlashAttention-2 in core),
`flash` is the flash-attn package, `sdpa` is PyTorch's fused kernel, `eager` is the plain reference.
`install(model, choice)` makes a Hugging Face model call it; `CALLS` counts what really ran.

Shapes: T packed tokens, N documents, L longest document, H heads, K key/value heads, C head width.
"""

import importlib.util
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tuneloom.errors import ConfigError

NAME = "tuneloom"
SHARDED = "sequence_sharded"
"""Keyword of a forward pass whose tokens are one rank's part of longer sequences."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Exchange = Callable[[Attend, Tensor, Tensor, Tensor], Tensor]
"""Runs an attention on whole sequences from parts of them (train/sequence.py)."""
CALLS: Counter[str] = Counter()
"""Calls per backend since import, or since `CALLS.clear()`; effects.json is written from it."""


@dataclass(frozen=True)
class Choice:
    """The backend that a model will call, and why that one."""

    backend: str
    reason: str


def has_flash() -> bool:
    """flash-attn 2 or newer can be imported."""
    return importlib.util.find_spec("flash_attn") is not None


def has_varlen() -> bool:
    """`torch.nn.attention.varlen` exists (torch 2.10 and newer) and a CUDA device can run it."""
    return (
        torch.cuda.is_available()
        and importlib.util.find_spec("torch.nn.attention.varlen") is not None
    )


def choose(requested: str, *, dtype: torch.dtype, head_dim: int, softcap: float | None) -> Choice:
    """Backend for `model.attention=requested`; raises ConfigError when it was named and cannot
    run.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    blockers = {
        "flash": None if has_flash() and half and torch.cuda.is_available() else
        "needs a CUDA device, bf16 or fp16, and the flash-attn package (extra `flash`)",
        "varlen": None if has_varlen() and half and head_dim <= 256 and not softcap else
        "needs a CUDA device, torch 2.10, bf16 or fp16, heads of at most 256, no logit soft cap",
        "sdpa": "cannot soft-cap logits" if softcap else None,
        "eager": None,
    }  # fmt: skip
    if requested != "auto":
        if blockers[requested]:
            raise ConfigError(
                f"model.attention: {requested!r} {blockers[requested]}; set model.attention=auto"
            )
        return Choice(requested, "asked for")
    for backend in ("flash", "varlen", "sdpa", "eager"):
        if not blockers[backend]:
            return Choice(backend, "fastest that this device and model allow")
    raise AssertionError("eager has no blocker")


def install(model: torch.nn.Module, choice: Choice, *, exchange: Exchange | None = None) -> None:
    """Make a transformers model call `choice.backend` through its attention interface, and on
    parts of sequences through `exchange`.
    """
    from transformers import AttentionInterface

    def forward(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor,
        attention_mask: Tensor | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        assert attention_mask is None, "masks are built here, from cu_seqlens"
        arguments = _arguments(module, kwargs)

        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attend(query, key, value, backend=choice.backend, **arguments)

        if not kwargs.get(SHARDED):
            return run(query, key, value), None
        assert exchange is not None, "a part of a sequence, and no ranks to exchange it with"
        return exchange(run, query, key, value), None

    AttentionInterface.register(NAME, forward)
    model.config._attn_implementation = NAME  # type: ignore[union-attr]
    for module in model.modules():
        inner = getattr(module, "config", None)
        if inner is not None and hasattr(inner, "_attn_implementation"):
            inner._attn_implementation = NAME


def _arguments(module: torch.nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a transformers attention layer passes, in our names; unknown features are refused."""
    if kwargs.get("s_aux") is not None:
        raise ConfigError(
            f"model.path: {type(module).__name__} has attention sinks, "
            "which no backend here computes"
        )
    return {
        "cu_seqlens": kwargs.get("cu_seq_lens_q"),
        "max_length": kwargs.get("max_length_q"),
        "scale": kwargs.get("scaling"),
        "window": kwargs.get("sliding_window"),
        "softcap": kwargs.get("softcap"),
    }


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    backend: str,
    cu_seqlens: Tensor | None = None,
    max_length: int | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention; documents of a pack do not see each other.

    query: (B, H, S, C); key, value: (B, K, S, C) with K dividing H; out: (B, S, H, C), same dtype.
    cu_seqlens: (N + 1,) int32, offsets of the documents of the one packed row (B = 1); None for
    right-padded rows, where causality alone hides the padding from real tokens.
    window: positions a token sees, itself included; None for all.
    """
    CALLS[backend] += 1
    if backend in ("flash", "varlen") and cu_seqlens is None:
        batch, _, length, _ = query.shape
        cu_seqlens = torch.arange(
            0, (batch + 1) * length, length, dtype=torch.int32, device=query.device
        )
        max_length = length
    if backend in ("flash", "varlen"):
        assert cu_seqlens is not None and max_length is not None
        return _fused_varlen(
            query, key, value, backend, cu_seqlens, max_length, scale, window, softcap
        )
    plain = _sdpa if backend == "sdpa" else _eager
    if cu_seqlens is None:
        return plain(query, key, value, scale, window, softcap).transpose(1, 2)
    return _by_document(query, key, value, cu_seqlens, max_length, scale, window, softcap, plain)


def _fused_varlen(
    query: Tensor, key: Tensor, value: Tensor, backend: str, cu_seqlens: Tensor, max_length: int,
    scale: float | None, window: int | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    """flash-attn or torch varlen on (T, H, C); no host sync: cu_seqlens stays on the device."""
    batch, heads, length, width = query.shape
    q, k, v = (
        t.transpose(1, 2).reshape(batch * length, t.shape[1], width) for t in (query, key, value)
    )
    span = (window - 1, 0) if window else (-1, 0)
    if backend == "flash":
        from flash_attn import flash_attn_varlen_func

        out = flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, max_length, max_length,
            softmax_scale=scale, causal=True, window_size=span if window else (-1, -1),
            softcap=softcap or 0.0,
        )  # fmt: skip
    else:
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(
            q, k, v, cu_seqlens, cu_seqlens, max_length, max_length,
            scale=scale, window_size=span, enable_gqa=k.shape[1] != heads,
        )  # fmt: skip
    return out.view(batch, length, heads, width)


def _by_document(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_length: int | None,
    scale: float | None, window: int | None, softcap: float | None, plain: Any,
) -> Tensor:  # fmt: skip
    """Unpack (1, H, T, C) into (N, H, L, C) padded documents, attend causally, pack again.

    Costs N * L^2 in place of the T^2 of a block mask: a pack of 16 documents of 64 tokens is 16
    times less.
    """
    starts = cu_seqlens[:-1].long()  # (N,)
    lengths = cu_seqlens[1:].long() - starts  # (N,)
    longest = max_length if max_length is not None else int(lengths.max())
    steps = torch.arange(longest, device=query.device)
    index = starts[:, None] + steps  # (N, L)
    real = steps < lengths[:, None]
    gather = index.clamp(max=query.shape[2] - 1).flatten()  # (N * L,)

    def unpack(t: Tensor) -> Tensor:  # (1, H, T, C) -> (N, H, L, C)
        return (
            t[0].index_select(1, gather).view(t.shape[1], -1, longest, t.shape[3]).transpose(0, 1)
        )

    out = plain(unpack(query), unpack(key), unpack(value), scale, window, softcap)  # (N, H, L, C)
    packed = out.transpose(1, 2)[real]  # (T', H, C), T' = tokens in documents
    rest = query.shape[2] - packed.shape[0]
    if rest:  # padding behind the last document attends to nothing
        packed = F.pad(packed, (0, 0, 0, 0, 0, rest))
    return packed[None]


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """PyTorch's fused causal attention, (N, H, L, C)."""
    assert not softcap
    grouped = query.shape[1] != key.shape[1]
    if window is None or window >= query.shape[2]:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=grouped
        )
    mask = _band(query.shape[2], window, query.device)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped
    )


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """The plain reference: softmax(q k^T * scale) v with fp32 softmax, (N, H, L, C)."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = (
        query @ key.transpose(-1, -2) * (scale if scale is not None else query.shape[-1] ** -0.5)
    )
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~_band(query.shape[2], window, query.device), float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value


def _band(length: int, window: int | None, device: torch.device) -> Tensor:
    """(L, L) bool, True where a query may look: causal, at most `window` back."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)
