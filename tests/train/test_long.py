"""Tiles and activations on the host change where things are computed and kept, never the curve."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tuneloom.config import build
from tuneloom.errors import ConfigError
from tuneloom.testing import Gang, metrics, small_config
from tuneloom.train import offload
from tuneloom.train.config import BatchConfig, ModelConfig, TrainConfig

LONG = {"model__tile_tokens": 100, "model__checkpointing": "on", "model__checkpoint_offload": True}


def config(lab: Path, run_id: str, **dotted: object) -> dict[str, object]:
    return small_config(lab, run_id, **({"steps": 4} | dotted))


@pytest.fixture(scope="module")
def plain(lab: Path, one: Gang) -> list[float]:
    one.fit(config(lab, "plain"))
    return metrics(lab, "plain")


def receipts(lab: Path, run_id: str) -> dict[str, dict[str, Any]]:
    effects = json.loads((lab / "runs" / run_id / "effects.json").read_text(encoding="utf-8"))
    return {receipt["option"]: receipt for receipt in effects["receipts"]}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_tiles_on_two_ranks_give_the_plain_curve_also_where_a_rank_has_fewer_tokens(
    lab: Path, one: Gang, two: Gang, stage: int
) -> None:
    full = {"method__kind": "full", "batch__tokens": 256, "optim__lr": 1e-3}
    if stage == 0:
        one.fit(config(lab, "untiled", **full, batch__accumulation=2))
    two.fit(config(lab, f"tiled{stage}", **full, model__tile_tokens=50, zero__stage=stage))
    found = metrics(lab, f"tiled{stage}")
    assert found == pytest.approx(metrics(lab, "untiled"), rel=1e-5)
    seen = receipts(lab, f"tiled{stage}")["model.tile_tokens=50"]["evidence"]
    assert seen["tiles"] == 6 * seen["forwards"]  # 256 tokens, at most 50 at a time
    assert seen["losses"] == 2  # micro-batches up to step 2


def test_inputs_on_the_host_change_no_bit_and_their_bytes_are_counted(
    lab: Path, one: Gang, plain: list[float]
) -> None:
    one.fit(config(lab, "host", model__checkpointing="on", model__checkpoint_offload=True))
    assert metrics(lab, "host") == plain
    moved = receipts(lab, "host")["model.checkpoint_offload"]["evidence"]
    tokens = metrics(lab, "host", "train/target_tokens")
    assert moved["inputs"] == 2 * 2  # layers, steps
    assert moved["bytes"] > 2 * sum(tokens[:2]) * 64 * 4


def test_all_of_it_at_once_gives_the_plain_curve_and_draws_dropout_alike(
    lab: Path, one: Gang, plain: list[float]
) -> None:
    one.fit(config(lab, "long", **LONG))
    assert metrics(lab, "long") == pytest.approx(plain, rel=1e-6)
    dropped = {"method__dropout": 0.3}
    one.fit(config(lab, "host-dropout", **dropped, model__checkpointing="on"))
    one.fit(config(lab, "long-dropout", **dropped, model__checkpointing="on",
                   model__checkpoint_offload=True))  # fmt: skip
    assert metrics(lab, "long-dropout") == metrics(lab, "host-dropout")


def test_a_layer_is_recomputed_from_the_copy_and_the_device_lets_go_of_its_input() -> None:
    inputs: list[Tensor] = []

    def layer(hidden: Tensor) -> Tensor:
        inputs.append(hidden.detach())
        return (hidden * 2).sin()

    live = torch.rand(3, 4, requires_grad=True)
    out = offload.checkpoint_on_host(layer, live)
    expected = torch.cos(live.detach() * 2) * 2
    with torch.no_grad():
        live.zero_()  # backward must not read it again
    out.sum().backward()
    assert len(inputs) == 2
    assert live.grad is not None
    assert torch.equal(live.grad, expected)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__checkpoint_offload": True}, "set model.checkpointing=on"),
        ({"model__tile_tokens": 100, "model__kernels": True}, "set model.kernels=false"),
        ({"model__tile_tokens": 512}, "a rank holds is one tile"),
        ({"model__tile_tokens": 256, "batch__sequence_parallel": 2}, "a rank holds is one tile"),
    ],
)
def test_what_would_do_nothing_is_refused(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        build(TrainConfig, small_config(tmp_path, "none", **changes))


def test_a_model_whose_mlp_is_not_known_is_refused_by_name() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    from tuneloom.train import tiles

    small = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model, batch = ModelConfig(path="base", tile_tokens=8), BatchConfig()
    with pytest.raises(ConfigError, match=r"model\.tile_tokens: MixtralSparseMoeBlock"):
        tiles.install(MixtralForCausalLM(small), model, batch)


def test_every_micro_batch_is_cut_into_as_many_tiles() -> None:
    assert BatchConfig(max_length=64, tokens=512).tiles(100) == 6
    shared = BatchConfig(max_length=64, tokens=512, sequence_parallel=4)
    assert shared.tiles(100) == 2
