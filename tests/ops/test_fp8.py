"""FP8 products of a frozen weight against float64, and LoRA on top of one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from benchmarks import kernels
from tuneloom.kernels import fp8
from tuneloom.kernels.jit import CALLS, INTERPRETING
from tuneloom.kernels.lora_linear import linear_of, lora_linears
from tuneloom.kernels.patch import patch

HALF_STEP = 2.0**-4
"""e4m3 keeps 4 significant bits, so rounding moves a number by at most this share of itself..."""
SMALLEST = 2.0**-10
"""...or by this much of its row's scale, half of the smallest e4m3 number."""


def held(weight: Tensor) -> nn.Parameter:
    return fp8.hold(weight)


def exact(numbers: Tensor, scale: Tensor) -> Tensor:
    return numbers.double() * scale.double()


def released(weight: nn.Parameter) -> Tensor:
    """The weight that the products compute with, in float64."""
    return exact(weight.detach().view(fp8.KIND), getattr(weight, fp8.SCALE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_those_that_torch_rounds_to(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(40, 300) * torch.logspace(-8, 0, 300)).to(dtype)
    numbers, scale = fp8.quantise(x)
    assert torch.equal(numbers.float(), (x.float() / scale).to(fp8.KIND).float())
    assert (numbers.float().abs() < 2.0**-6).any() and (numbers.float().abs() == 448).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_rounded_by_at_most_half_a_step_of_e4m3(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(7, 80) * torch.logspace(-6, 3, 7)[:, None]).to(dtype)
    x[2] = 0
    numbers, scale = fp8.quantise(x)
    assert torch.equal(scale[:, 0], (x.float().abs().amax(1) / 448).clamp_min(1e-30))
    error = (exact(numbers, scale) - x.double()).abs()
    assert (error <= HALF_STEP * x.double().abs() + SMALLEST * scale).all()
    assert not exact(numbers, scale)[2].any()


def test_columns_scale_a_row_before_it_is_rounded() -> None:
    torch.manual_seed(0)
    x, columns = torch.randn(5, 48), torch.rand(48, 1)
    numbers, scale = fp8.quantise(x, columns=columns)
    plain, plain_scale = fp8.quantise(x * columns.t())
    assert torch.equal(numbers.float(), plain.float()) and torch.equal(scale, plain_scale)


@pytest.mark.skipif(INTERPRETING, reason="Triton's interpreter (3.9) casts NaN to a number")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_gives_no_finite_product(bad: float) -> None:
    x = torch.randn(3, 32)
    x[1, 4] = bad
    y = fp8.product(x, held(torch.randn(16, 32)))
    assert y.isfinite().all(1).tolist() == [True, False, True]


def test_a_product_is_that_of_the_rounded_numbers_and_backward_of_the_same_weight() -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(9, 64), torch.randn(9, 48)
    weight = held(torch.randn(48, 64) * torch.logspace(-2, 2, 48)[:, None])
    y = exact(*fp8.quantise(x)) @ released(weight).t()
    assert (fp8.product(x, weight) - y).abs().max() <= 2e-6 * y.abs().max()
    rows = weight.view(fp8.KIND).double()
    dx = exact(*fp8.quantise(dy, columns=getattr(weight, fp8.SCALE))) @ rows
    assert (fp8.product_backward(dy, weight) - dx).abs().max() <= 2e-6 * dx.abs().max()


def test_a_product_lies_within_the_rounding_of_its_operands() -> None:
    """|error| <= sum |x| |w| ((1 + 1/16)^2 - 1), and what underflows."""
    torch.manual_seed(0)
    x, w, dy = torch.randn(33, 128), torch.randn(96, 128), torch.randn(33, 96)
    bound = (1 + 1.1 * HALF_STEP) ** 2 - 1  # a tenth for numbers that are nearly 0
    weight = held(w)
    y, dx = fp8.product(x, weight), fp8.product_backward(dy, weight)
    assert ((y - x @ w.t()).abs() <= bound * (x.abs() @ w.t().abs())).all()
    assert ((dx - dy @ w).abs() <= bound * (dy.abs() @ w.abs())).all()
    assert 0.036 < (y - x @ w.t()).norm() / (x @ w.t()).norm() < 0.038


@pytest.mark.skipif(INTERPRETING, reason="rows of a whole model: minutes in the interpreter")
def test_the_shipped_base_keeps_its_logits_within_a_twentieth_of_their_deviation() -> None:
    found = kernels.fp8_rounding()["tiny_base"]
    assert found["linears"] == 28 and found["tokens"] > 500
    assert 0 < found["logits_error_rms_over_deviation"] < 0.05
    assert found["logits_error_most_over_deviation"] < 0.4


@pytest.mark.parametrize("tokens", [1, 33])
def test_a_trained_weight_is_rounded_in_both_passes_and_its_gradient_is_not(tokens: int) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(64, 48)
    with torch.no_grad():
        plain.weight *= torch.logspace(-2, 2, 48)[:, None]
    linear = fp8.Fp8TrainedLinear(plain)
    assert linear.weight is plain.weight and list(linear.state_dict()) == ["weight", "bias"]
    x = torch.randn(2, tokens, 64).transpose(0, 1).requires_grad_()  # not contiguous
    dy = torch.randn(tokens, 2, 48)
    y = linear(x)
    y.backward(dy)
    rows, drows = x.detach().reshape(-1, 64), dy.reshape(-1, 48)
    rounded = exact(*fp8.quantise(rows)) @ exact(*fp8.quantise(linear.weight.detach())).t()
    assert (y.reshape(-1, 48) - linear.bias - rounded).abs().max() <= 2e-6 * rounded.abs().max()
    turned = exact(*fp8.quantise(linear.weight.detach().t()))  # W^T by its own rows
    dx = exact(*fp8.quantise(drows)) @ turned.t()
    assert x.grad is not None and linear.weight.grad is not None and linear.bias.grad is not None
    assert (x.grad.reshape(-1, 64) - dx).abs().max() <= 2e-6 * dx.abs().max()
    torch.testing.assert_close(linear.weight.grad, drows.t() @ rows)
    torch.testing.assert_close(linear.bias.grad, drows.sum(0))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_a_tile_without_a_token_goes_forward_and_back(
    trained: bool, shape: tuple[int, ...]
) -> None:
    plain = nn.Linear(64, 48)
    linear = (fp8.Fp8TrainedLinear if trained else fp8.Fp8Linear)(plain)
    x = torch.empty(shape, requires_grad=True)
    y = linear(x)
    assert y.shape == (*shape[:-1], 48)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == shape
    if trained:
        assert torch.equal(plain.weight.grad, torch.zeros(48, 64))


def test_weights_take_half_the_bytes_of_bf16_and_a_scale_a_row() -> None:
    weight = held(torch.randn(96, 128, dtype=torch.bfloat16))
    assert weight.nbytes == 96 * 128 and getattr(weight, fp8.SCALE).nbytes == 4 * 96


class Two(nn.Module):
    """Two linears that share an input, adapted."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = (nn.Linear(64, out, bias=out == 32) for out in (48, 32))
        self.to(dtype).requires_grad_(False)

    def get_output_embeddings(self) -> None:
        return None


def adapted(dtype: torch.dtype, *, hold: bool) -> Any:
    model = Two(dtype)
    if hold:
        assert fp8.hold_linears(model) == ["one", "two"]
    config = LoraConfig(r=4, target_modules=["one", "two"], init_lora_weights=False)
    torch.manual_seed(1)
    return inject_adapter_in_model(config, model).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_and_the_fused_linears_agree_on_a_held_base(dtype: torch.dtype) -> None:
    model = adapted(dtype, hold=True)
    x = torch.randn(2, 5, 64).to(dtype).requires_grad_()
    parameters = [p for p in model.parameters() if p.requires_grad]
    dys = [torch.randn(2, 5, out).to(dtype) for out in (48, 32)]
    plain = [model.one(x), model.two(x)]
    fused = lora_linears(x, (linear_of(model.one), linear_of(model.two)))
    for mine, theirs in zip(
        [*fused, *torch.autograd.grad(fused, [x, *parameters], dys)],
        [*plain, *torch.autograd.grad(plain, [x, *parameters], dys)],
        strict=True,
    ):
        worst = (mine - theirs).abs().max() / theirs.abs().max()
        assert worst <= (1e-6 if dtype == torch.float32 else 2e-2)


def test_gradients_of_adapters_and_inputs_are_those_of_the_unrounded_base() -> None:
    """Adapters see the same x, so their gradients move by dy alone, which is given here."""
    plain, rounded = adapted(torch.float32, hold=False), adapted(torch.float32, hold=True)
    x, dy = torch.randn(9, 64).requires_grad_(), torch.randn(9, 48)
    (dx, *adapters), (truth, *true_adapters) = (
        torch.autograd.grad(m.one(x), [x, m.one.lora_A.default.weight, m.one.lora_B.default.weight],
                            dy)
        for m in (rounded, plain)
    )  # fmt: skip
    for mine, exactly in zip(adapters, true_adapters, strict=True):
        assert torch.equal(mine, exactly)
    assert (dx - truth).norm() <= 0.04 * truth.norm()


def test_a_held_layer_is_on_the_diet_and_its_head_and_chosen_modules_are_not_held() -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=61, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain = copy.deepcopy(model)
    assert len(fp8.hold_linears(model, keep=["down_proj"])) == 2 * 6
    assert type(model.lm_head) is type(model.model.layers[0].mlp.down_proj) is nn.Linear
    patch(model)
    CALLS.clear()
    ids = torch.randint(1, 61, (1, 12))
    logits, truth = model(ids).logits, plain(ids).logits
    assert CALLS["activation_diet"] == 2 and CALLS["fp8"] == 12
    assert (logits - truth).norm() <= 0.1 * truth.norm()


def test_sides_that_16_does_not_divide_are_named_and_nothing_is_held() -> None:
    model = Two(torch.float32)
    model.two = nn.Linear(64, 40)
    with pytest.raises(ValueError, match=r"two is \(40, 64\): 16 divides not both"):
        fp8.hold_linears(model)
    assert type(model.one) is nn.Linear
