"""Linears that share an input, with their LoRA adapters: nothing kept for backward but x and x A^T.

    y_i = x W_i^T + b_i + s_i (drop_i(x) A_i^T) B_i^T
    dx = sum_i dy_i W_i + drop_i'(s_i dy_i B_i A_i)    dA_i = (s_i dy_i B_i)^T drop_i(x)
    dB_i = s_i dy_i^T (drop_i(x) A_i^T)    dW_i = dy_i^T x, db_i = sum_t dy_i, if trained

x: (..., D) fp32, bf16, fp16; W_i: (O_i, D), or NF4, dequantised in each pass (nf4.py), or fp8.py's;
A_i: (R, D); B_i: (O_i, R); s_i: alpha / R, or alpha / sqrt(R) for rsLoRA. Adapter terms are added
into y and dx by the matrix product itself (beta = 1): no (T, O) temporaries as in PEFT. A dropout
mask is drawn from a seed, and drawn again in backward: 8 bytes kept a linear (PEFT keeps the mask
and the dropped x of every linear). LoRA: arXiv 2106.09685; rsLoRA: 2312.03732.

DoRA (arXiv 2402.09353) scales both products by m / ||W + s B A||, and keeps its output, for dm.

`linear_of(module)` reads an nn.Linear or a PEFT layer around one; what it cannot compute it names
(merged or several adapters, ZeRO-3 shards, hooks, DoRA with dropout), and the caller leaves such a
layer as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tuneloom.kernels import fp8, nf4

GROUP = "_tuneloom_group"
"""Attribute of a module whose linear sits in an augmented matrix (augmented_lora.py)."""


class Unsupported(Exception):
    """This layer must run as it is; the message says why."""


@dataclass(frozen=True)
class Linear:
    """One linear and its adapter, as read from a module for one forward pass."""

    weight: Tensor
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0
    magnitude: Tensor | None = None
    """DoRA's m, (O,); None for plain LoRA."""
    group: Any = None
    """augmented_lora.Group that this linear is part of, if any."""

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What autograd must know about."""
        return self.weight, self.bias, self.a, self.b, self.magnitude


def linear_of(module: nn.Module) -> Linear:
    """The linear and adapter of an nn.Linear, bitsandbytes Linear4bit or PEFT layer around one."""
    if not hasattr(module, "lora_A"):
        return Linear(*_weight_and_bias(module))
    layer: Any = module
    if layer.disable_adapters or layer.merged:
        raise Unsupported("adapters are merged or disabled")
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1:
        raise Unsupported(f"{len(active)} active adapters in one layer")
    name = active[0]
    if layer.lora_B[name].bias is not None:
        raise Unsupported("an adapter with a bias")
    weight, bias = _weight_and_bias(layer.base_layer)
    dropout = getattr(layer.lora_dropout[name], "p", 0.0) if layer.training else 0.0
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    _refuse_shards(a)
    magnitude = _magnitude(layer, name, dropout)
    group = module.__dict__.get(GROUP)
    return Linear(weight, bias, a, b, layer.scaling[name], dropout, magnitude, group)


def _magnitude(layer: Any, name: str, dropout: float) -> Tensor | None:
    """DoRA's magnitude vector; other variants of LoRA are not computed here."""
    variant = type(layer.lora_variant[name]).__name__ if name in layer.lora_variant else None
    if variant is None:
        return None
    if variant != "DoraLinearVariant":
        raise Unsupported(variant)
    if fp8.is_held(layer.base_layer.weight):
        raise Unsupported("DoRA on FP8 weights")
    if dropout:
        raise Unsupported("DoRA with dropout")  # PEFT drops the base's input, too: a third product
    magnitude: Tensor = layer.lora_magnitude_vector[name].weight
    return magnitude


def _weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    if type(module).__name__ not in ("Linear", "Linear4bit", "Fp8Linear"):
        raise Unsupported(f"{type(module).__name__} in place of a linear")
    weight: Any = module.weight
    _refuse_shards(weight)
    refuse_hooks(module)
    packed = weight.dtype == torch.uint8 and not fp8.is_held(weight)
    if packed and getattr(weight, "quant_state", None) is None:
        raise Unsupported("4-bit weights that are not quantised yet")
    return weight, module.bias  # type: ignore[return-value]


