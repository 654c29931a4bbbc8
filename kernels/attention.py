"""One attention for packed and padded batches: picks flash-attn, varlen, SDPA or eager, and says
which.

No attention is written here: `varlen` is `torch.nn.attention.varlen` (FlashAttention-2 in core),
`flash` is flash-attn 2, 3 or 4, whichever is installed and made for the GPU, `sdpa` is PyTorch's
fused kernel, `eager` is the plain reference. `install(model, choice)` makes a Hugging Face model
call it; `CALLS` counts what really ran, `REASONS` says why.

Shapes: T packed tokens, N documents, L longest document, H heads, K key/value heads, C head width.
"""

import functools
import importlib
import importlib.metadata
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tuneloom.errors import ConfigError

NAME = "tuneloom"
SHARDED = "sequence_sharded"
"""Keyword of a forward pass whose tokens are one rank's part of longer sequences."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Exchange = Callable[[Attend, Tensor, Tensor, Tensor], Tensor]
"""Runs an attention on whole sequences from parts of them (train/sequence.py)."""
CALLS: Counter[str] = Counter()
"""Calls per backend since import, or since `CALLS.clear()`; effects.json is written from it."""
DROPOUTS = ("attention_dropout", "attn_pdrop")
"""Keys of transformers' configs for the share of attention that training drops out."""
REASONS: dict[str, str] = {}
"""Why each backend was installed, the last time; stands in effects.json beside its calls."""


@dataclass(frozen=True)
class Choice:
    """The backend that a model will call, and why that one."""

    backend: str
    reason: str


@dataclass(frozen=True)
class Flash:
    """A generation of flash-attn: all have one `flash_attn_varlen_func` and the same keywords."""

    distribution: str
    module: str
    majors: tuple[int, ...]
    """Compute capabilities that it is taken on."""
    widest: int
    """Head."""
    multiple: int = 8
    """Head widths that it takes; flash-attn 2 pads the others itself."""


# The newest that has kernels of its own for the GPU first. flash-attn 2 ships a `flash_attn.cute`,
# too, of another signature, and flash-attn 4 a `flash_attn` of nothing else: the distribution says
# which is there. Signatures: flash-attn 2.8.3.post2 (hopper/ is 3), flash-attn-4 4.0.0b36.
GENERATIONS = (
    Flash("flash-attn-4", "flash_attn.cute", (10, 11), 128),
    Flash("flash-attn-3", "flash_attn_interface", (9,), 256),
    Flash("flash-attn", "flash_attn", (8, 9, 10, 11, 12), 256, multiple=1),
)


def flash(head_dim: int) -> Flash | None:
    """The generation of flash-attn that this GPU runs heads of `head_dim` with."""
    if not torch.cuda.is_available():
        return None
    major, _ = torch.cuda.get_device_capability()
    return next(
        (
            generation
            for generation in GENERATIONS
            if major in generation.majors
            and head_dim <= generation.widest
            and head_dim % generation.multiple == 0
            and version(generation.distribution)
        ),
        None,
    )


@functools.cache
def version(distribution: str) -> str | None:
    """Of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def has_varlen() -> bool:
    """`torch.nn.attention.varlen` takes scales, windows and grouped heads (torch 2.12)."""
    try:
        module = importlib.import_module("torch.nn.attention.varlen")
    except ImportError:
        return False
    known = inspect.signature(module.varlen_attn).parameters
    return {"scale", "window_size", "enable_gqa"} <= set(known)


def widths(text: Any) -> tuple[int, int]:
    """Of a query's head and of a value's, by a text model's config: latent attention (MLA) names
    both, and there `head_dim` is the rotary part's alone.
    """
    parts = [getattr(text, f"{part}_head_dim", None) or 0 for part in ("qk_nope", "qk_rope", "v")]
    if all(parts):
        return parts[0] + parts[1], parts[2]
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return width, width


def choose(
    requested: str, *, dtype: torch.dtype, head_dim: int, softcap: float | None,
    dropout: bool = False, value_dim: int | None = None,
) -> Choice:  # fmt: skip
    """Backend for `model.attention=requested`; raises ConfigError when it was named and cannot
    run. `value_dim` is a value's width where a query's `head_dim` is another.
    """
    narrow = value_dim not in (None, head_dim)
    rest = "cannot drop attention out" if dropout else None
    rest = f"needs values as wide as queries ({value_dim}, {head_dim})" if narrow else rest
    lacks = {
        "flash": _lacks_flash(dtype, head_dim) or rest,
        "varlen": _lacks_varlen(dtype, head_dim, softcap) or rest,
        "sdpa": "cannot soft-cap logits" if softcap else None,
        "eager": None,
    }
    if requested != "auto":
        if lacks[requested]:
            raise ConfigError(
                f"model.attention: {requested!r} {lacks[requested]}; set model.attention=auto"
            )
        return Choice(requested, "asked for")
    backend = next(name for name, lack in lacks.items() if not lack)
    passed = [f"{name} {lack}" for name, lack in lacks.items() if lack]
    found = flash(head_dim) if backend == "flash" else None
    what = [f"{found.distribution} {version(found.distribution)}"] if found else []
    return Choice(backend, "; ".join(what + passed) or "the fastest")


def _lacks_flash(dtype: torch.dtype, head_dim: int) -> str | None:
    if lack := _lacks_fused(dtype, head_dim):
        return lack
    if flash(head_dim) is None:
        return "needs a flash-attn for this GPU (extra `flash`)"
    return None


def _lacks_varlen(dtype: torch.dtype, head_dim: int, softcap: float | None) -> str | None:
    if lack := _lacks_fused(dtype, head_dim):
        return lack
    if not has_varlen():
        return f"needs torch 2.12 (this is {torch.__version__})"
    if head_dim % 8:
        return "needs heads whose width 8 divides"
    return "cannot soft-cap logits" if softcap else None


def _lacks_fused(dtype: torch.dtype, head_dim: int) -> str | None:
    """What every FlashAttention needs."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs Ampere or a newer GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return "needs bf16 or fp16"
    return "needs heads of at most 256" if head_dim > 256 else None


