"""FLOPs of a step: what a token meets, once."""

from typing import Any

from tuneloom.train import method as methods
from tuneloom.train.config import MethodConfig
from tuneloom.train.flops import Shape, shape_of

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
