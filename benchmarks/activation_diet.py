"""B1: bytes kept for backward, a token and layer, ours against transformers and PEFT in one run.

    python -m benchmarks.activation_diet

Fake tensors: real code, real shapes (8B and all), no memory and no GPU. Counted with saved-tensor
hooks, each storage once, parameters left out; the slope between one and three layers, so that the
embedding and head drop out. Attention is a stub that keeps what FlashAttention keeps (q, k, v, o in
one layout, and the log-sum-exp) for everybody. FLOPs by FlopCounterMode, attention left out.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import record

TOKENS = 4096
RANK = 16
KIB = 1024
LLAMA = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 1024}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3-8b": (
        "Llama",
        {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32},
    ),
    "llama-3.2-1b": (
        "Llama",
        {
            **LLAMA,
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
        },
    ),
    "qwen3-8b": (
        "Qwen3",
        {**LLAMA, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32},
    ),
}


def _addmm_flops(_: Any, a: tuple[int, int], b: tuple[int, int], **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


# The counter knows addmm, not its in-place form, which is how adapters are accumulated here.
IN_PLACE: dict[Any, Any] = {torch.ops.aten.addmm_: _addmm_flops}


def _packed_flops(x: tuple[int, ...], _: Any, weight: tuple[int, int], *__: Any, **___: Any) -> int:
    return 2 * math.prod(x[:-1]) * weight[0] * weight[1]


def counted(*, nf4: bool) -> dict[Any, Any]:
    """Products that the counter does not know: ours, and bitsandbytes' of a packed weight."""
    if not nf4:
        return IN_PLACE
    import bitsandbytes  # noqa: F401  registers its ops

    return IN_PLACE | {torch.ops.bitsandbytes.gemm_4bit: _packed_flops}


@dataclass(frozen=True)
class Contender:
    """One way to train a layer."""

    name: str
    lora: bool = True
    adapters: torch.dtype = torch.bfloat16
    autocast: bool = False
    dropout: float = 0.0
    ops: bool = False
    """Our RMSNorm, RoPE and SwiGLU in place of transformers' (what Liger's would keep, too)."""
    diet: bool = False
    augmented: bool = False
    dora: bool = False
    nf4: bool = False
    """The layers' linears as bitsandbytes holds them for QLoRA."""


PEFT = Contender("PEFT, bf16 adapters")
OURS = Contender("ours, LoRA", ops=True, diet=True)
CONTENDERS = (
    OURS,
    replace(OURS, name="ours, LoRA, dropout 0.05", dropout=0.05),
    replace(OURS, name="ours, LoRA, augmented products", augmented=True),
    replace(OURS, name="ours, DoRA", dora=True),
    replace(OURS, name="ours, QLoRA", nf4=True),
    replace(OURS, name="ours, full", lora=False),
    PEFT,
    replace(PEFT, name="PEFT, bf16 adapters, DoRA", dora=True),
    replace(PEFT, name="PEFT, bf16 adapters, QLoRA", nf4=True),
    replace(PEFT, name="PEFT, bf16 adapters, fused elementwise ops", ops=True),
    replace(PEFT, name="PEFT, bf16 adapters, fused elementwise ops, QLoRA", ops=True, nf4=True),
    replace(PEFT, name="PEFT, fp32 adapters, autocast", adapters=torch.float32, autocast=True),
    replace(
        PEFT,
        name="PEFT, fp32 adapters, autocast, dropout 0.05",
        adapters=torch.float32,
        autocast=True,
        dropout=0.05,
    ),
    Contender("transformers, full", lora=False),
)


