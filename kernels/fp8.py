"""FP8 products: e4m3 numbers, one fp32 scale a weight row and a token. Of a frozen weight:

    q(x) = x / s, rounded to e4m3, with s = max |row| / 448
    y  = (q(x) q(W)^T) s_x s_W^T              s_x: (T, 1), s_W: (O, 1)
    dx = (q(dy s_W^T) q(W)) s_d               s_W lies along the sum, so dy takes it in first

x: (..., D) bf16 (the GPU's row-wise product writes nothing else; a CPU emulates it in any of fp32,
bf16); W: (O, D), held once in e4m3: half of bf16. D and O must be multiples of 16. Both passes use
the same numbers of W, so dx is the gradient of the network that ran, but for the rounding of dy.
FP8 products want both operands along the sum (Hopper), so backward makes W^T aside, O D bytes for
as long as its product. Bytes travel as uint8, which no cast of a module to bf16 touches. FP8
formats: arXiv 2209.05433.

Of a weight that is trained, which stays bf16 and is rounded anew in each pass:

    y = (q(x) q(W)^T) s_x s_W^T    dx = (q(dy) q(W^T)^T) s_d s_V^T    dW = dy^T x, in bf16

s_V: (D, 1), of the rows of W^T. Two of three products are in FP8; dW is summed over tokens, whose
rounding errors would not average out in e4m3 (torchao's recipe `rowwise_with_gw_hp`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tuneloom.kernels.jit import CALLS, jit, next_power_of_2, runs_triton, tl

KIND = torch.float8_e4m3fn
LARGEST = 448.0
MULTIPLE = 16
"""Of both sides of a weight: what the product's loads are made of."""
LEAST = 1e-30
"""Smallest scale: of rows of zeros, as padding has; a GPU may take subnormal numbers for 0."""
CAPABILITY = (8, 9)
"""Ada and Hopper are the first with e4m3."""
SCALE = "_tuneloom_row_scale"
"""Attribute of a weight that is held in FP8: s_W, (O, 1) fp32."""


class Fp8Linear(nn.Linear):
    """A frozen nn.Linear in FP8; PEFT adapts it as the nn.Linear it is."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = hold(linear.weight)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Fp8Linear.apply(x, self.weight)
        return y if self.bias is None else y + self.bias


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight  # frozen; saved tensors would lose its scale
        y = product(x.reshape(-1, x.shape[-1]), weight)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        dx = product_backward(dy.reshape(-1, dy.shape[-1]), ctx.weight)
        return dx.view(*dy.shape[:-1], dx.shape[-1]), None


class Fp8TrainedLinear(nn.Linear):
    """An nn.Linear whose products are in FP8; its weight and bias are those it was given."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Fp8TrainedLinear.apply(x, self.weight)
        return y if self.bias is None else y + self.bias


class _Fp8TrainedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = _rounded_product(x.reshape(-1, x.shape[-1]), weight)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows, dx, dweight = dy.reshape(-1, dy.shape[-1]), None, None
        if ctx.needs_input_grad[0]:
            dx = _rounded_product(rows, weight.t().contiguous()).view(x.shape)
        if ctx.needs_input_grad[1]:
            dweight = rows.t() @ x.reshape(-1, x.shape[-1])
        return dx, dweight


@torch.no_grad()
def hold(weight: Tensor) -> nn.Parameter:
    """A frozen (O, D) weight as FP8 bytes that carry their scale."""
    assert weight.shape[0] % MULTIPLE == 0 == weight.shape[1] % MULTIPLE, weight.shape
    numbers, scale = quantise(weight.detach())
    held = nn.Parameter(numbers.view(torch.uint8), requires_grad=False)
    setattr(held, SCALE, scale)
    return held


def is_held(weight: Tensor) -> bool:
    """Whether `hold` made this weight."""
    return hasattr(weight, SCALE)


