"""Block-augmented LoRA: one product for linears and adapters, exact, undone without a trace."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tuneloom.kernels.augmented_lora import augment, separate
from tuneloom.kernels.lora_linear import Linear, linear_of, lora_linears
from tuneloom.kernels.patch import patch


def adapted(dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=61, use_cache=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    patch(model)
    lora = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", **changes)
    wrapped = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped


def step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    loss = model(input_ids=ids).logits.logsumexp(-1).sum()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_a_whole_model_has_the_same_loss_and_gradients_in_float64() -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    assert augment(model) == {"augmented": 8}
    (loss, gradients), (expected, truth) = step(model), step(plain)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert gradients.keys() == truth.keys() and len(gradients) == 28
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, truth[name], rtol=1e-9, atol=1e-11)


def test_adapters_written_behind_autograds_back_are_seen_in_the_next_forward() -> None:
    model = adapted()
    augment(model)
    before = step(model)[0]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(-1.0)  # as DeepSpeed writes updated parameters
    plain = copy.deepcopy(model)
    separate(plain)
    after = step(model)[0]
    assert after != before
    torch.testing.assert_close(after, step(plain)[0], rtol=1e-12, atol=0)


def test_weights_are_held_once_and_given_back_contiguous() -> None:
    model = adapted()
    bytes_before = {n: p.detach().clone() for n, p in model.named_parameters()}
    augment(model)
    attention = model.get_base_model().model.layers[0].self_attn
    storages = {
        getattr(attention, name).base_layer.weight.untyped_storage().data_ptr()
        for name in ("q_proj", "k_proj", "v_proj")
    }
    assert len(storages) == 1
    assert separate(model) == 14
    assert separate(model) == 0
    for name, parameter in model.named_parameters():
        assert parameter.is_contiguous() and torch.equal(parameter, bytes_before[name])


def test_merging_into_augmented_weights_is_right() -> None:
    model = adapted()
    expected = step(model)[0]
    augment(model)
    separate(model)
    merged = model.merge_and_unload()
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    got = merged(input_ids=ids).logits.logsumexp(-1).sum()
    torch.testing.assert_close(got.detach(), expected, rtol=1e-10, atol=0)


def test_what_cannot_be_augmented_is_named_and_left_alone() -> None:
    model = adapted(lora_dropout=0.1)
    assert augment(model.train()) == {"not augmented: dropout or a bias": 8}
    assert augment(adapted(use_dora=True)) == {"not augmented: no plain adapter": 8}
    assert augment(adapted(modules_to_save=["o_proj"], exclude_modules=["o_proj"])) == {
        "augmented": 6,
        "not augmented: ModulesToSaveWrapper in place of a linear": 2,
    }


class Products(TorchDispatchMode):
    """Counts matrix products by the number of columns they give."""

    def __init__(self) -> None:
        super().__init__()
        self.columns: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.columns.append(out.shape[1])
        return out


def test_q_k_and_v_are_one_product_forward_and_one_for_dx() -> None:
    model = adapted()
    augment(model)
    attention = model.get_base_model().model.layers[0].self_attn
    names = ("q_proj", "k_proj", "v_proj")
    linears: tuple[Linear, ...] = tuple(linear_of(getattr(attention, n)) for n in names)
    x = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    with Products() as forward:
        ys = lora_linears(x, linears)
    assert sorted(forward.columns) == [64, 64]  # S, padded to 64; and q | k | v: 32 + 16 + 16
    with Products() as backward:
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    assert sorted(backward.columns) == [4, 4, 4, 32, 32, 64]  # dB_i; dA and dx; dS
