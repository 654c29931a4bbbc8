"""Attention and positions that would be computed wrongly are refused by name, or said."""

from typing import Any

import pytest
import torch
import transformers

from tuneloom.errors import ConfigError
from tuneloom.kernels import attention
from tuneloom.train import patterns
from tuneloom.train.config import BatchConfig, ModelConfig
from tuneloom.train.model import choose_attention

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}


def tiny(family: str, *, text: str = "", **changes: Any) -> Any:
    config = getattr(transformers, f"{family}{text}Config")(**(SIZES | changes))
    with torch.device("meta"):
        return getattr(transformers, f"{family}ForCausalLM")(config)


def batch(longest: int, **changes: Any) -> BatchConfig:
    return BatchConfig(max_length=longest, tokens=64, **changes)


CHUNKED = {"attention_chunk_size": 8, "intermediate_size_mlp": 32, **EXPERTS}
SLIDING = {
    "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "num_experts": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (
            lambda: tiny("Llama4", text="Text", **CHUNKED),
            "Llama4ForCausalLM attends in chunks of 8",
        ),
        (lambda: tiny("Qwen2Moe", **SLIDING), "Qwen2MoeForCausalLM attends in a window of 8"),
        (lambda: tiny("Phimoe", sliding_window=8, **EXPERTS), "attends in a window of 8"),
    ],
)
def test_a_pattern_of_the_mask_alone_is_refused_above_its_length(network: Any, said: str) -> None:
    model = network()
    assert patterns.refuse(model, batch(8)) is None
    with pytest.raises(ConfigError, match=rf"{said} .*got 9; set batch\.max_length=8"):
        patterns.refuse(model, batch(9))


@pytest.mark.parametrize(
    ("family", "text", "changes"),
    [
        ("Llama", "", {}),
        ("Mistral", "", {"sliding_window": 8}),
        ("Qwen2", "", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
        ("Qwen2", "", {"sliding_window": 8}),
        ("Qwen2Moe", "", {**SLIDING, "use_sliding_window": False}),
        ("Gemma3", "Text", {"sliding_window": 8}),
        ("Mixtral", "", {"sliding_window": 8, **EXPERTS}),
    ],
)
def test_windows_that_layers_pass_and_models_without_any_are_taken(
    family: str, text: str, changes: dict[str, Any]
) -> None:
    assert patterns.refuse(tiny(family, text=text, **changes), batch(9)) is None


LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(("family", "rope"), [("Phi3", LONG), ("Llama", DYNAMIC)])
def test_frequencies_that_follow_the_batch_are_not_shared_and_packs_say_it(
    family: str, rope: dict[str, Any]
) -> None:
    switch = {"max_position_embeddings": 64 if rope is LONG else 16}
    switch |= {"original_max_position_embeddings": 16} if rope is LONG else {}
    model = tiny(family, rope_parameters=rope, **switch)
    with pytest.raises(ConfigError, match=r"batch\.sequence_parallel: .*set .*sequence_parallel=1"):
        patterns.refuse(model, batch(16, sequence_parallel=2))
    assert patterns.refuse(model, batch(16)) is None
    assert patterns.refuse(model, batch(17, packing=False)) is None
    said = patterns.refuse(model, batch(17))
    assert said is not None and "more than 16 tokens" in said and rope["rope_type"] in said
    assert patterns.refuse(tiny("Llama"), batch(17, sequence_parallel=2)) is None


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with such a GPU, varlen and no flash-attn."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(attention, "version", lambda _: None)
    monkeypatch.setattr(attention, "has_varlen", lambda: True)


@pytest.mark.parametrize(("dropped", "backend"), [(0.1, "sdpa"), (0.0, "varlen")])
def test_a_model_that_drops_attention_out_gets_a_backend_that_does(
    hopper: None, dropped: float, backend: str
) -> None:
    model = ModelConfig(path="base")
    assert choose_attention(tiny("Starcoder2", attention_dropout=dropped), model).backend == backend
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, attn_pdrop=dropped)
    with torch.device("meta"):
        assert choose_attention(transformers.GPT2LMHeadModel(config), model).backend == backend


def test_latent_attention_whose_values_are_narrower_than_its_queries_gets_sdpa(
    hopper: None,
) -> None:
    def latent(value: int, nope: int = 16) -> Any:
        return tiny(
            "DeepseekV3", qk_nope_head_dim=nope, qk_rope_head_dim=8, v_head_dim=value,
            q_lora_rank=8, kv_lora_rank=8, first_k_dense_replace=2,
        )  # fmt: skip

    model = ModelConfig(path="base")
    found = choose_attention(latent(16), model)
    assert found.backend == "sdpa"
    assert "varlen needs values as wide as queries (16, 24)" in found.reason
    with pytest.raises(ConfigError, match=r"'varlen' needs values as wide as queries"):
        choose_attention(latent(16), ModelConfig(path="base", attention="varlen"))
    assert choose_attention(latent(24), model).backend == "varlen"
    assert "varlen needs heads of at most 256" in choose_attention(latent(264, 256), model).reason