def hold_linears(
    network: nn.Module, *, keep: Collection[str] = (), trained: bool = False
) -> list[str]:
    """Hold every linear but the head and those whose last name is in `keep`; returns their names.
    `trained`: their weights stay as they are, and only their products are in FP8.

    Raises ValueError, before any is changed, for a weight whose sides 16 does not divide.
    """
    causal: Any = network
    head = causal.get_output_embeddings()
    found = {
        name: module for name, module in network.named_modules()
        if type(module) is nn.Linear and module is not head and name.rsplit(".", 1)[-1] not in keep
    }  # fmt: skip
    for name, linear in found.items():
        if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
            raise ValueError(f"{name} is {tuple(linear.weight.shape)}: {MULTIPLE} divides not both")
    for name, linear in found.items():
        parent, _, last = name.rpartition(".")
        kind = Fp8TrainedLinear if trained else Fp8Linear
        setattr(network.get_submodule(parent), last, kind(linear))
    return list(found)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, (T, O) in x's dtype, of x (T, D) and a held weight; outside autograd."""
    CALLS["fp8"] += 1
    numbers, scale = quantise(x)
    return _scaled(numbers, weight.detach().view(KIND), scale, getattr(weight, SCALE), x.dtype)


def _rounded_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, (T, O) in x's dtype, of x (T, D) and a weight (O, D) that is rounded here."""
    CALLS["fp8"] += 1
    numbers, scale = quantise(x)
    rows, row_scale = quantise(weight)
    return _scaled(numbers, rows, scale, row_scale, x.dtype)


def product_backward(dy: Tensor, weight: Tensor) -> Tensor:
    """dy W, (T, D) in dy's dtype, of dy (T, O) and a held weight; outside autograd."""
    scale_w: Tensor = getattr(weight, SCALE)
    numbers, scale = quantise(dy, columns=scale_w)
    turned = weight.detach().t().contiguous().view(KIND)  # (D, O)
    ones = torch.ones(turned.shape[0], 1, dtype=torch.float32, device=dy.device)
    return _scaled(numbers, turned, scale, ones, dy.dtype, fast=False)


def _scaled(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, *, fast: bool = True
) -> Tensor:
    """a b^T in `dtype`, rows times their scales: a (T, D), b (O, D) e4m3; scales (T, 1), (O, 1).

    Without a row (a tile of a short batch) nothing is launched.
    """
    if not a.shape[0]:
        return torch.empty(0, b.shape[0], dtype=dtype, device=a.device)
    return torch._scaled_mm(
        a, b.t(), scale_a=scale_a, scale_b=scale_b.t(), out_dtype=dtype, use_fast_accum=fast
    )


def quantise(x: Tensor, *, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (T, D), times `columns` (D numbers) if given, as e4m3 (T, D) and its scale (T, 1) fp32.

    A row with a NaN or an infinity gives products that are NaN.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    if not runs_triton(x) or not x.shape[0]:
        return _plain_quantise(x, columns)
    numbers = torch.empty(x.shape, dtype=KIND, device=x.device)
    scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    block = next_power_of_2(x.shape[1])
    _quantise_kernel[(x.shape[0],)](
        x, numbers, scale, scale if columns is None else columns, x.stride(0), x.shape[1],
        COLUMNS=columns is not None, BLOCK=block, num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip
    return numbers, scale


def _plain_quantise(x: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    values = x.float() if columns is None else x.float() * columns.view(1, -1)
    scale = (values.abs().amax(1, keepdim=True) / LARGEST).clamp_min(LEAST)
    return (values / scale).clamp(-LARGEST, LARGEST).to(KIND), scale


@jit
def _quantise_kernel(
    x: tl.tensor,  # (rows, width)
    numbers: tl.tensor,
    scale: tl.tensor,  # (rows,)
    columns: tl.tensor,  # (width,)
    x_stride: tl.tensor,
    width: tl.tensor,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if COLUMNS:
        values *= tl.load(columns + column, mask=inside, other=0.0)
    # Like the plain path, to the bit: IEEE division, and NaN kept as NaN.
    s = tl.maximum(tl.div_rn(tl.max(tl.abs(values), axis=0), 448.0), 1e-30)
    scaled = tl.clamp(tl.div_rn(values, s), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    # Rounded to e4m3's grid here, so that the cast is exact: the interpreter's loses carries (3.9).
    bits = scaled.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    rounded = tl.where(tl.abs(scaled) < 0.015625, (scaled + 24576.0) - 24576.0, normal)
    scaled = tl.where(scaled == scaled, rounded, scaled)
    tl.store(numbers + row * width + column, scaled.to(numbers.dtype.element_ty), mask=inside)
    tl.store(scale + row, s)
