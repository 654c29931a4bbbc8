"""B8, one layer's linears and elementwise ops: ours against PEFT, Liger and the frozen base alone.

Linears: forward and backward of q, k, v; o; gate, up; down with adapters, as overhead over the same
linears frozen and bare. Elementwise: forward and backward, as a share of the copy bandwidth
measured in the same run (bytes that must move, over the time it took).
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.gpu.timing import UNLIKE, Plan, agreement, ceilings, device, failure, interleave
from tuneloom.kernels.augmented_lora import _augment
from tuneloom.kernels.lora_linear import linear_of, lora_linears
from tuneloom.kernels.rms_norm import add_rms_norm, rms_norm
from tuneloom.kernels.rope import rope
from tuneloom.kernels.swiglu import gated

Call = Callable[[], object]
LLAMA_8B = {"qkv": (4096, (4096, 1024, 1024)), "o": (4096, (4096,))}
LLAMA_8B |= {"gate_up": (4096, (14336, 14336)), "down": (14336, (4096,))}
TINY = {"qkv": (32, (32, 16, 16)), "gate_up": (32, (48, 48))}


def run(plan: Plan, dry: bool) -> dict[str, Any]:
    """Linears at each rank and length, then elementwise ops at each length."""
    lengths, ranks = ([16], [4]) if dry else ([2048, 8192, 32768], [16, 64])
    groups = TINY if dry else LLAMA_8B
    linears = [
        {"tokens": t, "rank": r, "group": name, **_group(t, r, *shape, plan)}
        for t in lengths
        for r in ranks
        for name, shape in groups.items()
    ]
    ceiling = ceilings(plan)
    elementwise = [{"tokens": t, **_elementwise(t, plan, ceiling, dry)} for t in lengths]
    return {"ceilings": ceiling, "linears": linears, "elementwise": elementwise}


class _Layer(nn.Module):
    """Linears that share an input."""

    def __init__(self, depth: int, outs: tuple[int, ...]) -> None:
        super().__init__()
        for i, out in enumerate(outs):
            self.add_module(f"part{i}", nn.Linear(depth, out, bias=False))


def _group(tokens: int, rank: int, depth: int, outs: tuple[int, ...], plan: Plan) -> dict[str, Any]:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    layer = _Layer(depth, outs).to(device(), torch.bfloat16).requires_grad_(False)
    bare = [getattr(layer, f"part{i}").weight for i in range(len(outs))]
    names = [f"part{i}" for i in range(len(outs))]
    adapted: Any = inject_adapter_in_model(LoraConfig(r=rank, target_modules=names), layer)
    adapted.to(torch.bfloat16)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zeros would hide dA from the gate
            nn.init.normal_(parameter, std=0.02)
    twin = copy.deepcopy(adapted)
    modules, wide = ([getattr(whole, name) for name in names] for whole in (adapted, twin))
    assert _augment(wide, len(wide)) == "augmented"
    x = torch.randn(tokens, depth, device=device(), dtype=torch.bfloat16, requires_grad=True)
    dys = [torch.randn(tokens, out, device=device(), dtype=torch.bfloat16) for out in outs]

    def step(outputs: Callable[[], Any], leaves: list[Tensor]) -> Call:
        return lambda: torch.autograd.grad(list(outputs()), leaves, dys)

    def leaves(whole: nn.Module) -> list[Tensor]:
        return [x, *(p for p in whole.parameters() if p.requires_grad)]

    def ours(parts: list[Any]) -> Callable[[], Any]:
        return lambda: lora_linears(x, tuple(linear_of(part) for part in parts))

    calls = {
        "frozen base alone": step(lambda: [functional.linear(x, w) for w in bare], [x]),
        "PEFT": step(lambda: [m(x) for m in modules], leaves(adapted)),
        "ours": step(ours(modules), leaves(adapted)),
        "ours, augmented": step(ours(wide), leaves(twin)),
    }
    truth = calls["PEFT"]()
    gates, not_run = _gated(calls, {"ours": truth, "ours, augmented": truth})
    calls = {name: call for name, call in calls.items() if name not in not_run}
    times = interleave(calls, plan)
    base = times["frozen base alone"].median_ms
    return {
        "parity": gates,
        "not_run": not_run,
        "times": {name: t.as_dict() for name, t in times.items()},
        "overhead": {n: round(t.median_ms / base - 1, 4) for n, t in times.items() if n in calls},
    }


def _elementwise(tokens: int, plan: Plan, ceiling: dict[str, float], dry: bool) -> dict[str, Any]:
    width, inner, heads, key_heads, head = (32, 48, 4, 2, 8) if dry else (4096, 14336, 32, 8, 128)
    torch.manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        kind = torch.bfloat16
        return torch.randn(*shape, device=device(), dtype=kind, requires_grad=True)

    x, residual, weight = leaf(tokens, width), leaf(tokens, width), leaf(width).detach()
    gate, up = leaf(tokens, inner), leaf(tokens, inner)
    q, k = leaf(1, heads, tokens, head), leaf(1, key_heads, tokens, head)
    angle = torch.randn(1, tokens, head, device=device(), dtype=torch.bfloat16)
    cos, sin = angle.cos(), angle.sin()
    ops: dict[str, tuple[Callable[[], Any], list[Tensor], int]] = {
        # name: (forward, leaves, numbers of 2 bytes that forward and backward must move a token)
        "rms_norm": (lambda: rms_norm(x, weight, 1e-5), [x], 5 * width),
        "add_rms_norm": (lambda: add_rms_norm(x, residual, weight, 1e-5), [x, residual], 8 * width),
        "rope": (lambda: rope(q, k, cos, sin), [q, k], 4 * (heads + key_heads) * head),
        "swiglu": (lambda: gated(gate, up), [gate, up], 8 * inner),
    } | _liger(x, weight, gate, up, q, k, cos, sin, width, inner, heads, key_heads, head)
    calls = {name: _forward_backward(forward, leaves) for name, (forward, leaves, _) in ops.items()}
    exact = _exact(x, residual, weight, gate, up, q, k, cos, sin)
    gates, not_run = _gated(
        {
            name: _forward_backward(f, leaves, torch.ones_like)
            for name, (f, leaves, _) in ops.items()
        },
        {name: exact[name.split(",")[0]] for name in calls},
    )
    calls = {name: call for name, call in calls.items() if name not in not_run}
    times = interleave(calls, plan)
    moved = {name: 2 * numbers * tokens for name, (_, _, numbers) in ops.items()}
    return {
        "parity": gates,
        "not_run": not_run,
        "times": {name: t.as_dict() for name, t in times.items()},
        "of_copy_bandwidth": {
            n: round(moved[n] / t.median_ms / 1e9 / ceiling["copy_tb_s"], 4)
            for n, t in times.items()
        },
    }


def _gated(calls: dict[str, Call], truths: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Gradients against those of `truths`, and why what fails, or differs, is not timed."""
    gates, not_run = {}, {}
    for name, truth in truths.items():
        try:
            gates[name] = agreement(_numbered(calls[name]()), _numbered(truth))
            reason = "" if gates[name]["passed"] else UNLIKE
        except Exception as error:
            reason = failure(error)
        if reason:
            not_run[name] = reason
    return gates, not_run


