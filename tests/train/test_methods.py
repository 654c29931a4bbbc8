"""Every method, optimizer, precision and offload trains, and its receipt says what it did."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tuneloom.config import build
from tuneloom.errors import ConfigError, TrainingError
from tuneloom.launch.anatomy import anatomy
from tuneloom.testing import Gang, metrics, small_config, tiny_model
from tuneloom.train import effects
from tuneloom.train.config import TrainConfig
from tuneloom.train.model import moe_blocks
from tuneloom.train.session import _prefetch


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, lab: Path) -> Path:
    """A lab whose base is 128 wide, which NF4's blocks need (96 fails on a CPU)."""
    folder = tmp_path_factory.mktemp("wide")
    tiny_model(folder / "base", hidden=128)
    for name in ("rows.jsonl", "validation.jsonl"):
        (folder / name).write_bytes((lab / name).read_bytes())
    return folder


def receipts(folder: Path, run_id: str) -> dict[str, dict[str, Any]]:
    found = json.loads((folder / "runs" / run_id / "effects.json").read_text())["receipts"]
    return {receipt["option"]: receipt["evidence"] for receipt in found if receipt["acted"]}


CASES: dict[str, dict[str, object]] = {
    "full": {"method__kind": "full"},
    "lora": {},
    "dora": {"method__dora": True},
    "rslora": {"method__rslora": True},
    "targets": {"method__targets": ["q_proj", "v_proj"]},
    "extra": {"method__extra_modules": ["lm_head"]},
    "extra_fused": {"method__extra_modules": ["lm_head"], "model__kernels": True},
    "muon": {"optim__name": "muon", "optim__clip": 0.0, "method__kind": "full"},
    "adamw8bit": {"optim__name": "adamw8bit", "method__rank": 64},
    "bf16": {"model__dtype": "bf16"},
}
ACTED = {
    "full": "method=full", "lora": "method=lora", "dora": "method.dora", "rslora": "method.rslora",
    "targets": "method=lora", "extra": "method.extra_modules=lm_head",
    "extra_fused": "method.extra_modules=lm_head", "muon": "optim=muon",
    "adamw8bit": "optim=adamw8bit", "bf16": "model.dtype=bf16",
}  # fmt: skip


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_each_method_trains_acts_and_saves_what_it_trained(
    lab: Path, two: Gang, case: str, stage: int
) -> None:
    run_id = f"{case}-{stage}"
    drilled = stage == 3  # where the weights must be gathered first
    settings = {"steps": 8, "zero__stage": stage, "train__drill": drilled} | CASES[case]
    two.fit(small_config(lab, run_id, **settings))
    losses = metrics(lab, run_id)
    assert losses[-1] < losses[0]
    assert ACTED[case] in receipts(lab, run_id)
    if drilled:
        assert json.loads((lab / "runs" / run_id / "drill" / "drill.json").read_text())["ok"]


def test_muon_updates_are_orthogonal_and_adamw_updates_are_not(lab: Path) -> None:
    def evenness(run_id: str, option: str) -> float:
        values = receipts(lab, run_id)[option]["update"]["singular_values"]
        return float(values["median"] / values["largest"])

    assert min(evenness(f"muon-{stage}", "optim=muon") for stage in (0, 2, 3)) > effects.EVEN
    assert evenness("full-2", "optim=adamw") < effects.EVEN


def test_of_a_model_trained_whole_a_small_matrix_is_watched_and_not_the_embedding(
    lab: Path,
) -> None:
    watched = receipts(lab, "full-2")["optim=adamw"]["update"]["parameter"]
    assert watched == "model.layers.0.self_attn.k_proj.weight"


def test_rslora_scales_by_the_root_of_the_rank(lab: Path) -> None:
    assert receipts(lab, "rslora-0")["method.rslora"]["scaling"] == [32 / math.sqrt(8)]


def test_targets_adapt_those_modules_and_no_other(lab: Path) -> None:
    state = load_file(lab / "runs/targets-0/weights/adapter_model.safetensors")
    assert {name.split(".")[-3] for name in state} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("stage", [0, 2])
def test_qlora_holds_linears_in_nf4_and_learns(wide: Path, two: Gang, stage: int) -> None:
    run_id = f"qlora{stage}"
    config = small_config(
        wide, run_id, steps=8, method__kind="qlora", zero__stage=stage, train__drill=True
    )
    two.fit(config)
    losses = metrics(wide, run_id)
    assert losses[-1] < losses[0]
    assert receipts(wide, run_id)["method=qlora"]["modules_in_nf4"] == 14