def install(model: torch.nn.Module, choice: Choice, *, exchange: Exchange | None = None) -> None:
    """Make a transformers model call `choice.backend` through its attention interface, and on
    parts of sequences through `exchange`.
    """
    from transformers import AttentionInterface

    REASONS[choice.backend] = choice.reason

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
    """What a transformers attention layer passes, in our names. Patterns that stand in its mask
    alone are refused before (train/patterns.py).
    """
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
        "dropout": kwargs.get("dropout") or 0.0,
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
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention; documents of a pack do not see each other.

    query: (B, H, S, C); key, value: (B, K, S, C) with K dividing H; out: (B, S, H, C), same dtype.
    Values of another width, and so an output: sdpa and eager only.
    cu_seqlens: (N + 1,) int32, offsets of the documents of the one packed row (B = 1); None for
    right-padded rows, where causality alone hides the padding from real tokens.
    window: positions a token sees, itself included; None for all.
    dropout: share of the softmax that is dropped; sdpa and eager only.
    """
    CALLS[backend] += 1
    if query.shape[1] % key.shape[1] or key.shape[:2] != value.shape[:2]:
        raise ValueError(
            f"attend: expected heads of key and value that divide query's {query.shape[1]}, got "
            f"{key.shape[1]} and {value.shape[1]}"
        )
    if query.shape[3] != value.shape[3] and backend not in ("sdpa", "eager"):
        raise ConfigError(
            f"model.attention: {backend} needs values as wide as queries, and this model has "
            f"{value.shape[3]} and {query.shape[3]}; set model.attention=sdpa"
        )
    if dropout and backend not in ("sdpa", "eager"):
        raise ConfigError(
            f"model.attention: {backend} cannot drop attention out, and this model drops {dropout} "
            "of it; set model.attention=sdpa"
        )
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
    plain = functools.partial(_sdpa if backend == "sdpa" else _eager, dropout)
    if cu_seqlens is None:
        return plain(query, key, value, scale, window, softcap).transpose(1, 2)
    return _by_document(query, key, value, cu_seqlens, scale, window, softcap, plain)


def _fused_varlen(
    query: Tensor, key: Tensor, value: Tensor, backend: str, cu_seqlens: Tensor, max_length: int,
    scale: float | None, window: int | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    """flash-attn or torch varlen on (T, H, C); no host sync: cu_seqlens stays on the device."""
    batch, heads, length, width = query.shape
    q, k, v = (
        t.transpose(1, 2).reshape(batch * length, t.shape[1], width) for t in (query, key, value)
    )
    out: Any
    if backend == "flash":
        out = _flash(q, k, v, cu_seqlens, max_length, scale, window, softcap)
    else:
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(
            q, k, v, cu_seqlens, cu_seqlens, max_length, max_length,
            scale=scale, window_size=(window - 1, 0) if window else (-1, 0),
            enable_gqa=k.shape[1] != heads,
        )  # fmt: skip
    return out.view(batch, length, heads, width)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int,
    scale: float | None, window: int | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    """The installed flash-attn on (T, H, C)."""
    generation = flash(q.shape[-1])
    assert generation is not None, "chosen without being there"
    function = importlib.import_module(generation.module).flash_attn_varlen_func
    out = function(
        q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_length,
        max_seqlen_k=max_length, softmax_scale=scale, causal=True,
        window_size=(window - 1, 0) if window else (-1, -1), softcap=softcap or 0.0,
    )  # fmt: skip
    attended: Tensor = out[0] if isinstance(out, tuple) else out  # 4 gives its log-sum-exp, too
    return attended


def _by_document(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float | None,
    window: int | None, softcap: float | None, plain: Any,
) -> Tensor:  # fmt: skip
    """Unpack (1, H, T, C) into groups of (N, H, L, C) padded documents, attend causally, pack
    again; padding behind the last document attends to nothing.
    """
    layout = LAYOUTS.get(cu_seqlens)
    if layout is None:
        bounds = HOSTS.get(cu_seqlens, cu_seqlens).tolist()
        layout = LAYOUTS[cu_seqlens] = _layout(bounds, query.device)
    tokens, rows = query.shape[2], []
    for longest, gather in layout.groups:

        def unpack(t: Tensor, gather: Tensor = gather, longest: int = longest) -> Tensor:
            """(1, H, T, C) -> (N, H, L, C)"""
            taken = t[0].index_select(1, gather)
            return taken.view(t.shape[1], -1, longest, t.shape[3]).transpose(0, 1)

        attended = plain(unpack(query), unpack(key), unpack(value), scale, window, softcap)
        rows.append(attended.transpose(1, 2).flatten(0, 1))  # (N * L, H, C)
    padded = rows[0] if len(rows) == 1 else torch.cat(rows)
    packed = padded.index_select(0, layout.back)  # (T', H, C), T' = tokens in documents
    rest = tokens - packed.shape[0]
    return (F.pad(packed, (0, 0, 0, 0, 0, rest)) if rest else packed)[None]


@dataclass(frozen=True)
class Layout:
    """A pack's documents as groups of padded ones, on the device that attends to them."""

    groups: list[tuple[int, Tensor]]
    """L, and (N * L,) int64: each document's tokens, then those behind it, which none sees."""
    back: Tensor
    """(T',) int64: of each token in documents, the row of all groups' that is its own."""