def refuse_hooks(module: nn.Module) -> None:
    """A module with hooks is not bypassed: they would not run."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        raise Unsupported(f"hooks on {type(module).__name__}")


def _refuse_shards(weight: Tensor) -> None:
    if hasattr(weight, "ds_id"):
        raise Unsupported("weights sharded by ZeRO-3")


def dense(weight: Tensor, dtype: torch.dtype, turn: nf4.Turn) -> Tensor:
    """The weight as a matrix of `dtype`; NF4 is dequantised (117 MB for an 8B gate in bf16), and
    holds until the next weight is asked for.
    """
    if weight.dtype != torch.uint8:
        return weight.detach().to(dtype)
    return nf4.matrix(weight, turn).to(dtype)


def lora_linears(x: Tensor, linears: Sequence[Linear]) -> tuple[Tensor, ...]:
    """(y_1, ..., y_n), each (..., O_i) in x's dtype."""
    flat = [t for linear in linears for t in linear.tensors()]
    ys: tuple[Tensor, ...] = _LoraLinears.apply(x, tuple(linears), *flat)
    return ys


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, linears: tuple[Linear, ...], *flat: Tensor
    ) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        ys, kept = project(rows, linears)
        ctx.kept = kept
        ctx.save_for_backward(rows, *kept.products)
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        rows, *products = ctx.saved_tensors
        flat = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
        dx, gradients = project_backward(
            flat, rows, products, ctx.kept, ctx.needs_input_grad[0], ctx.needs_input_grad[2:]
        )
        shaped = dx.view(*dys[0].shape[:-1], dx.shape[-1]) if dx is not None else None
        return shaped, None, *gradients


@dataclass(frozen=True)
class Kept:
    """What a projection's backward needs beside x; `products` go through save_for_backward."""

    linears: tuple[Linear, ...]
    seeds: tuple[int, ...]
    products: list[Tensor]
    """x A^T of each adapted linear, (T, R); for DoRA also the gain (O,) and the output (T, O)."""
    versions: tuple[int, ...]
    """Of the weights: a change between forward and backward is an error, not a wrong gradient."""

    def check(self) -> None:
        assert _versions(self.linears) == self.versions, "a weight changed before its backward"


def _versions(linears: Sequence[Linear]) -> tuple[int, ...]:
    return tuple(t._version for linear in linears for t in linear.tensors() if t is not None)


def project(x: Tensor, linears: tuple[Linear, ...]) -> tuple[list[Tensor], Kept]:
    """Outputs (T, O_i) of x (T, D), outside autograd."""
    group = _group(linears)
    if group is not None:
        from tuneloom.kernels import augmented_lora

        ys, product = augmented_lora.forward(group, x, linears)
        return ys, Kept(linears, (0,) * len(linears), [product], _versions(linears))
    ys, products, seeds = [], [], []
    for linear in linears:
        bias = None if linear.bias is None else linear.bias.to(x.dtype)
        weight = _operand(linear.weight, x.dtype, "forward")
        y = _base(x, weight, bias if linear.magnitude is None else None)
        seed = draw_seed() if linear.dropout else 0
        if linear.a is not None and linear.b is not None:
            product = dropped(x, linear.dropout, seed) @ linear.a.to(x.dtype).t()
            y.addmm_(product, linear.b.to(x.dtype).t(), alpha=linear.scale)
            products.append(product)
        if linear.magnitude is not None:
            gain = (linear.magnitude / row_norms(weight, linear)).to(x.dtype)
            y = y.mul_(gain)
            products += [gain, y]
            y = y if bias is None else y + bias
        ys.append(y)
        seeds.append(seed)
    return ys, Kept(linears, tuple(seeds), products, _versions(linears))