def _numbered(gradients: Any) -> dict[str, Tensor]:
    return {"loss": torch.zeros(()), **{str(i): g for i, g in enumerate(gradients)}}


def _exact(
    x: Tensor, residual: Tensor, weight: Tensor, gate: Tensor, up: Tensor, q: Tensor, k: Tensor,
    cos: Tensor, sin: Tensor,
) -> dict[str, Any]:  # fmt: skip
    """The gradients of each op in float64."""
    wide = [t.detach().double().requires_grad_() for t in (x, residual, gate, up, q, k)]
    x, residual, gate, up, q, k = wide
    weight, cos, sin = weight.double(), cos.double(), sin.double()
    half = cos.shape[-1] // 2

    def norm(t: Tensor) -> Tensor:
        return functional.rms_norm(t, t.shape[-1:], weight, 1e-5)

    def turned(t: Tensor) -> Tensor:
        c, s = cos[..., :half], sin[..., :half]
        a, b = t[..., :half], t[..., half:]
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    forwards: dict[str, tuple[Callable[[], Any], list[Tensor]]] = {
        "rms_norm": (lambda: norm(x), [x]),
        "add_rms_norm": (lambda: (norm(x + residual), x + residual), [x, residual]),
        "rope": (lambda: (turned(q), turned(k)), [q, k]),
        "swiglu": (lambda: functional.silu(gate) * up, [gate, up]),
    }
    return {n: _forward_backward(*f, torch.ones_like)() for n, f in forwards.items()}


def _forward_backward(
    forward: Callable[[], Any],
    leaves: list[Tensor],
    cotangent: Callable[[Tensor], Tensor] = Tensor.detach,
) -> Call:
    """`cotangent` of an output: itself, which costs nothing, but of itself a rotation and its
    opposite have the same gradient.
    """

    def call() -> object:
        out = forward()
        outs = list(out) if isinstance(out, tuple) else [out]
        return torch.autograd.grad(outs, leaves, [cotangent(o) for o in outs])

    return call


def _liger(
    x: Tensor, weight: Tensor, gate: Tensor, up: Tensor, q: Tensor, k: Tensor, cos: Tensor,
    sin: Tensor, width: int, inner: int, heads: int, key_heads: int, head: int,
) -> dict[str, Any]:  # fmt: skip
    if not (torch.cuda.is_available() and importlib.util.find_spec("liger_kernel")):
        return {}
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    turned = 4 * (heads + key_heads) * head
    return {
        "rms_norm, Liger": (
            lambda: LigerRMSNormFunction.apply(x, weight, 1e-5), [x], 5 * width
        ),
        "rope, Liger": (lambda: LigerRopeFunction.apply(q, k, cos, sin), [q, k], turned),
        "swiglu, Liger": (lambda: LigerSiLUMulFunction.apply(gate, up), [gate, up], 8 * inner),
    }  # fmt: skip
