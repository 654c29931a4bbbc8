"""Patching: every known family gives the same numbers with our ops, and its own code back after."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from tuneloom.kernels.jit import CALLS
from tuneloom.kernels.loss_head import loss_from_head
from tuneloom.kernels.patch import patch, unpatch

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "use_cache": False,
    "pad_token_id": 0,
}
GEMMA = {**SIZES, "head_dim": 8, "query_pre_attn_scalar": 8}
EXPERTS = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": SIZES,
    "Mistral": SIZES,
    "Qwen2": SIZES,
    "Qwen3": {**SIZES, "head_dim": 8},
    "Gemma": {**SIZES, "head_dim": 8},
    "Gemma2": GEMMA,
    "Gemma3Text": GEMMA,
    "Phi3": SIZES,
    "Phi": SIZES,
    "Mixtral": {**SIZES, "num_local_experts": 4},
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 24},
    "Qwen3Moe": {**EXPERTS, "head_dim": 8},
}
EXPECTED_OPS = {
    "Llama": {"rms_norm", "rope", "gated", "activation_diet"},
    "Mistral": {"rms_norm", "rope", "gated", "activation_diet"},
    "Qwen2": {"rms_norm", "rope", "gated", "activation_diet"},
    "Qwen3": {"rms_norm", "rope", "gated", "activation_diet"},
    "Phi": {"rope"},
}


def tiny(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**FAMILIES[family], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones and zeros would hide a wrong offset
            nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.3)
    return model


def ids() -> Tensor:
    return torch.randint(1, 61, (2, 11), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(3)
    logits = model(input_ids=ids()).logits
    loss = functional.cross_entropy(logits.flatten(0, 1), ids().roll(-1, 1).flatten())
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def same(model: Any, other: Any, tolerance: float = 1e-5) -> None:
    """Equal losses and gradients, each to `tolerance` of its largest entry."""
    (loss, gradients), (expected_loss, expected) = (loss_and_gradients(m) for m in (model, other))
    assert abs(loss - expected_loss) < tolerance * expected_loss
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = expected[name].abs().max().clamp_min(1e-4)
        assert (gradient - expected[name]).abs().max() < tolerance * scale, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_family_has_the_same_loss_and_gradients(family: str) -> None:
    model = tiny(family)
    plain = copy.deepcopy(model)
    report = patch(model).report
    ops = {op for name, counts in report.items() for op in counts if "ForCausalLM" not in name}
    assert ops == EXPECTED_OPS.get(family, {"rms_norm", "rope", "gated"}), report
    head = next(counts for name, counts in report.items() if "ForCausalLM" in name)
    assert head == {"linear_cross_entropy": 1}
    CALLS.clear()
    same(model, plain)
    ran = {"rms_norm", "rope", "activation_diet"} if "activation_diet" in ops else ops
    assert set(CALLS) == ran


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatched_a_model_is_bit_for_bit_what_it_was(family: str) -> None:
    model = tiny(family)
    before = model(input_ids=ids()).logits
    attributes = [set(module.__dict__) for module in model.modules()]
    patch(model)
    assert [set(module.__dict__) for module in model.modules()] != attributes
    assert unpatch(model) > 0
    assert [set(module.__dict__) for module in model.modules()] == attributes
    assert torch.equal(model(input_ids=ids()).logits, before)


def test_patching_twice_is_patching_once() -> None:
    model = tiny("Llama")
    assert patch(model).report == patch(model).report
    unpatch(model)
    assert unpatch(model) == 0


def test_another_model_in_the_process_keeps_its_own_code() -> None:
    patch(tiny("Llama"))
    assert not any("forward" in module.__dict__ for module in tiny("Llama").modules())


VISION = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1,
          "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip


def test_the_head_of_a_model_that_takes_images_too_gives_the_loss() -> None:
    config = transformers.Gemma3Config(text_config=GEMMA, vision_config=VISION)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain = copy.deepcopy(model)
    report = patch(model).report
    assert report["Gemma3ForConditionalGeneration"] == {"linear_cross_entropy": 1}
    CALLS.clear()
    same(model, plain)
    with loss_from_head(model, ids().flatten()) as fused:
        loss = model(input_ids=ids()).logits
    assert fused and CALLS["linear_cross_entropy"] == 1
    logits = plain(input_ids=ids()).logits.flatten(0, 1)
    torch.testing.assert_close(
        loss, functional.cross_entropy(logits, ids().flatten(), reduction="sum")
    )


def test_a_head_that_is_not_known_is_said_by_name(caplog: pytest.LogCaptureFixture) -> None:
    class LlamaForTwo(transformers.LlamaForCausalLM):
        pass

    report = patch(LlamaForTwo(transformers.LlamaConfig(**SIZES))).report
    assert report["LlamaForTwo"] == {"unpatched": 1} and report["LlamaMLP"] == {"gated": 2}
    assert "the head of LlamaForTwo is not known" in caplog.text


def test_an_unknown_model_runs_unpatched_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=61)
    model = transformers.GPT2LMHeadModel(config).eval()
    before = model(input_ids=ids()).logits
    assert patch(model).report == {"GPT2LMHeadModel": {"unpatched": 1}}
    assert "no module of GPT2LMHeadModel is known" in caplog.text
    assert torch.equal(model(input_ids=ids()).logits, before)


def test_an_activation_without_a_kernel_is_left_alone_and_named() -> None:
    model = tiny("Llama", hidden_act="relu")
    plain = copy.deepcopy(model)
    assert patch(model).report["LlamaMLP"] == {"unpatched": 2}
    same(model, plain)


def head_loss(model: Any) -> tuple[Tensor, bool]:
    labels = ids()[:1].roll(-1, 1)
    positions = torch.tensor([2, 3, 7])
    with loss_from_head(model, labels[0, positions]) as fused:
        out = model(input_ids=ids()[:1], logits_to_keep=positions).logits
    if fused:
        return out, True
    return functional.cross_entropy(out[0], labels[0, positions], reduction="sum"), False


CAP = 0.5
"""Below most logits of a tiny model."""


@pytest.mark.parametrize(
    ("family", "changes"),
    [("Llama", {}), ("Phi", {}), ("Gemma2", {"final_logit_softcapping": CAP})],
)
def test_the_head_gives_the_loss_of_its_logits_and_logits_again_after(
    family: str, changes: dict[str, Any]
) -> None:
    model = tiny(family, **changes)
    nn.init.normal_(model.lm_head.weight, std=0.5)
    expected, fused = head_loss(model)
    assert not fused
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    patch(model)
    loss, fused = head_loss(model)
    assert fused and loss.shape == ()
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)
    logits = model(input_ids=ids()).logits
    assert logits.shape == (2, 11, 61) and bool(changes) == (logits.abs().max() <= CAP)


def test_a_head_that_peft_wraps_still_gives_logits() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny("Llama")
    patch(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    assert head_loss(wrapped)[1] is False
    saved = get_peft_model(
        tiny("Llama"), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    patch(saved)
    assert head_loss(saved)[1] is False
    model = tiny("Llama")
    patch(model)
    expected = head_loss(model)[0]
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    loss, fused = head_loss(wrapped)
    assert fused
    torch.testing.assert_close(loss, expected)


def test_a_head_that_is_trained_whole_gives_the_loss_itself() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny("Llama")
    expected = head_loss(model)[0]
    patch(model)  # before PEFT copies the head, as the trainer does
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapped = get_peft_model(model, config)
    loss, fused = head_loss(wrapped)
    assert fused and loss.shape == ()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    copied = wrapped.get_output_embeddings().modules_to_save.default
    assert copied.weight.grad.any()
    with torch.no_grad():
        copied.weight.zero_()
    assert not torch.allclose(head_loss(wrapped)[0], expected)
    with wrapped.disable_adapter():
        loss, fused = head_loss(wrapped)
    assert fused
    torch.testing.assert_close(loss, expected)
    assert wrapped(input_ids=ids()).logits.shape == (2, 11, 61)


def adapted(model: Any, **changes: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **changes)
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # zero at start, which would hide dA
            nn.init.normal_(parameter, std=0.1)
    return wrapped


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma2", "Phi3", "Mixtral"])
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_adapters_get_the_same_gradients(family: str, rslora: bool) -> None:
    model = tiny(family)
    plain = adapted(copy.deepcopy(model), use_rslora=rslora)
    patch(model)  # before PEFT wraps the linears, as the trainer does
    wrapped = adapted(model, use_rslora=rslora)
    CALLS.clear()
    same(wrapped, plain)
    assert CALLS["activation_diet"] == (2 if family in ("Llama", "Qwen2") else 0)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])  # Qwen 2 has biases
def test_dora_has_the_same_gradients_and_moves_its_magnitudes(family: str) -> None:
    model = tiny(family)
    plain = adapted(copy.deepcopy(model), use_dora=True)
    patch(model)
    wrapped = adapted(model, use_dora=True)
    CALLS.clear()
    same(wrapped, plain)
    assert CALLS["activation_diet"] == 2
    _, gradients = loss_and_gradients(wrapped)
    assert sum(g.abs().sum().item() > 0 for n, g in gradients.items() if "magnitude" in n) == 14


def test_what_the_diet_cannot_compute_falls_back_by_name_and_stays_right() -> None:
    model = tiny("Llama")
    plain = adapted(copy.deepcopy(model), use_dora=True, lora_dropout=0.1).train()
    patch(model)
    wrapped = adapted(model, use_dora=True, lora_dropout=0.1).train()
    CALLS.clear()
    same(wrapped, plain)
    assert CALLS["not on the diet: DoRA with dropout"] == 2
    assert CALLS["gated"] == CALLS["rope"] == 2 and not CALLS["activation_diet"]


def test_a_module_with_a_hook_is_not_bypassed() -> None:
    model, seen = tiny("Llama"), []
    patch(model)
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    CALLS.clear()
    model(input_ids=ids())
    assert seen == [1]
    assert CALLS["not on the diet: hooks on Linear"] == CALLS["activation_diet"] == 1


def test_merged_adapters_are_seen() -> None:
    model = adapted(tiny("Llama"))
    expected = model(input_ids=ids()).logits
    patch(model)
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=ids()).logits, expected, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert not torch.allclose(model(input_ids=ids()).logits, expected, atol=1e-3)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    model = tiny("Llama")
    plain = adapted(copy.deepcopy(model))
    patch(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    same(adapted(model).train(), plain.train())


def test_generation_with_a_cache_is_unchanged() -> None:
    model = tiny("Llama", use_cache=True).eval()
    arguments: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids(), **arguments)
    patch(model)
    assert torch.equal(model.generate(ids(), **arguments), expected)


def test_dropout_masks_are_the_same_in_backward_as_in_forward() -> None:
    """The loss is linear in B, so its slope along dB is exact if and only if the masks agree."""
    model = tiny("Llama").double()
    patch(model)
    wrapped = adapted(model, lora_dropout=0.4).double().train()
    _, gradients = loss_and_gradients(wrapped)
    for name in ("layers.1.mlp.gate_proj.lora_A", "layers.0.self_attn.v_proj.lora_B"):
        parameter = next(p for n, p in wrapped.named_parameters() if name in n)
        gradient = next(g for n, g in gradients.items() if name in n)
        direction, step = torch.randn_like(parameter), 1e-6
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step * direction
            losses.append(loss_and_gradients(wrapped)[0])
            with torch.no_grad():
                parameter -= sign * step * direction
        slope = (losses[0] - losses[1]) / (2 * step)
        torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=1e-5, atol=1e-8)
    assert CALLS["activation_diet"]


def test_qlora_weights_are_dequantised_and_gradients_equal_bitsandbytes() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny("Llama", hidden_size=128, intermediate_size=128)

    def quantised() -> Any:
        network = copy.deepcopy(model)
        for layer in network.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, linear in list(part.named_children()):
                    if isinstance(linear, nn.Linear):
                        four_bit = bitsandbytes.nn.Linear4bit(
                            *linear.weight.shape[::-1], bias=False, quant_type="nf4",
                            compute_dtype=torch.float32,
                        )  # fmt: skip
                        four_bit.load_state_dict({"weight": linear.weight.data})
                        setattr(part, name, four_bit.to("cpu"))
        return network

    plain, ours = adapted(quantised()), quantised()
    patch(ours)
    CALLS.clear()
    same(adapted(ours), plain, tolerance=1e-4)
    assert CALLS["activation_diet"] == 2


def test_packed_documents_do_not_see_each_other_in_a_patched_model() -> None:
    from tuneloom.kernels import attention

    model = tiny("Llama")
    attention.install(model, attention.Choice("sdpa", "test"))
    patch(model)
    offsets = torch.tensor([0, 4, 11], dtype=torch.int32)
    positions = torch.cat([torch.arange(4), torch.arange(7)])[None]
    packed: dict[str, Any] = {"position_ids": positions, "cu_seq_lens_q": offsets}
    packed |= {"cu_seq_lens_k": offsets, "max_length_q": 7, "max_length_k": 7}
    first = ids()[:1]
    other = first.clone()
    other[0, :4] = 7
    logits = [model(input_ids=i, **packed).logits[0, 4:] for i in (first, other)]
    assert torch.equal(*logits)


@pytest.mark.parametrize(("lora", "falls_to"), [(False, 0.6), (True, 0.97)])
def test_a_hundred_steps_give_the_same_curve(lora: bool, falls_to: float) -> None:
    curves = []
    for patched in (False, True):
        model = tiny("Llama")
        if patched:
            patch(model)
        model = (adapted(model) if lora else model).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        curve = []
        for step in range(100):
            batch = torch.randint(1, 9, (4, 12), generator=torch.Generator().manual_seed(step % 5))
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < falls_to * curves[0][0]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-3, atol=1e-3)
