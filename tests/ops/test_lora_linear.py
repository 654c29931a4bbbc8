"""Linears with adapters against their formula in float64, forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tuneloom.kernels.lora_linear import Linear, lora_linears

DEPTH, RANK = 12, 3


def drawn(out: int, *, dora: bool) -> Linear:
    """One whose every tensor wants a gradient."""
    shapes = [(out, DEPTH), (out,), (RANK, DEPTH), (out, RANK)]
    weight, bias, a, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    weight.requires_grad_(not dora)  # PEFT's norm is no part of its graph
    magnitude = torch.rand(out, dtype=torch.float64, requires_grad=True) if dora else None
    return Linear(weight, bias, a, b, scale=0.7, magnitude=magnitude)


def formula(x: Tensor, one: Linear) -> Tensor:
    assert one.a is not None and one.b is not None
    delta = one.scale * one.b @ one.a
    if one.magnitude is None:
        return x @ (one.weight + delta).t() + one.bias
    norm = torch.linalg.vector_norm(one.weight + delta, dim=1).detach()
    return x @ (one.weight + delta).t() * (one.magnitude / norm) + one.bias


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rows", ["some", "strided", "one", "none"])
def test_linears_of_one_input_are_their_formula(dora: bool, rows: str) -> None:
    shape = {"some": (2, 5), "strided": (2, 5), "one": (1, 1), "none": (1, 0)}[rows]
    x = torch.randn(*shape, DEPTH, dtype=torch.float64)
    if rows == "strided":
        x = torch.randn(DEPTH, *reversed(shape), dtype=torch.float64).permute(2, 1, 0)
        assert not x.is_contiguous()
    x.requires_grad_()
    linears = tuple(drawn(out, dora=dora) for out in (8, 5))
    leaves = [x, *(t for one in linears for t in one.tensors() if t is not None)]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    cotangents = [torch.randn(*shape, out, dtype=torch.float64) for out in (8, 5)]
    ys, truths = lora_linears(x, linears), [formula(x, one) for one in linears]
    for y, truth in zip(ys, truths, strict=True):
        torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)
    found, expected = (torch.autograd.grad(out, leaves, cotangents) for out in (ys, truths))
    for got, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)
