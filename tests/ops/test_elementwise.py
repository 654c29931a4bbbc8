"""RMSNorm, RoPE and gated products: forward and every gradient against float64 formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tuneloom.kernels.rms_norm import add_rms_norm, rms_norm
from tuneloom.kernels.rope import rope
from tuneloom.kernels.swiglu import Activation, gated

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
Outputs = tuple[Tensor, ...]


def agrees(op: Callable[..., Outputs], formula: Callable[..., Outputs], *inputs: Tensor) -> None:
    """Same outputs and gradients as `formula` computed in float64 from the same rounded inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    got, expected = op(*leaves), formula(*exact)
    cotangents = [torch.randn_like(g) for g in got]
    torch.autograd.backward(got, cotangents)
    torch.autograd.backward(expected, [c.double() for c in cotangents])
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == inputs[0].dtype
        close(g, e)
    for leaf, truth in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and truth.grad is not None
        close(leaf.grad, truth.grad)


def close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape and got.isfinite().all()
    worst = (got.detach().double() - expected.detach()).abs().max()
    assert worst.item() <= TOLERANCE[got.dtype] * max(1.0, expected.abs().max().item())


def norm_formula(offset: float) -> Callable[..., Outputs]:
    def formula(x: Tensor, w: Tensor) -> Outputs:
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (offset + w),)

    return formula


@pytest.mark.parametrize("dtype", TOLERANCE)
# Not (1, 1): there dx is a difference of two numbers equal to eps / x^2, all rounding.
@pytest.mark.parametrize("shape", [(1, 3), (5, 96), (2, 3, 2, 17), (3, 5000)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...], offset: float) -> None:
    x, w = torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)
    agrees(lambda x, w: (rms_norm(x, w, 1e-5, offset=offset),), norm_formula(offset), x, w)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_add_rms_norm_gives_norm_and_sum(dtype: torch.dtype) -> None:
    x, residual = (torch.randn(7, 3, 40, dtype=dtype) for _ in range(2))
    w = torch.randn(40, dtype=dtype)

    def formula(x: Tensor, residual: Tensor, w: Tensor) -> Outputs:
        # Rounded like the op's sum, straight through for the gradient.
        total = x + residual
        total = total + (total.to(dtype).double() - total).detach()
        return (*norm_formula(0.0)(total, w), total)

    agrees(lambda x, r, w: add_rms_norm(x, r, w, 1e-5), formula, x, residual, w)


def test_a_norm_whose_sum_is_unused_still_gives_gradients() -> None:
    x, residual, w = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8), torch.ones(8)
    add_rms_norm(x, residual, w, 1e-5)[0].sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_a_frozen_norm_weight_gets_no_gradient_and_x_the_same_one() -> None:
    x, w = torch.randn(9, 33), torch.randn(33)
    gradients = []
    for frozen in (True, False):
        leaf, weight = x.clone().requires_grad_(), w.clone().requires_grad_(not frozen)
        rms_norm(leaf, weight, 1e-6).square().sum().backward()
        assert (weight.grad is None) == frozen
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], gradients[1])


def test_a_norm_of_a_non_contiguous_view_is_right() -> None:
    x = torch.randn(2, 4, 6, 8).transpose(1, 2)
    agrees(lambda x, w: (rms_norm(x, w, 1e-5),), norm_formula(0.0), x, torch.randn(8))


def angles(batch: int, tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = torch.rand(batch, tokens, width // 2) * 6
    both = torch.cat([angle, angle], -1)
    return both.cos().to(dtype), both.sin().to(dtype)


def rope_formula(cos: Tensor, sin: Tensor) -> Callable[..., Outputs]:
    def one(x: Tensor) -> Tensor:
        width = cos.shape[-1]
        turning, rest = x[..., :width], x[..., width:]
        half = torch.cat([-turning[..., width // 2 :], turning[..., : width // 2]], -1)
        turned = turning * cos.double().unsqueeze(1) + half * sin.double().unsqueeze(1)
        return torch.cat([turned, rest], -1)

    return lambda q, k: (one(q), one(k))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("batch", "angle_batch", "heads", "key_heads", "tokens", "width", "rotated"),
    [(1, 1, 1, 1, 1, 2, 2), (2, 1, 6, 3, 5, 16, 16), (2, 2, 3, 1, 4, 20, 12)],
)
def test_rope(
    dtype: torch.dtype,
    batch: int,
    angle_batch: int,
    heads: int,
    key_heads: int,
    tokens: int,
    width: int,
    rotated: int,
) -> None:
    cos, sin = angles(angle_batch, tokens, rotated, dtype)
    # As attention has them: views of (B, T, H, C).
    q = torch.randn(batch, tokens, heads, width, dtype=dtype).transpose(1, 2)
    k = torch.randn(batch, tokens, key_heads, width, dtype=dtype).transpose(1, 2)
    agrees(lambda q, k: rope(q, k, cos, sin), rope_formula(cos, sin), q, k)


def test_rope_of_slices_of_one_fused_projection_leaves_the_rest_alone() -> None:
    fused = torch.randn(1, 5, 4, 8)
    cos, sin = angles(1, 5, 8, torch.float32)
    q, k = fused[:, :, :2].transpose(1, 2), fused[:, :, 2:3].transpose(1, 2)
    before, turned = fused.clone(), rope(q, k, cos, sin)
    assert torch.equal(fused, before)
    expected = rope(q.contiguous(), k.contiguous(), cos, sin)
    assert all(torch.equal(*pair) for pair in zip(turned, expected, strict=True))


def test_angles_of_another_length_are_refused() -> None:
    cos, sin = angles(1, 4, 8, torch.float32)
    with pytest.raises(ValueError, match=r"expected cos \(1 or 1, 5, .* got \(1, 4, 8\)"):
        rope(torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 8), cos, sin)


@pytest.mark.parametrize("key", [(1, 1, 4, 8), (2, 1, 5, 8), (1, 1, 5, 6)])
def test_keys_unlike_the_queries_are_refused(key: tuple[int, ...]) -> None:
    """A kernel would read beyond them."""
    cos, sin = angles(1, 5, 6, torch.float32)
    with pytest.raises(ValueError, match=r"expected k \(1, 1, 5, 8\)"):
        rope(torch.randn(1, 2, 5, 8), torch.randn(key), cos, sin)
    with pytest.raises(ValueError, match=r"got k \(1, 1, 5, 8\) and sin \(1, 5, 4\)"):
        rope(torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 8), cos, sin[..., :4])


def test_a_norm_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rms_norm: expected weight \(8,\), got \(4,\)"):
        rms_norm(torch.randn(3, 8), torch.ones(4), 1e-6)


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda e: functional.gelu(e, approximate="tanh"),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 70), (2, 2500)])
def test_gated(dtype: torch.dtype, activation: Activation, shape: tuple[int, ...]) -> None:
    gate, up = (torch.randn(shape, dtype=dtype) * 3 for _ in range(2))
    agrees(
        lambda e, g: (gated(e, g, activation),),
        lambda e, g: (ACTIVATIONS[activation](e) * g,),
        gate,
        up,
    )


