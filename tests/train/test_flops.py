"""FLOPs of a step: what a token meets, once."""

from typing import Any

import pytest
import torch

from tuneloom.errors import ConfigError
from tuneloom.train import method as methods
from tuneloom.train.config import MethodConfig
from tuneloom.train.flops import Shape, peak_flops, shape_of
from tuneloom.train.text import decoder_layers

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
ATTENTION, MLP = 4 * 32 * 32, 3 * 32 * 48


def test_of_stacked_experts_those_count_that_a_token_is_sent_to() -> None:
    from transformers import (
        MixtralConfig,
        MixtralForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    mixtral = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))
    qwen = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SIZES, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, head_dim=16
        )
    )
    for frozen in (False, True):
        for parameter in (*mixtral.parameters(), *qwen.parameters()):
            parameter.requires_grad = not frozen
        assert shape_of(mixtral, frozen=frozen).linear == 2 * (ATTENTION + 2 * MLP)
        assert shape_of(qwen, frozen=frozen).linear == 2 * (ATTENTION + 3 * MLP // 2)


def test_of_adapters_on_stacked_experts_those_count_that_a_token_is_sent_to() -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16}
    network = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **sizes, num_experts_per_tok=2))
    adapted = methods.apply(network, MethodConfig(kind="lora", rank=4))
    attention, router = 4 * 4 * (32 + 32), 4 * (32 + 4)
    expert = 2 * 4 * (32 + 2 * 24) + 4 * (24 + 32)  # PEFT's gate and up share twice the rank
    assert shape_of(adapted, frozen=True).adapter == 2 * (attention + router + 2 * expert)


def test_latent_attention_counts_the_widths_of_queries_and_values() -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **SIZES, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, first_k_dense_replace=2
    )
    with torch.device("meta"):
        assert shape_of(DeepseekV3ForCausalLM(config), frozen=False).attention == 2 * 2 * 20


def lora(*extra_modules: str) -> Shape:
    from transformers import LlamaConfig, LlamaForCausalLM

    network = LlamaForCausalLM(LlamaConfig(**SIZES))
    method = MethodConfig(kind="lora", rank=4, extra_modules=list(extra_modules))
    return shape_of(methods.apply(network, method), frozen=True)


def test_a_module_that_is_trained_whole_counts_once_and_its_frozen_original_never() -> None:
    plain, trained = lora(), lora("lm_head", "embed_tokens")
    assert (plain.linear, plain.head) == (2 * (ATTENTION + MLP), 64 * 32)
    assert (trained.linear, trained.adapter) == (plain.linear, plain.adapter)
    work = {"tokens": 100, "target_tokens": 10, "square_tokens": 1000}
    assert trained.step(**work) - plain.step(**work) == 2 * 64 * 32 * 10  # the head's gradient

    down = lora("down_proj")
    own = 4 * (48 + 32)  # the adapter of that projection, which the copy goes without
    assert down.linear == plain.linear - 2 * 32 * 48
    assert down.adapter == plain.adapter + 2 * (32 * 48 - own)


def gemma3(*, images: bool) -> Any:
    from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3TextConfig

    text = SIZES | {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}
    vision = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    return AutoModelForCausalLM.from_config(config if images else Gemma3TextConfig(**text))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_vision_tower_beside_the_language_model_is_neither_counted_nor_trained(kind: Any) -> None:
    method = MethodConfig(kind=kind, rank=4)
    both, text = (methods.apply(gemma3(images=images), method) for images in (True, False))
    assert shape_of(both, frozen=kind == "lora") == shape_of(text, frozen=kind == "lora")
    assert len(decoder_layers(both)) == len(decoder_layers(text)) == 2
    trained = [name for name, p in both.named_parameters() if p.requires_grad]
    assert trained and not [n for n in trained if "language_model" not in n]


def test_a_target_that_stands_in_the_vision_tower_alone_is_refused() -> None:
    for targets in (["fc1"], ["q_proj", "out_proj"]):
        with pytest.raises(ConfigError, match=r"method\.targets: the model has no module"):
            methods.apply(gemma3(images=True), MethodConfig(kind="lora", targets=targets))


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4), ("NVIDIA H200 NVL", 835.5), ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500),
        ("Tesla V100-SXM2-16GB", 125), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA H20", None),
    ],
)  # fmt: skip
def test_a_gpus_peak_is_that_of_its_own_data_sheet(
    monkeypatch: pytest.MonkeyPatch, name: str, tflops: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda")) == (tflops and tflops * 1e12)
    assert peak_flops(torch.device("cpu")) is None
