"""The activation diet: a decoder layer keeps inputs of matrix products and recomputes the rest.

    x -> norm -> q, k, v -> rope -> attention o -> o_proj -> + x = x2
    x2 -> norm -> e, g -> act(e) g -> down -> + x2

Kept for backward, at Llama-3-8B's shape in bf16, KiB a token and layer: x 8, q 8, k 2, v 2, o 8,
log-sum-exp 0.1, x2 8, e 28, g 28, adapters' products 0.2 (benchmarks/activation_diet.py counts it,
beside PEFT). Norm outputs and act(e) g are recomputed in backward, both elementwise: no matrix
product runs twice, so a step costs what it costs without checkpointing.

`norm_linears`: x (..., D) -> norm -> linears that share it. `add_norm_mlp`: the second half of the
layer, residual included. `layer_forward` is a Llama-like layer's forward made of them; attention
runs the layer's own code (transformers'), its projections answered from here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tuneloom.kernels.jit import CALLS
from tuneloom.kernels.lora_linear import (
    Linear,
    Unsupported,
    linear_of,
    lora_linears,
    project,
    project_backward,
    refuse_hooks,
)
from tuneloom.kernels.rms_norm import normalise, normalise_backward
from tuneloom.kernels.swiglu import Activation, gate_backward, gate_forward


def norm_linears(
    x: Tensor, norm_weight: Tensor, eps: float, linears: tuple[Linear, ...]
) -> tuple[Tensor, ...]:
    """The linears of rms_norm(x); x is kept, its norm is not."""
    flat = [t for linear in linears for t in linear.tensors()]
    ys: tuple[Tensor, ...] = _NormLinears.apply(x, norm_weight, eps, linears, *flat)
    return ys


class _NormLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, linears: tuple[Linear, ...], *flat: Tensor
    ) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        normed, rows, scale = normalise(rows.contiguous(), weight, eps, 0.0)
        ys, ctx.kept = project(normed, linears)
        ctx.eps = eps
        ctx.save_for_backward(rows, weight, scale, *ctx.kept.products)
        return tuple(y.view(*x.shape[:-1], -1) for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, scale, *products = ctx.saved_tensors
        needs = ctx.needs_input_grad
        normed, _, _ = normalise(rows, weight, ctx.eps, 0.0)
        flat = [dy.reshape(rows.shape[0], -1) for dy in dys]
        wants_x = needs[0] or needs[1]
        dnormed, gradients = project_backward(flat, normed, products, ctx.kept, wants_x, needs[4:])
        if dnormed is None:
            return None, None, None, None, *gradients
        dx, dweight = normalise_backward(
            dnormed, rows, weight, scale, 0.0, dtotal=None, wants_weight=needs[1]
        )
        return dx.view(*dys[0].shape[:-1], -1), dweight, None, None, *gradients


def add_norm_mlp(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    linears: tuple[Linear, Linear, Linear],
    activation: Activation,
) -> Tensor:
    """s + down(act(gate(n)) * up(n)) with s = x + residual, n = rms_norm(s); keeps s, gate, up."""
    flat = [t for linear in linears for t in linear.tensors()]
    y: Tensor = _AddNormMlp.apply(x, residual, norm_weight, eps, linears, activation, *flat)
    return y


class _AddNormMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        linears: tuple[Linear, ...],
        activation: Activation,
        *flat: Tensor,
    ) -> Tensor:
        rows, residual_rows = (t.reshape(-1, t.shape[-1]).contiguous() for t in (x, residual))
        normed, total, scale = normalise(rows, weight, eps, 0.0, residual=residual_rows)
        (gate, up), ctx.first = project(normed, linears[:2])
        (y,), ctx.second = project(gate_forward(gate, up, activation), linears[2:])
        ctx.eps, ctx.activation, ctx.products = eps, activation, len(ctx.first.products)
        products = [*ctx.first.products, *ctx.second.products]
        ctx.save_for_backward(total, weight, scale, gate, up, *products)
        return (total + y).view(x.shape)  # not in place: DoRA keeps y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, scale, gate, up, *products = ctx.saved_tensors
        needs = ctx.needs_input_grad
        rows = dy.reshape(total.shape).contiguous()
        h = gate_forward(gate, up, ctx.activation)
        dh, last = project_backward(
            [rows], h, products[ctx.products :], ctx.second, True, needs[16:]
        )
        assert dh is not None
        dgate, dup = h, torch.empty_like(dh)  # h is not needed any more
        gate_backward(dh, gate, up, ctx.activation, dgate, dup)
        del dh
        normed, _, _ = normalise(total, weight, ctx.eps, 0.0)
        dnormed, gradients = project_backward(
            [dgate, dup], normed, products[: ctx.products], ctx.first, True, needs[6:16]
        )
        assert dnormed is not None
        dtotal, dweight = normalise_backward(
            dnormed, total, weight, scale, 0.0, dtotal=rows, wants_weight=needs[2]
        )
        dtotal = dtotal.view(dy.shape)
        return dtotal, dtotal, dweight, None, None, None, *gradients, *last


class _Answered:
    """An attention module whose projections are already computed; everything else is its own."""

    def __init__(
        self, attention: nn.Module, answers: dict[str, Callable[[Tensor], Tensor]]
    ) -> None:
        self._attention, self._answers = attention, answers

    def __getattr__(self, name: str) -> Any:
        answers = self.__dict__["_answers"]
        return answers[name] if name in answers else getattr(self.__dict__["_attention"], name)


def layer_forward(
    layer: Any,
    original: Callable[..., Tensor],
    attend: Callable[..., tuple[Tensor, Any]],
    activation: Activation,
    hidden_states: Tensor,
    *,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Tensor:
    """One Llama-like layer on the diet, or `original` where it cannot be, counted by reason.

    hidden_states: (B, S, D). `attend` is the plain function behind the attention module's forward.
    """
    try:
        if past_key_values is not None:
            raise Unsupported("generation with a cache")
        attention, mlp = layer.self_attn, layer.mlp
        first, second = layer.input_layernorm, layer.post_attention_layernorm
        qkv = tuple(linear_of(getattr(attention, n)) for n in ("q_proj", "k_proj", "v_proj"))
        out = linear_of(attention.o_proj)
        gate, up, down = (linear_of(getattr(mlp, n)) for n in ("gate_proj", "up_proj", "down_proj"))
        for module in (attention, mlp, first, second):
            refuse_hooks(module)
    except Unsupported as reason:
        CALLS[f"not on the diet: {reason}"] += 1
        return original(hidden_states, past_key_values=past_key_values, **kwargs)
    CALLS["activation_diet"] += 1
    q, k, v = norm_linears(hidden_states, first.weight, first.variance_epsilon, qkv)
    v = v.contiguous()  # of an augmented product it is a view, and would keep q and k alive with it
    answered = _Answered(
        attention,
        {
            "q_proj": lambda _: q,
            "k_proj": lambda _: k,
            "v_proj": lambda _: v,
            "o_proj": lambda o: lora_linears(o, (out,))[0],
        },
    )
    attended, _ = attend(answered, hidden_states=hidden_states, past_key_values=None, **kwargs)
    eps = second.variance_epsilon
    return add_norm_mlp(attended, hidden_states, second.weight, eps, (gate, up, down), activation)