@pytest.mark.parametrize("stage", [0, 2])
def test_nf4_unpacked_ahead_gives_the_same_losses_and_says_how_often(
    wide: Path, two: Gang, stage: int
) -> None:
    settings = {
        "steps": 4, "zero__stage": stage, "method__kind": "qlora", "model__kernels": True,
        "model__dtype": "bf16", "method__dropout": 0.1, "batch__accumulation": 2,
        "batch__tokens": 256, "data__validation": str(wide / "validation.jsonl"),
        "train__validate_every": 1,
    }  # fmt: skip
    for ahead in (False, True):
        config = small_config(
            wide, f"ahead{ahead}{stage}".lower(), method__prefetch=ahead, **settings
        )
        two.fit(config)
    for key in ("train/loss", "train/grad_norm", "eval/loss"):
        plain, ahead = (metrics(wide, f"ahead{on}{stage}", key) for on in ("false", "true"))
        assert plain == ahead and len(ahead) == 4, key
    evidence = receipts(wide, f"aheadtrue{stage}")["method.prefetch"]
    assert evidence["hits"] > 5 * evidence["misses"] > 0
    assert evidence["buffer_bytes"] == 2 * 2 * 128 * 256  # the MLP's, in bf16


def test_unpacking_ahead_is_refused_where_no_layer_would_ask_for_it() -> None:
    with pytest.raises(
        ConfigError, match=r"method\.prefetch: model\.kernels fuses no layer of Gem"
    ):
        _prefetch(torch.nn.Linear(1, 1), {"GemmaMLP": {"gated": 2}})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_gives_the_curve_of_no_offload(lab: Path, two: Gang, stage: int) -> None:
    for offload in ("none", "cpu"):
        run_id = f"offload-{offload}-{stage}"
        two.fit(small_config(lab, run_id, steps=8, zero__stage=stage, zero__offload=offload))
    assert metrics(lab, f"offload-cpu-{stage}") == pytest.approx(
        metrics(lab, f"offload-none-{stage}"), rel=1e-4
    )
    evidence = receipts(lab, f"offload-cpu-{stage}")["zero.offload=cpu"]
    assert evidence["optimizer"] == "DeepSpeedCPUAdam" and evidence["offloaded_bytes"] > 0


def test_offloaded_parameters_give_the_same_curve(lab: Path, two: Gang) -> None:
    settings = {"steps": 6, "zero__stage": 3, "zero__offload": "cpu"}
    two.fit(small_config(lab, "parked", zero__offload_parameters="cpu", **settings))
    two.fit(small_config(lab, "unparked", **settings))
    assert metrics(lab, "parked") == pytest.approx(metrics(lab, "unparked"), rel=1e-5)
    assert receipts(lab, "parked")["zero.offload_parameters=cpu"]["offloaded_bytes"] > 0


