"""Attention: every plain backend against float64; which one is chosen where, and why."""

from __future__ import annotations

import itertools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tuneloom.errors import ConfigError
from tuneloom.kernels import attention
from tuneloom.kernels.attention import attend, choose

HEADS, KEY_HEADS, WIDTH = 6, 2, 8
DOCUMENTS = [0, 5, 6, 6, 17, 19]  # one of a single token, one of none
TOKENS = 22  # three of padding behind the last document
Monkey = pytest.MonkeyPatch
TOLERANCE = {"sdpa": 1e-12, "eager": 2e-6}
"""eager's softmax is fp32, whatever comes in."""


def formula(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """One document, one query at a time: (H, L, C) and (K, L, C) to (L, H, C)."""
    rows = []
    for t in range(q.shape[1]):
        first = 0 if window is None else max(0, t - window + 1)
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // KEY_HEADS)
            scores = k[group, first : t + 1] @ q[head, t] * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            heads.append(scores.softmax(0) @ v[group, first : t + 1])
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def leaves(rows: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, heads, TOKENS, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in shapes
    ]


@pytest.mark.parametrize(("backend", "softcap"), [("sdpa", None), ("eager", None), ("eager", 1.5)])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_and_its_gradients_are_those_of_the_formula_in_float64(
    backend: str, window: int | None, softcap: float | None, scale: float | None, packed: bool
) -> None:
    inputs, exact = leaves(1 if packed else 2), leaves(1 if packed else 2)
    asked: dict[str, Any] = {"window": window, "softcap": softcap, "scale": scale}
    if packed:
        asked |= {"cu_seqlens": torch.tensor(DOCUMENTS, dtype=torch.int32), "max_length": 11}
    out = attend(*inputs, backend=backend, **asked)

    settings = (WIDTH**-0.5 if scale is None else scale, window, softcap)
    if packed:
        parts = [
            formula(*(t[0, :, start:stop] for t in exact), *settings)
            for start, stop in itertools.pairwise(DOCUMENTS)
            if stop > start
        ]
        padding = torch.zeros(TOKENS - DOCUMENTS[-1], HEADS, WIDTH, dtype=torch.float64)
        expected = torch.cat([*parts, padding])[None]
    else:
        expected = torch.stack([formula(*(t[row] for t in exact), *settings) for row in range(2)])
    tolerance = TOLERANCE[backend]
    torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)
    cotangent = torch.randn_like(expected)
    out.backward(cotangent)
    expected.backward(cotangent)
    for got, truth in zip(inputs, exact, strict=True):
        torch.testing.assert_close(got.grad, truth.grad, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize(("heads", "keys", "values"), [(6, 4, 4), (6, 2, 3)])
def test_heads_that_do_not_divide_are_refused(heads: int, keys: int, values: int) -> None:
    inputs = [torch.randn(1, h, 5, WIDTH) for h in (heads, keys, values)]
    with pytest.raises(ValueError, match=f"divide query's 6, got {keys} and {values}"):
        attend(*inputs, backend="sdpa")


def test_lengths_that_are_on_the_host_are_read_there(monkeypatch: Monkey) -> None:
    """A GPU would be waited for; `meta` cannot be read at all."""
    laid: list[list[int]] = []

    def seen(bounds: list[int], device: torch.device) -> Any:
        laid.append(bounds)
        raise KeyboardInterrupt

    monkeypatch.setattr(attention, "_layout", seen)
    inputs = [torch.randn(1, h, 5, WIDTH, device="meta") for h in (HEADS, KEY_HEADS, KEY_HEADS)]
    offsets = torch.tensor([0, 3, 5], dtype=torch.int32)
    moved = offsets.to("meta")
    attention.HOSTS[moved] = offsets
    with pytest.raises(KeyboardInterrupt):
        attend(*inputs, backend="sdpa", cu_seqlens=moved)
    assert laid == [[0, 3, 5]]


def test_the_longest_document_need_not_be_told() -> None:
    offsets = torch.tensor(DOCUMENTS, dtype=torch.int32)
    told, untold = (
        attend(*leaves(1), backend="sdpa", cu_seqlens=offsets, max_length=longest)
        for longest in (11, None)
    )
    torch.testing.assert_close(told, untold, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_short_documents_beside_a_long_one_are_not_padded_to_it(
    monkeypatch: Monkey, backend: str
) -> None:
    sizes = [64, 40, *[3] * 100, 2, 1]
    offsets = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
    seen: list[int] = []
    run = getattr(attention, f"_{backend}")

    def counted(dropout: float, query: Tensor, *rest: Any) -> Tensor:
        seen.append(query.shape[0] * query.shape[2])
        attended: Tensor = run(dropout, query, *rest)
        return attended

    monkeypatch.setattr(attention, f"_{backend}", counted)
    q, k, v = (torch.randn(1, h, sum(sizes), WIDTH) for h in (HEADS, KEY_HEADS, KEY_HEADS))
    out = attend(q, k, v, backend=backend, cu_seqlens=offsets, max_length=64)
    assert 2 < len(seen) < 7 and sum(seen) <= 2 * sum(sizes)  # padded to 64 they were 6656 of 407
    for start, stop in itertools.pairwise(offsets.tolist()):
        alone = attend(*(t[:, :, start:stop] for t in (q, k, v)), backend=backend)
        torch.testing.assert_close(out[:, start:stop], alone)


@pytest.mark.parametrize("sizes", [[64, *[3] * 100], [9, 5, 5, 9]])
def test_the_layers_of_a_pack_share_its_layout(monkeypatch: Monkey, sizes: list[int]) -> None:
    laid: list[list[int]] = []
    layouts, plain = WeakTensorKeyDictionary(), attention._layout
    monkeypatch.setattr(attention, "LAYOUTS", layouts)
    monkeypatch.setattr(
        attention, "_layout", lambda bounds, _: laid.append(bounds) or plain(bounds, _)
    )
    inputs = [torch.randn(1, h, sum(sizes), WIDTH) for h in (HEADS, KEY_HEADS, KEY_HEADS)]
    for _ in range(2):
        offsets = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
        for _ in range(3):
            attend(*inputs, backend="sdpa", cu_seqlens=offsets)
    assert len(laid) == 2
    del offsets
    assert not len(layouts)


def test_a_pack_of_like_documents_is_one_group_in_its_own_order(monkeypatch: Monkey) -> None:
    sizes, seen = [5, 9, 7, 5, 9], []
    plain = attention._sdpa

    def noted(dropout: float, query: Tensor, *rest: Any) -> Tensor:
        seen.append(query.detach())
        return plain(dropout, query, *rest)

    monkeypatch.setattr(attention, "_sdpa", noted)
    offsets = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
    q = torch.arange(sum(sizes), dtype=torch.float32).expand(1, HEADS, WIDTH, -1).transpose(2, 3)
    attend(q, q, q, backend="sdpa", cu_seqlens=offsets)
    assert len(seen) == 1 and seen[0][:, 0, 0, 0].tolist() == offsets[:-1].tolist()


def test_a_pack_without_documents_attends_to_nothing_and_keeps_its_graph() -> None:
    inputs = leaves(1)
    out = attend(*inputs, backend="sdpa", cu_seqlens=torch.zeros(3, dtype=torch.int32))
    out.sum().backward()
    assert not out.any() and all(t.grad is not None and not t.grad.any() for t in inputs)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [None, 5])
def test_the_share_of_attention_that_is_asked_for_is_dropped(
    backend: str, window: int | None
) -> None:
    q = torch.zeros(64, HEADS, WIDTH, WIDTH)  # attends evenly to what it sees
    v = torch.eye(WIDTH).expand(64, KEY_HEADS, WIDTH, WIDTH)
    seen = attend(q, q[:, :KEY_HEADS], v, backend=backend, window=window)
    out = attend(q, q[:, :KEY_HEADS], v, backend=backend, window=window, dropout=0.25)
    kept = (out / seen)[seen > 0]
    torch.testing.assert_close(kept[kept > 0], torch.full_like(kept[kept > 0], 1 / 0.75))
    assert (kept == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_model_drops_attention_out_in_training_alone(backend: str) -> None:
    import transformers

    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=61, attn_pdrop=0.5, resid_pdrop=0, embd_pdrop=0
    )
    model = transformers.GPT2LMHeadModel(config)
    attention.install(model, attention.Choice(backend, "test"))
    ids = torch.arange(1, 12)[None]
    one, other = (model.train()(ids).logits for _ in range(2))
    assert not torch.equal(one, other)
    one, other = (model.eval()(ids).logits for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["flash", "varlen"])
def test_a_backend_that_cannot_drop_attention_out_does_not_pass_over_it(backend: str) -> None:
    with pytest.raises(ConfigError, match=rf"{backend} cannot drop attention out.*drops 0\.1"):
        attend(*leaves(1), backend=backend, dropout=0.1)


def test_values_narrower_than_queries_are_attended_to_or_refused() -> None:
    q, k, v = leaves(1)
    narrow = v[..., : WIDTH // 2]
    for backend in ("sdpa", "eager"):
        whole, part = (attend(q, k, values, backend=backend) for values in (v, narrow))
        torch.testing.assert_close(part, whole[..., : WIDTH // 2], rtol=0, atol=TOLERANCE[backend])
    for backend in ("flash", "varlen"):
        with pytest.raises(ConfigError, match=rf"{backend} needs values as wide .*has 4 and 8"):
            attend(q, k, narrow, backend=backend)


def varlen_of_torch_2_10(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int,
    max_k: int, is_causal: bool = False, return_aux: Any = None,
) -> Tensor:  # fmt: skip
    raise AssertionError("is not called")


def machine(monkeypatch: Monkey, major: int | None, *, varlen: bool = True, **there: str) -> None:
    """A machine with a GPU of compute capability `major`.0, or none, and these distributions."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: major is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    if varlen:
        monkeypatch.setattr(attention, "has_varlen", lambda: True)
    else:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_of_torch_2_10)
    monkeypatch.setattr(attention, "version", lambda name: there.get(name.replace("-", "_")))


TWO, THREE, FOUR = {"flash_attn": "2.8.3"}, {"flash_attn_3": "3.0.0"}, {"flash_attn_4": "4.0.0"}


@pytest.mark.parametrize(
    ("major", "there", "model", "backend", "reason"),
    [
        (None, TWO, {}, "sdpa", "flash needs a CUDA device; varlen needs a CUDA device"),
        (None, {}, {"softcap": 50.0}, "eager", "sdpa cannot soft-cap logits"),
        (7, TWO, {}, "sdpa", "flash needs Ampere or a newer GPU; varlen needs Ampere"),
        (9, {}, {}, "varlen", "flash needs a flash-attn for this GPU (extra `flash`)"),
        (9, {}, {"dtype": torch.float32}, "sdpa", "varlen needs bf16 or fp16"),
        (9, {}, {"softcap": 50.0}, "eager", "varlen cannot soft-cap logits; sdpa cannot"),
        (9, TWO, {"head_dim": 512}, "sdpa", "flash needs heads of at most 256"),
        (8, TWO, {}, "flash", "flash-attn 2.8.3"),
        (9, TWO, {"softcap": 50.0}, "flash", "flash-attn 2.8.3"),
        (9, TWO | THREE | FOUR, {}, "flash", "flash-attn-3 3.0.0"),
        (8, TWO | THREE | FOUR, {}, "flash", "flash-attn 2.8.3"),
        (10, TWO | THREE | FOUR, {}, "flash", "flash-attn-4 4.0.0"),
        (9, TWO, {"dropout": True}, "sdpa", "flash cannot drop attention out; varlen cannot drop"),
        (10, TWO | FOUR, {"head_dim": 256}, "flash", "flash-attn 2.8.3"),
        (9, {}, {"head_dim": 100}, "sdpa", "varlen needs heads whose width 8 divides"),
        (9, TWO | THREE, {"head_dim": 100}, "flash", "flash-attn 2.8.3"),
        (9, FOUR, {}, "varlen", "flash needs a flash-attn for this GPU"),
        (8, THREE, {}, "varlen", "flash needs a flash-attn for this GPU"),
    ],
)
def test_the_fastest_backend_that_is_there_is_taken_and_says_why(
    monkeypatch: Monkey, major: int | None, there: dict[str, str], model: dict[str, Any],
    backend: str, reason: str,
) -> None:  # fmt: skip
    machine(monkeypatch, major, **there)
    found = choose("auto", **({"dtype": torch.bfloat16, "head_dim": 128, "softcap": None} | model))
    assert found.backend == backend and reason in found.reason


def test_a_varlen_without_windows_and_grouped_heads_is_not_taken(monkeypatch: Monkey) -> None:
    machine(monkeypatch, 9, varlen=False)
    found = choose("auto", dtype=torch.bfloat16, head_dim=128, softcap=None)
    assert found.backend == "sdpa"
    assert f"varlen needs torch 2.12 (this is {torch.__version__})" in found.reason
    with pytest.raises(ConfigError, match=r"'varlen' needs torch 2\.12"):
        choose("varlen", dtype=torch.bfloat16, head_dim=128, softcap=None)


@pytest.mark.parametrize("backend", ["flash", "varlen"])
def test_a_backend_that_was_named_and_cannot_run_is_refused(
    monkeypatch: Monkey, backend: str
) -> None:
    machine(monkeypatch, 9, **FOUR)
    with pytest.raises(ConfigError, match=rf"model\.attention: '{backend}' needs bf16 or fp16"):
        choose(backend, dtype=torch.float32, head_dim=128, softcap=None)
    machine(monkeypatch, None)
    with pytest.raises(ConfigError, match=r"needs a CUDA device; set model\.attention=auto"):
        choose(backend, dtype=torch.bfloat16, head_dim=128, softcap=None)


def plain(q: Tensor, k: Tensor, v: Tensor, keywords: dict[str, Any]) -> Tensor:
    """What flash-attn computes, (T, H, C), by the reference."""
    assert keywords["causal"] and keywords["cu_seqlens_q"] is keywords["cu_seqlens_k"]
    left, right = keywords["window_size"]
    assert (left, right) == (-1, -1) or (left >= 0 and right == 0)
    return attend(
        *(t.transpose(0, 1)[None] for t in (q, k, v)), backend="eager",
        cu_seqlens=keywords["cu_seqlens_q"], max_length=keywords["max_seqlen_k"],
        scale=keywords["softmax_scale"], window=left + 1 or None, softcap=keywords["softcap"],
    )[0]  # fmt: skip


# The parameters of flash-attn 2.8.3.post2, of its hopper/ (3) and of flash-attn-4 4.0.0b36, as far
# as they come before or are what is passed.
def second(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False,
    window_size: Any = (-1, -1), softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    return plain(q, k, v, locals())


def third(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int,
    max_seqlen_k: int, seqused_q: Any = None, seqused_k: Any = None, softmax_scale: Any = None,
    causal: bool = False, qv: Any = None, window_size: Any = (-1, -1), softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    return plain(q, k, v, locals())


def fourth(
    q: Any, k: Any, v: Any, qv: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
    max_seqlen_q: Any = None, max_seqlen_k: Any = None, softmax_scale: Any = None,
    causal: bool = False, window_size: Any = (None, None), softcap: float = 0.0,
) -> tuple[Tensor, None]:  # fmt: skip
    return plain(q, k, v, locals()), None


@pytest.mark.parametrize(
    ("major", "there", "module", "function"),
    [
        (8, TWO, "flash_attn", second),
        (9, THREE, "flash_attn_interface", third),
        (10, FOUR, "flash_attn.cute", fourth),
    ],
)
@pytest.mark.parametrize(("window", "softcap", "scale"), [(None, None, None), (4, 1.5, 0.7)])
def test_each_flash_attn_is_called_by_the_names_it_knows(
    monkeypatch: Monkey, major: int, there: dict[str, str], module: str, function: Any,
    window: int | None, softcap: float | None, scale: float | None,
) -> None:  # fmt: skip
    stand_in: Any = ModuleType(module)
    stand_in.flash_attn_varlen_func = function
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, module, stand_in)
    machine(monkeypatch, major, **there)
    asked: dict[str, Any] = {"window": window, "softcap": softcap, "scale": scale}
    asked |= {"cu_seqlens": torch.tensor([0, 5, TOKENS], dtype=torch.int32), "max_length": 17}
    inputs = leaves(1)
    expected = attend(*inputs, backend="eager", **asked)
    assert torch.equal(attend(*inputs, backend="flash", **asked), expected)