LAYOUTS: MutableMapping[Tensor, Layout] = WeakTensorKeyDictionary()
"""Of the packs that live, by their cu_seqlens, which nobody writes to: all layers of a pack share
one."""
HOSTS: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()
"""cu_seqlens on a GPU, and the same on the host: the documents' lengths decide the shapes of their
groups, and who has them here need not wait for the GPU."""


def _layout(bounds: list[int], device: torch.device) -> Layout:
    """Of documents with these offsets."""
    groups, own, row = [], {}, 0
    for group in _alike(bounds):
        starts, lengths = (torch.tensor(each)[:, None] for each in zip(*group, strict=True))
        longest = max(1, int(lengths.max()))  # a pack without documents keeps its graph
        index = (starts + torch.arange(longest)).clamp(max=max(0, bounds[-1] - 1))  # (N, L)
        groups.append((longest, _moved(index.flatten(), device)))
        for start, length in group:
            own[start] = torch.arange(row, row + length)
            row += longest
    back = torch.cat([own[start] for start in sorted(own)])
    return Layout(groups, _moved(back, device))


def _moved(t: Tensor, device: torch.device) -> Tensor:
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)


def _alike(bounds: list[int]) -> list[list[tuple[int, int]]]:
    """Starts and lengths of the documents in groups that, padded, have at most twice their tokens:
    one group where that will do, else each of documents longer than half of its longest.
    """
    spans = [(start, stop - start) for start, stop in itertools.pairwise(bounds) if stop > start]
    longest = max((length for _, length in spans), default=0)
    if len(spans) * longest <= 2 * bounds[-1]:
        return [spans or [(0, 0)]]
    groups: list[list[tuple[int, int]]] = []
    for span in sorted(spans, key=lambda span: -span[1]):
        if not groups or 2 * span[1] <= groups[-1][0][1]:
            groups.append([])
        groups[-1].append(span)
    return groups


def _sdpa(
    dropout: float,
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
            query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped
        )
    mask = _band(query.shape[2], window, query.device)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=grouped
    )


def _eager(
    dropout: float,
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
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(shares, dropout) @ value


def _band(length: int, window: int | None, device: torch.device) -> Tensor:
    """(L, L) bool, True where a query may look: causal, at most `window` back."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)
