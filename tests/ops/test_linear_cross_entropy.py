"""Fused linear cross-entropy: loss and every gradient against float64, and what it never holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from tuneloom.kernels.jit import INTERPRETING
from tuneloom.kernels.linear_cross_entropy import linear_cross_entropy

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None
) -> tuple[Tensor, list[Tensor]]:
    """Full logits in float64 from the same (rounded) numbers."""
    leaves = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    if bias is not None:
        leaves.append(bias.detach().double().requires_grad_())
    logits = functional.linear(*leaves)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return loss, list(torch.autograd.grad(loss * 0.25, leaves))


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = expected.abs().max().clamp_min(1.0)
    assert got.isfinite().all()
    assert ((got.double() - expected).abs().max() / scale).item() < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("tokens", "width", "classes", "chunk", "softcap", "with_bias"),
    [(1, 3, 2, None, None, False), (37, 24, 301, 8, None, True), (21, 16, 5003, 64, 5.0, False)],
)
def test_loss_and_gradients_equal_float64(
    dtype: torch.dtype,
    tokens: int,
    width: int,
    classes: int,
    chunk: int | None,
    softcap: float | None,
    with_bias: bool,
) -> None:
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(classes, width, dtype=dtype, requires_grad=True)
    bias = torch.randn(classes, dtype=dtype, requires_grad=True) if with_bias else None
    labels = torch.randint(0, classes, (tokens,))
    labels[1::3] = -100
    expected, gradients = reference(hidden, weight, labels, bias, softcap)
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, softcap=softcap, chunk=chunk)
    (loss * 0.25).backward()
    assert loss.dtype == torch.float32 and loss.shape == ()
    close(loss.detach(), expected.detach(), TOLERANCE[dtype])
    leaves = [hidden, weight] + ([bias] if bias is not None else [])
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert leaf.grad is not None and leaf.grad.dtype == dtype
        close(leaf.grad, gradient, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_factor_behind_the_loss_is_not_rounded(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(64, 16, dtype=dtype), torch.randn(50, 16, dtype=dtype)
    bias, labels = torch.randn(50, dtype=dtype), torch.randint(0, 50, (64,))

    def gradients(factor: float) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        loss = linear_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2])
        return list(torch.autograd.grad(loss * factor, leaves))

    factor = 0.5 + 1 / 600  # 0.5 in bf16, 0.33 % less; 0.5017 in fp16
    for got, whole in zip(gradients(factor)[::2], gradients(1.0)[::2], strict=True):
        assert torch.equal(got, (whole.float() * factor).to(dtype))
    if dtype == torch.float16:  # a loss scale that fp16 does not hold
        assert gradients(65536.0)[0].isfinite().any()


def test_the_sum_of_a_trained_fp16_heads_gradient_may_pass_what_fp16_holds() -> None:
    hidden = torch.full((2048, 4), 100.0, dtype=torch.float16)
    weight = torch.zeros(3, 4, dtype=torch.float16, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.ones(2048, dtype=torch.int64)) / 2048
    loss.backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float16
    expected = torch.tensor([1 / 3, -2 / 3, 1 / 3])[:, None].expand(3, 4) * 100
    torch.testing.assert_close(weight.grad.float(), expected, rtol=1e-3, atol=0)


def test_a_frozen_head_gets_no_gradient_and_hidden_the_same_one() -> None:
    hidden, weight = torch.randn(9, 8), torch.randn(50, 8)
    labels = torch.randint(0, 50, (9,))
    gradients = []
    for frozen in (True, False):
        leaf = hidden.clone().requires_grad_()
        head = weight.clone().requires_grad_(not frozen)
        linear_cross_entropy(leaf, head, labels).backward()
        assert (head.grad is None) == frozen
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], gradients[1])


def test_rows_without_a_label_change_nothing_whatever_they_hold() -> None:
    hidden, weight, labels = torch.randn(6, 8), torch.randn(20, 8), torch.randint(0, 20, (6,))
    poisoned = torch.cat([hidden, torch.full((3, 8), float("nan"))]).requires_grad_()
    padded = torch.cat([labels, torch.full((3,), -100)])
    loss = linear_cross_entropy(poisoned, weight, padded)
    loss.backward()
    assert torch.equal(loss.detach(), linear_cross_entropy(hidden, weight, labels))
    assert poisoned.grad is not None and torch.equal(poisoned.grad[6:], torch.zeros(3, 8))


def test_all_rows_ignored_is_zero_loss_and_zero_gradients() -> None:
    hidden = torch.randn(2, 4, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.full((2, 4), -100))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None and not hidden.grad.any()
    assert weight.grad is not None and not weight.grad.any()


def test_given_positions_of_kept_rows_give_the_same_loss() -> None:
    hidden, weight, labels = torch.randn(9, 8), torch.randn(20, 8), torch.randint(0, 20, (9,))
    labels[[0, 4, 8]] = -100
    kept = torch.tensor([1, 2, 3, 5, 6, 7])
    assert torch.equal(
        linear_cross_entropy(hidden, weight, labels, kept=kept),
        linear_cross_entropy(hidden, weight, labels),
    )


def test_a_label_outside_the_vocabulary_is_never_silently_wrong() -> None:
    hidden, weight = torch.randn(3, 8), torch.randn(20, 8)
    if INTERPRETING:
        assert linear_cross_entropy(hidden, weight, torch.tensor([1, 20, 3])).isnan()
    else:
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            linear_cross_entropy(hidden, weight, torch.tensor([1, 20, 3]))


def test_shapes_that_do_not_match_are_named() -> None:
    with pytest.raises(ValueError, match=r"got \(3, 8\), \(20, 7\) and \(3,\)"):
        linear_cross_entropy(torch.randn(3, 8), torch.randn(20, 7), torch.zeros(3).long())


def test_non_contiguous_hidden_and_tied_weight_are_right() -> None:
    hidden = torch.randn(8, 2, 5).permute(1, 2, 0)  # (2, 5, 8)
    weight = torch.randn(8, 20).t()
    labels = torch.randint(0, 20, (2, 5))
    expected, _ = reference(hidden.reshape(10, 8), weight, labels.reshape(10), None, None)
    close(linear_cross_entropy(hidden, weight, labels), expected.detach(), 2e-5)


class Largest(TorchDispatchMode):
    """Remembers the most elements any operation gave back."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.skipif(INTERPRETING, reason="the interpreter copies whole storages")
def test_the_full_logits_are_never_held() -> None:
    hidden = torch.randn(512, 8, requires_grad=True)
    labels = torch.randint(0, 1000, (512,))
    with Largest() as largest:
        linear_cross_entropy(hidden, torch.randn(1000, 8), labels, chunk=64).backward()
    assert largest.elements == 64 * 1000


def test_a_second_backward_through_a_trained_head_is_refused() -> None:
    weight = torch.randn(20, 8, requires_grad=True)
    loss = linear_cross_entropy(torch.randn(3, 8), weight, torch.tensor([1, 2, 3]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_fp16_logits_that_overflow_give_no_finite_loss() -> None:
    hidden = torch.full((2, 64), 100.0, dtype=torch.float16)
    weight = torch.full((5, 64), 20.0, dtype=torch.float16)
    assert not linear_cross_entropy(hidden, weight, torch.tensor([1, 2])).isfinite()


def test_no_rows_at_all_is_zero_loss() -> None:
    hidden = torch.randn(0, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(5, 8), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and hidden.grad is not None and hidden.grad.shape == (0, 8)