def test_bf16_follows_fp32_within_its_precision(lab: Path) -> None:
    assert metrics(lab, "bf16-2") == pytest.approx(metrics(lab, "lora-2"), rel=2e-2)
    assert metrics(lab, "bf16-0") == pytest.approx(metrics(lab, "bf16-2"), rel=5e-3)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_under_bf16_masters_optimizer_state_and_the_saved_adapter_are_fp32(
    lab: Path, stage: int
) -> None:
    evidence = receipts(lab, f"bf16-{stage}")["model.dtype=bf16"]
    assert evidence["masters"] == evidence["optimizer_state"] == ["float32"]
    assert set(evidence["parameters"]) == {"bfloat16"}
    saved = load_file(lab / f"runs/bf16-{stage}/weights/adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    # More than a bf16 copy holds: the updates since the start were not rounded away.
    assert all(not torch.equal(t, t.bfloat16().float()) for t in saved.values())


def test_zero_3_shards_every_parameter_from_the_start(lab: Path) -> None:
    evidence = receipts(lab, "full-3")["zero.stage=3"]
    whole = receipts(lab, "full-0")["zero.stage=0"]
    assert evidence["sharded_parameters"] > 0 and whole["sharded_parameters"] == 0
    assert evidence["optimizer_bytes_on_this_rank"] < 0.6 * whole["optimizer_bytes_on_this_rank"]


def test_an_option_that_did_nothing_ends_the_run_by_name() -> None:
    idle = effects.Receipt("optim=muon", False, {"parameters_by_branch": {"adamw": 10}})
    with pytest.raises(TrainingError, match="options that did nothing: optim=muon"):
        effects.refuse_idle([idle])


def test_an_unknown_target_is_refused_with_the_nearest_name(lab: Path, one: Gang) -> None:
    with pytest.raises(ConfigError, match=r"method\.targets: .*'q_porj'; did you mean 'q_proj'"):
        one.fit(small_config(lab, "typo", method__targets=["q_porj"]))


@pytest.fixture
def experts(lab: Path, tmp_path: Path) -> Path:
    """A lab whose base is a Qwen3-MoE of two layers and four experts, two a token."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    tiny_model(tmp_path / "base")
    sizes = json.loads((tmp_path / "base" / "config.json").read_text())
    kept = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads")
    config = Qwen3MoeConfig(
        **{key: sizes[key] for key in kept}, num_hidden_layers=2, head_dim=16, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=32,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_bytes((lab / "rows.jsonl").read_bytes())
    return tmp_path


def test_rslora_on_stacked_experts_scales_by_the_root_of_each_rank(
    experts: Path, one: Gang
) -> None:
    names = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    one.fit(small_config(experts, "rslora", method__rslora=True, method__targets=names))
    assert metrics(experts, "rslora")[-1] < metrics(experts, "rslora")[0]
    plain, fused = 32 / math.sqrt(8), 64 / math.sqrt(16)
    assert receipts(experts, "rslora")["method.rslora"]["scaling"] == [plain, fused]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dropout": 0.1}, r"method\.dropout: .*stacked experts.*set method\.dropout=0, or name"),
        ({"dora": True}, r"method\.dora: .*stacked experts.*set method\.dora=false, or name"),
        ({"dora": True, "targets": ["down_proj"]}, r"method\.dora: .*\(down_proj\)"),
        ({"targets": ["up_proj"]}, "gate_proj and up_proj are one parameter .*got up_proj alone"),
        ({"targets": ["w1"]}, "no module 'w1'.*its experts are down_proj, gate, gate_proj, up_p"),
    ],
)
def test_what_adapters_on_stacked_experts_cannot_do_is_refused_by_its_key(
    experts: Path, changes: dict[str, Any], said: str
) -> None:
    config = small_config(experts, "planned", **{f"method__{k}": v for k, v in changes.items()})
    with pytest.raises(ConfigError, match=said):
        anatomy(build(TrainConfig, config))


def test_attention_beside_stacked_experts_takes_dropout_and_dora(experts: Path) -> None:
    asked = {"method__dropout": 0.1, "method__dora": True, "method__targets": ["q_proj"]}
    assert anatomy(build(TrainConfig, small_config(experts, "planned", **asked))).trainable > 0


def test_mixture_of_experts_blocks_are_found_for_zero_3() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    assert [kind.__name__ for kind in moe_blocks(MixtralForCausalLM(config))] != []


@pytest.mark.parametrize(("kind", "tied"), [("full", True), ("full", False), ("lora", True)])
def test_beside_a_vision_tower_the_language_model_alone_is_trained(
    lab: Path, one: Gang, tmp_path: Path, kind: str, tied: bool
) -> None:
    import transformers

    tiny_model(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_bytes((lab / "rows.jsonl").read_bytes())
    sizes = json.loads((tmp_path / "base" / "config.json").read_text())
    text = {key: sizes[key] for key in ("vocab_size", "hidden_size", "num_attention_heads")}
    text |= {"intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 1,
             "head_dim": 16, "query_pre_attn_scalar": 16}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, tie_word_embeddings=tied
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    asked = {"method__kind": kind, "model__kernels": True, "optim__weight_decay": 0.1}
    one.fit(small_config(tmp_path, kind, **asked))
    losses = metrics(tmp_path, kind)
    assert losses[-1] < losses[0]
    found = json.loads((tmp_path / "runs" / kind / "effects.json").read_text())
    assert found["kernels"]["Gemma3ForConditionalGeneration"] == {"linear_cross_entropy": 1}
    assert receipts(tmp_path, kind)[f"method={kind}"]["without_gradient"] == []
    (file,) = (tmp_path / "runs" / kind / "weights").glob("*.safetensors")
    after, before = load_file(file), load_file(tmp_path / "base" / "model.safetensors")
    assert not [name for name in after if "lora" in name and "language_model" not in name]
    if kind == "full":
        assert set(after) == set(before) and any("lm_head" in name for name in after) is not tied
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved and not [name for name in moved if "language_model" not in name]
