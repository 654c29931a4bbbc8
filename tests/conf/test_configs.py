"""Every shipped config composes and validates; a fault is a sentence with key, rule and value."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tuneloom import cli
from tuneloom.config import build, compose
from tuneloom.errors import ConfigError
from tuneloom.launch.config import JobConfig
from tuneloom.train.rules import (
    AXES,
    RULES,
    UNREAD,
    markdown,
    refuse_unread,
    verdict,
    violations,
    with_keys,
)

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
GROUPS = ("model", "method", "objective", "data", "optim", "zero", "launch", "tracker")
NEEDED = ["model.path=base", "data.path=rows.jsonl"]


def choices(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def train(*overrides: str) -> JobConfig:
    return build(JobConfig, compose("train", list(overrides)))


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_an_experiment_composes_and_validates(experiment: str) -> None:
    config = train(f"experiment={experiment}")
    assert config.steps or config.epochs


@pytest.mark.parametrize("group", GROUPS)
def test_every_choice_of_a_group_validates(group: str) -> None:
    for choice in choices(group):
        extra = ["method=full"] if choice == "pretrain" else []
        train(*NEEDED, f"{group}={choice}", *extra)


@pytest.mark.parametrize("group", [g for g in GROUPS if g != "launch"])
def test_a_group_file_spells_out_every_field_with_its_default(group: str) -> None:
    """`--cfg job` shows every knob there is, and a default is written once with one meaning."""
    model = JobConfig.model_fields[group].annotation
    mapping = compose("train", NEEDED)[group]
    assert set(mapping) == set(model.model_fields)  # type: ignore[union-attr]


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_a_primary_config_whose_keys_its_model_knows(verb: str) -> None:
    model = importlib.import_module(cli.VERBS[verb][0]).CONFIG
    written = yaml.safe_load((CONF / f"{verb}.yaml").read_text(encoding="utf-8"))
    names = {field.alias or name for name, field in model.model_fields.items()}
    assert set(written) - {"defaults", "hydra"} <= names


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        train(*overrides)
    return str(caught.value)


def test_ranks_that_cannot_share_packs_are_refused_before_a_process_starts() -> None:
    message = refused(*NEEDED, "launch.workers=6", "batch.sequence_parallel=4")
    assert "6 ranks cannot form groups of 4; set launch.workers to a multiple of 4" in message
    assert train(*NEEDED, "launch.workers=8", "batch.sequence_parallel=4").launch.workers == 8


def test_state_that_cannot_move_to_fewer_ranks_is_refused_before_a_process_starts() -> None:
    words = (*NEEDED, "launch=ray", "launch.nodes=2", "launch.workers=2", "launch.min_workers=1",
             "optim=muon", "optim.clip=0", "method=full")  # fmt: skip
    assert "launch.min_workers: the state of optim.name=muon cannot move" in refused(*words)
    assert train(*words, "zero=stage0").launch.min_workers == 1
    assert train(*words, "launch.min_workers=2").launch.min_workers == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("zero.stage=5", ["zero.stage", "expected one of [0, 1, 2, 3]", "got 5"]),
        ("optim.lr=fast", ["optim.lr", "number", "got 'fast'"]),
        ("method.rank=0", ["method.rank", "greater than 0", "got 0"]),
        ("checkpoint.keep=-1", ["checkpoint.keep", "got -1"]),
        ("model.dtype=float16", ["model.dtype", "'bf16'", "got 'float16'"]),
        ("run.name=2026", ["run.name: ", "got 2026", "quote a text that reads as a number"]),
        ("method.targets=q_proj", ["method.targets: expected all-linear", "got 'q_proj'"]),
        ("optim.beta2=1.0", ["optim.beta2", "less than 1", "got 1.0"]),
        ("optim.lr=inf", ["optim.lr", "finite", "got inf"]),
        ("tracker=null", ["tracker: expected one of ['auto', 'off', 'offline', 'online']", "null"]),
        ("zero=2", ["zero: expected one of ['stage0',", "got 2"]),
        ("run.name=../up", ["run.name", "[a-z0-9._-]", "got '../up'"]),
        ("batch.tokens=100", ["batch.tokens", "at least batch.max_length (2048)", "got 100"]),
    ],
)
def test_a_wrong_value_is_refused_with_key_rule_and_value(override: str, said: list[str]) -> None:
    message = refused(*NEEDED, override)
    assert all(part in message for part in said), message


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("optim.lrr=1e-4", "optim.lr"),
        ("zero.stge=2", "zero.stage"),
        ("batch.token=9", "batch.tokens"),
    ],
)
def test_an_unknown_key_ends_with_2_and_names_the_nearest(
    override: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *NEEDED, override]) == 2
    message = capsys.readouterr().err
    assert override.split("=")[0] in message and meant in message


def test_every_weight_learns_at_a_lower_rate_than_an_adapter_unless_told() -> None:
    assert train(*NEEDED).optim.lr == 2e-4
    assert train(*NEEDED, "method=full").optim.lr == 1e-5
    assert train(*NEEDED, "optim=muon").optim.lr == 2e-4
    assert train(*NEEDED, "method=full", "~optim").optim.lr == 1e-5
    without = compose("train", [*NEEDED, "method=full"])
    del without["optim"]["lr"]
    assert build(JobConfig, without).optim.lr == 1e-5
    assert train(*NEEDED, "method=full", "optim.lr=3e-6").optim.lr == 3e-6
    assert train("experiment=llama3_8b_full").optim.lr == 1e-5
    assert train("experiment=llama3_70b_full_64gpu").optim.lr == 5e-6


# One example a value, in their order.
UNREAD_VALUES: list[list[str]] = [
    ["batch.sequences=1"],
    ["method=full", "method.rank=8"],
    ["method=full", "method.alpha=8"],
    ["method=full", "method.targets=[q_proj]"],
    ["method.double_quantisation=false"],
    ["optim.muon_lr=0.1"],
    ["optim.decay_fraction=0.5"],
    ["model.checkpoint_every_layers=4"],
    ["zero.nvme_path=/mnt"],
]


@pytest.mark.parametrize("number", range(len(UNREAD)))
def test_a_value_that_nobody_reads_is_refused_where_it_is_given_and_not_in_a_run_that_has_it(
    number: int, tmp_path: Path
) -> None:
    assert len(UNREAD_VALUES) == len(UNREAD)
    config = train(*NEEDED, f"run.root={tmp_path}", "run.id=r", *UNREAD_VALUES[number])
    with pytest.raises(ConfigError, match=rf"^{UNREAD[number].keys[0]}: "):
        refuse_unread(config)
    facts = {"config_digest": "d", "config": {}, "attempts": [], "base": {"digest": "b"},
             "dataset": {"digest": "d"}}  # fmt: skip
    (tmp_path / "r").mkdir()
    (tmp_path / "r/run.json").write_text(json.dumps(facts))
    refuse_unread(config)


def test_a_required_key_left_unset_is_named() -> None:
    assert "model.path" in refused("data.path=rows.jsonl")


def test_neither_steps_nor_epochs_is_refused() -> None:
    assert "set steps=1000" in refused(*NEEDED, "steps=null", "epochs=null")


# One example a rule, in the order of the rules.
BROKEN: list[list[str]] = [
    ["method=qlora", "zero=stage3"],
    ["zero=stage0", "zero.offload=cpu"],
    ["zero=stage2", "zero.offload=nvme", "zero.nvme_path=/mnt"],
    ["zero=stage2", "zero.offload_parameters=cpu"],
    ["zero=stage3", "zero.offload=nvme"],
    ["optim=adamw8bit", "zero.offload=cpu"],
    ["zero=stage3", "optim=muon", "optim.clip=0", "zero.offload=nvme", "zero.nvme_path=/mnt"],
    ["zero=stage0", "model.dtype=fp16"],
    ["zero=stage3", "optim=adamw8bit", "zero.offload_parameters=nvme", "zero.nvme_path=/mnt"],
    ["optim=muon", "optim.clip=1.0"],
    ["model.attention=flash", "model.dtype=fp32"],
    ["model.init=random", "method=lora"],
    ["model.kernels=true", "model.checkpointing=on"],
    ["model.checkpoint_offload=true"],
    ["model.compile=true", "model.kernels=true"],
    ["model.compile=true", "zero=stage3"],
    ["model.compile=true", "method=qlora"],
    ["model.cuda_graphs=true", "batch.packing=false"],
    ["model.cuda_graphs=true", "model.attention=sdpa"],
    ["model.cuda_graphs=true", "model.checkpointing=on"],
    ["model.cuda_graphs=true", "zero=stage3"],
    ["model.cuda_graphs=true", "method.dropout=0.1"],
    ["batch.documents=4", "batch.packing=false"],
    ["model.fp8=true", "method.dora=true"],
    ["model.fp8=true", "zero=stage3"],
    ["model.fp8=true", "model.dtype=fp32"],
    ["model.tile_tokens=1024", "model.kernels=true"],
    ["model.tile_tokens=2048", "batch.sequence_parallel=4", "launch.workers=4"],
    ["method=full", "method.dora=true"],
    ["method=full", "method.extra_modules=[lm_head]"],
    ["method.prefetch=true", "model.kernels=true"],
    ["method=qlora", "method.prefetch=true"],
    [
        "method=qlora",
        "method.prefetch=true",
        "model.kernels=true",
        "method.dora=true",
        "method.dropout=0.1",
    ],
    ["data.format=text"],
    ["data.format=preference"],
    [
        "checkpoint.asynchronous=true",
        "checkpoint.memory_every=1",
        "zero=stage3",
        "zero.offload=nvme",
        "zero.offload_parameters=nvme",
        "zero.nvme_path=/mnt",
    ],
    ["train.patience=3"],
]


@pytest.mark.parametrize(("rule", "overrides"), list(zip(RULES, BROKEN, strict=True)))
def test_each_rule_refuses_its_example_and_says_the_way_out(
    rule: Any, overrides: list[str]
) -> None:
    message = refused(*NEEDED, *overrides)
    assert message.startswith(", ".join(rule.keys)) and rule.reason in message


def test_the_committed_table_is_what_the_rules_generate() -> None:
    path = ROOT / "docs" / "combinations.md"
    assert path.read_text(encoding="utf-8") == markdown(), "run python -m tuneloom.train.rules"


def test_the_table_and_the_validator_agree_on_every_method_stage_and_optimizer() -> None:
    for method in AXES["method"]:
        for stage in AXES["ZeRO"]:
            for optimizer in AXES["optimizer"]:
                settings = method | stage | optimizer
                told = list(violations(with_keys(settings)))
                assert (verdict(settings) is None) == (not told)


def test_a_dangling_link_in_a_config_dir_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").symlink_to("nowhere.yaml")
    assert cli.main(["ingest", "--config-dir", str(tmp_path), "data=mine"]) == 2
    assert "mine.yaml: cannot be read (No such file or directory)" in capsys.readouterr().err


def test_a_mapping_with_entries_says_how_to_add_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = "name: d\nsource: raw\nprivacy: {actions: {card: drop}}\n"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(recipe)
    asked = ["ingest", "--config-dir", str(tmp_path), "data=mine"]
    assert cli.main([*asked, "data.privacy.actions={email: keep}"]) == 2
    assert "to add one, write +data.privacy.actions.NAME=VALUE" in capsys.readouterr().err
    added = "+data.privacy.actions.email=keep"
    mapping = compose("ingest", ["data=mine", added], config_dir=str(tmp_path))
    assert mapping["data"]["privacy"]["actions"] == {"card": "drop", "email": "keep"}


def test_torchrun_takes_a_config_dir_as_the_command_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tuneloom.train.__main__ import main

    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\noptim: {lr: fast}\n")
    assert main(["--config-dir", str(tmp_path), "experiment=mine", *NEEDED]) == 2
    assert "optim.lr: input should be a valid number" in capsys.readouterr().err
    assert main(["--config-dir", "/nowhere", *NEEDED]) == 2
    assert "expected an existing folder" in capsys.readouterr().err