def test_gated_halves_of_one_projection() -> None:
    def op(fused: Tensor) -> Outputs:
        gate, up = fused.chunk(2, dim=-1)
        return (gated(gate, up),)

    def formula(fused: Tensor) -> Outputs:
        gate, up = fused.chunk(2, dim=-1)
        return (functional.silu(gate) * up,)

    agrees(op, formula, torch.randn(2, 3, 24))


def test_gated_keeps_gate_and_up_and_nothing_else() -> None:
    kept: list[Tensor] = []
    gate, up = (torch.randn(4, 8, requires_grad=True) for _ in range(2))

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        gated(gate, up)
    assert {t.data_ptr() for t in kept} == {gate.data_ptr(), up.data_ptr()}


def test_gradients_that_arrive_transposed_or_expanded_are_read_right() -> None:
    gate, up, w = torch.randn(6, 8), torch.randn(6, 8), torch.randn(8)
    cos, sin = angles(1, 5, 8, torch.float32)
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 8)
    ops: list[tuple[Callable[..., Outputs], list[Tensor]]] = [
        (lambda e, g: (gated(e, g),), [gate, up]),
        (lambda x, w: (rms_norm(x, w, 1e-5),), [gate, w]),
        (lambda q, k: rope(q, k, cos, sin), [q, k]),
    ]
    for op, inputs in ops:
        leaves = [t.clone().requires_grad_() for t in inputs]
        outputs = op(*leaves)
        contiguous = [torch.randn_like(o) for o in outputs]
        turned = [c.transpose(-1, -2).contiguous().transpose(-1, -2) for c in contiguous]
        expected = torch.autograd.grad(outputs, leaves, contiguous, retain_graph=True)
        torch.testing.assert_close(
            torch.autograd.grad(outputs, leaves, turned, retain_graph=True), expected
        )
        ones = [torch.ones_like(o) for o in outputs]
        expected = torch.autograd.grad(outputs, leaves, ones, retain_graph=True)
        spread = [torch.ones(()).expand(o.shape) for o in outputs]
        torch.testing.assert_close(torch.autograd.grad(outputs, leaves, spread), expected)


def test_queries_whose_columns_are_not_neighbours_are_right() -> None:
    cos, sin = angles(1, 5, 8, torch.float32)
    q = torch.randn(1, 2, 8, 5).transpose(2, 3)
    agrees(lambda q, k: rope(q, k, cos, sin), rope_formula(cos, sin), q, torch.randn(1, 1, 5, 8))


@pytest.mark.parametrize("rows", [0, 1])
def test_empty_and_one_token_inputs(rows: int) -> None:
    x, w = torch.randn(rows, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    gate, up = (torch.randn(rows, 12, requires_grad=True) for _ in range(2))
    q, k = torch.randn(1, 2, rows, 8, requires_grad=True), torch.randn(1, 1, rows, 8)
    cos, sin = angles(1, rows, 8, torch.float32)
    outputs = [rms_norm(x, w, 1e-5), gated(gate, up), *rope(q, k, cos, sin)]
    outputs += add_rms_norm(x, x, w, 1e-5)
    torch.autograd.backward([o.sum() for o in outputs if o.requires_grad])
    for leaf in (x, w, gate, up, q):
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape
        assert leaf.grad.isfinite().all()


def test_fp16_overflow_is_infinite_not_a_wrong_number() -> None:
    gate = torch.full((1, 4), 6e4, dtype=torch.float16)
    assert gated(gate, gate).isinf().all()
    # Squares of 6e4 overflow fp16 but not the fp32 they are summed in.
    normed = rms_norm(gate, torch.ones(4, dtype=torch.float16), 1e-5)
    torch.testing.assert_close(normed, torch.ones(1, 4, dtype=torch.float16))