class _Flash(torch.autograd.Function):
    """Keeps what FlashAttention keeps; computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, tokens, width = q.shape
        o = q.new_empty(batch, tokens, heads, width)
        ctx.save_for_backward(q, k, v, o, q.new_empty(batch, heads, tokens, dtype=torch.float32))
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> Any:
    return _Flash.apply(q, k, v), None


def build(shape: str, contender: Contender, layers: int) -> nn.Module:
    """The model of a contender, ready to train; called under FakeTensorMode."""
    import transformers
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register("stub", _attention)
    family, sizes = SHAPES[shape]
    config = getattr(transformers, f"{family}Config")(
        **sizes, num_hidden_layers=layers, use_cache=False, tie_word_embeddings=False
    )
    config._attn_implementation = "stub"
    network: Any = getattr(transformers, f"{family}ForCausalLM")
    with _default_dtype(torch.bfloat16):
        model: Any = network(config)
    if contender.nf4:
        _quantise(model)
    if contender.ops:
        _patch(model, contender.diet)
    if contender.lora:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=RANK,
            target_modules="all-linear",
            lora_dropout=contender.dropout,
            use_dora=contender.dora,
        )
        with _default_dtype(contender.adapters), _unmoved():
            model = get_peft_model(model, lora, autocast_adapter_dtype=False)
        model.enable_input_require_grads()
    if contender.augmented:
        from tuneloom.kernels.augmented_lora import augment

        augment(model)
    trained: nn.Module = model.train()
    return trained


def _quantise(model: nn.Module) -> None:
    """Every linear of the layers becomes a Linear4bit whose NF4 weight was quantised before."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit

    for parent in [m for name, m in model.named_modules() if ".layers." in name]:
        for name, linear in list(parent.named_children()):
            if type(linear) is not nn.Linear:
                continue
            shape = linear.weight.shape
            with unset_fake_temporarily():  # no tensor of a class of its own can be fake
                four: Any = Linear4bit(
                    *shape[::-1], bias=False, compute_dtype=torch.bfloat16, device="meta"
                )
            packed: Any = nn.Parameter(
                torch.empty(shape.numel() // 2, 1, dtype=torch.uint8), requires_grad=False
            )
            packed.quant_type, packed.compress_statistics = "nf4", False
            packed.quant_state = four.quant_state = QuantState(
                absmax=torch.empty(shape.numel() // 64), shape=shape, code=torch.empty(16),
                blocksize=64, quant_type="nf4", dtype=torch.bfloat16,
            )  # fmt: skip
            four.weight = packed
            setattr(parent, name, four)


def _patch(model: nn.Module, diet: bool) -> None:
    from tuneloom.kernels.patch import patch, unpatch_module

    patch(model)
    for module in model.modules():
        if not diet and type(module).__name__.endswith("DecoderLayer"):
            unpatch_module(module)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _unmoved() -> Iterator[None]:
    """PEFT moves adapters to the base's device, which fake parameters refuse and do not need."""
    before = nn.Module.to
    nn.Module.to = lambda self, *_, **__: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.to = before  # type: ignore[method-assign]


def measure(shape: str, contender: Contender, layers: int) -> tuple[int, int]:
    """(bytes kept for backward, FLOPs of forward and backward) of one step over TOKENS tokens."""
    kept: dict[int, tuple[int, Tensor]] = {}
    # A drawn number cannot be read from a fake tensor.
    seeded = mock.patch("tuneloom.kernels.lora_linear.draw_seed", lambda: 0)
    with seeded, FakeTensorMode(allow_non_fake_inputs=True):
        model: Any = build(shape, contender, layers)
        owned = {p.untyped_storage()._cdata for p in model.parameters()}

        def keep(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage._cdata not in owned:
                kept[storage._cdata] = (storage.nbytes(), t)  # t held: an address is not reused
            return t

        autocast = torch.autocast("cpu", torch.bfloat16) if contender.autocast else None
        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        positions = torch.arange(TOKENS)[None]
        mapping = counted(nf4=contender.nf4)
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
            with hooks, autocast or contextlib.nullcontext():
                hidden = model.get_base_model().model if contender.lora else model.model
                out = hidden(input_ids=ids, position_ids=positions).last_hidden_state
            out.sum().backward()
    return sum(size for size, _ in kept.values()), counter.get_total_flops()


def per_layer(shape: str, contender: Contender) -> dict[str, float]:
    """KiB a token and layer, and FLOPs against 4 N + 6 n (LoRA) or 6 N (full) a token."""
    (one, one_flops), (three, three_flops) = (measure(shape, contender, n) for n in (1, 3))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model: Any = build(shape, replace(contender, nf4=False), 1)
        layer = next(m for n, m in model.named_modules() if n.endswith("layers.0"))
        matrices = [p for p in layer.parameters() if p.dim() == 2]
        adapters = sum(p.numel() for p in matrices if p.requires_grad) if contender.lora else 0
        base = sum(p.numel() for p in matrices) - adapters
    formula = (4 * base + 6 * adapters if contender.lora else 6 * base) * TOKENS
    return {
        "kib_per_token_layer": round((three - one) / 2 / TOKENS / KIB, 2),
        "flops_over_formula": round((three_flops - one_flops) / 2 / formula, 4),
    }


def run() -> dict[str, Any]:
    """Every contender on every shape, and the ratios the targets speak of."""
    shapes = {}
    for shape in SHAPES:
        table = {c.name: per_layer(shape, c) for c in CONTENDERS}
        kib = {name: row["kib_per_token_layer"] for name, row in table.items()}
        shapes[shape] = {
            "contenders": table,
            "ratios": {
                f"{peer} / {ours}": round(kib[peer] / kib[ours], 2)
                for peer, ours in _pairs(list(kib))
            },
        }
    return {"tokens": TOKENS, "rank": RANK, "shapes": shapes}


def _pairs(names: list[str]) -> Iterator[tuple[str, str]]:
    """Each peer with the contender of ours that trains the same."""
    for peer in names:
        if not peer.startswith("ours"):
            kinds = {"dropout 0.05": "ours, LoRA, dropout 0.05", "DoRA": "ours, DoRA"}
            kinds |= {"full": "ours, full", "QLoRA": "ours, QLoRA"}
            yield peer, next((k for end, k in kinds.items() if peer.endswith(end)), "ours, LoRA")


def main() -> int:
    """Run, write benchmarks/results/activation_diet.json, print the table."""
    argparse.ArgumentParser(description=__doc__.split("\n", 1)[0]).parse_args()
    warnings.filterwarnings("ignore")
    result = run()
    path = record.write("activation_diet", result, seed=0)
    for shape, found in result["shapes"].items():
        print(f"{shape}: KiB kept a token and layer, FLOPs over formula")
        for name, row in found["contenders"].items():
            print(f"  {name:45s} {row['kib_per_token_layer']:8.2f} {row['flops_over_formula']:.4f}")
        for pair, ratio in found["ratios"].items():
            print(f"  {pair:72s} {ratio:.2f}")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