def project_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    products: Sequence[Tensor],
    kept: Kept,
    wants_x: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx (T, D), and gradients in the order of `Linear.tensors`; outside autograd."""
    kept.check()
    group = _group(kept.linears)
    if group is not None:
        from tuneloom.kernels import augmented_lora

        return augmented_lora.backward(group, dys, x, products[0], kept.linears)
    dx: Tensor | None = None
    gradients: list[Tensor | None] = []
    left = list(products)
    for i, (linear, dy, seed) in enumerate(zip(kept.linears, dys, kept.seeds, strict=True)):
        wants_weight, wants_bias, wants_a, wants_b, wants_m = wanted[5 * i : 5 * i + 5]
        dbias = dy.sum(0) if wants_bias else None
        product = left.pop(0) if linear.a is not None else None
        dm = None
        if linear.magnitude is not None:
            gain, scaled = left.pop(0), left.pop(0)
            if wants_m:
                # scaled = m / norm * z, so that sum dy z / norm is sum dy scaled / m
                dm = torch.linalg.vecdot(dy, scaled, dim=0) / linear.magnitude
            dy = dy * gain
        if wants_x:
            dx = _add_base(dx, dy, _operand(linear.weight, dy.dtype, "backward"))
        dweight = dy.t() @ x if wants_weight else None
        da = db = None
        if product is not None and linear.b is not None:
            dproduct = (dy @ linear.b.to(dy.dtype)).mul_(linear.scale)  # (T, R)
            if wants_a:
                da = dproduct.t() @ dropped(x, linear.dropout, seed)
            if wants_b:
                db = (dy.t() @ product).mul_(linear.scale)
            if dx is not None:
                _add_adapter_(dx, dproduct, linear, seed)
        pairs = zip((dweight, dbias, da, db, dm), linear.tensors(), strict=True)
        gradients += [None if g is None or t is None else g.to(t.dtype) for g, t in pairs]
    return dx, gradients


def _operand(weight: Tensor, dtype: torch.dtype, turn: nf4.Turn) -> Tensor:
    """What a product takes: a matrix of `dtype`, or the weight itself where it is held in FP8."""
    return weight if fp8.is_held(weight) else dense(weight, dtype, turn)


def _base(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, (T, O)."""
    if not fp8.is_held(weight):
        return functional.linear(x, weight, bias)
    y = fp8.product(x, weight)
    return y if bias is None else y.add_(bias)


def _add_base(dx: Tensor | None, dy: Tensor, weight: Tensor) -> Tensor:
    """dx + dy W, (T, D), in dx's memory."""
    if not fp8.is_held(weight):
        return dy @ weight if dx is None else dx.addmm_(dy, weight)
    part = fp8.product_backward(dy, weight)
    return part if dx is None else dx.add_(part)


def _add_adapter_(dx: Tensor, dproduct: Tensor, linear: Linear, seed: int) -> None:
    assert linear.a is not None
    a = linear.a.to(dx.dtype)
    if linear.dropout:
        dx += dropped(dproduct @ a, linear.dropout, seed)
    else:
        dx.addmm_(dproduct, a)


def _group(linears: Sequence[Linear]) -> Any:
    """The augmented matrix that holds exactly these linears, or None."""
    group = linears[0].group
    whole = group is not None and len(group.outs) == len(linears)
    return group if whole and all(linear.group is group for linear in linears) else None


def row_norms(weight: Tensor, linear: Linear) -> Tensor:
    """||W + s B A|| of each row, (O,), a constant for autograd (arXiv 2402.09353, part 4.3).

    Expanded, |W|^2 + 2 s W.(B A) + s^2 |B A|^2, so that B A is never formed: PEFT makes it, and an
    identity matrix to make it from, in every forward.
    """
    assert linear.a is not None and linear.b is not None
    kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
    a, b = linear.a.detach(), linear.b.detach().to(kind)
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=kind).square()
    mixed = ((weight @ a.to(weight.dtype).t()).to(kind) * b).sum(1)
    a = a.to(kind)
    low_rank = ((b @ (a @ a.t())) * b).sum(1)
    return (squares + 2 * linear.scale * mixed + linear.scale**2 * low_rank).clamp_min(0).sqrt()


def draw_seed() -> int:
    """Of a dropout mask: from the CPU generator (no host sync; checkpointing restores it)."""
    return int(torch.randint(2**62, ()))


def dropped(x: Tensor, probability: float, seed: int) -> Tensor:
    """x with numbers zeroed at `probability` and the rest scaled up: the same mask for a seed."""
    if not probability:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    mask = torch.empty_like(x).bernoulli_(1 - probability, generator=generator)
    return mask.mul_(x).div_(1 - probability)
