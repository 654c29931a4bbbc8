"""Combinations that cannot run, as data: each rule names its keys, when it holds, and the way out.

`python -m tuneloom.train.rules` writes docs/combinations.md from these very rules. Reasons say what
was seen with DeepSpeed 0.19.8, bitsandbytes 0.50.2 and PEFT 0.21.2 on two gloo ranks.
"""

import argparse
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneloom.errors import ConfigError

if TYPE_CHECKING:
    from tuneloom.train.config import TrainConfig

TABLE = "docs/combinations.md"


@dataclass(frozen=True)
class Rule:
    """`broken(config)` is True when the combination cannot run."""

    keys: tuple[str, ...]
    broken: Callable[["TrainConfig"], bool]
    reason: str
    """Why, and what to do instead; follows `keys: ` in the message."""


def idle(key: str, read: Callable[["TrainConfig"], bool], reason: str) -> Rule:
    """Refuses a value that nobody would read: what was meant by it would not happen."""
    part, name = key.split(".")

    def broken(config: "TrainConfig") -> bool:
        section = getattr(config, part)
        return (
            not read(config) and getattr(section, name) != type(section).model_fields[name].default
        )

    return Rule((key,), broken, reason)


RULES: tuple[Rule, ...] = (
    Rule(
        ("method.kind", "zero.stage"),
        lambda c: c.method.kind == "qlora" and c.zero.stage == 3,
        "NF4 is packed from whole weights, which partitioned init never holds; set zero.stage=2 "
        "(the 4-bit base is replicated)",
    ),
    Rule(
        ("zero.offload", "zero.stage"),
        lambda c: c.zero.offload != "none" and c.zero.stage == 0,
        "without ZeRO, DeepSpeed takes the setting and moves nothing; set zero.stage=1, 2 or 3",
    ),
    Rule(
        ("zero.offload", "zero.stage"),
        lambda c: c.zero.offload == "nvme" and c.zero.stage != 3,
        "only ZeRO-3 swaps to NVMe; set zero.stage=3 or zero.offload=cpu",
    ),
    Rule(
        ("zero.offload_parameters", "zero.stage"),
        lambda c: c.zero.offload_parameters != "none" and c.zero.stage != 3,
        "only ZeRO-3 shards parameters; set zero.stage=3",
    ),
    Rule(
        ("zero.nvme_path", "zero.offload"),
        lambda c: "nvme" in (c.zero.offload, c.zero.offload_parameters) and not c.zero.nvme_path,
        "NVMe offload needs a folder on the drive; set zero.nvme_path=/mnt/nvme",
    ),
    Rule(
        ("optim.name", "zero.offload"),
        lambda c: c.optim.name == "adamw8bit" and c.zero.offload != "none",
        "DeepSpeed offloads to its own CPU Adam and refuses any other; set optim.name=adamw",
    ),
    Rule(
        ("optim.name", "zero.offload"),
        lambda c: c.optim.name == "muon" and c.zero.offload == "nvme",
        "Muon's momentum is gathered on every step and is not swapped; set zero.offload=cpu",
    ),
    Rule(
        ("model.dtype", "zero.stage"),
        lambda c: c.model.dtype == "fp16" and c.zero.stage == 0,
        "without ZeRO, DeepSpeed divides gradients by a loss scale that it never multiplied the "
        "loss by; set zero.stage=1, or model.dtype=bf16",
    ),
    Rule(
        ("optim.name", "zero.offload_parameters"),
        lambda c: c.optim.name != "adamw" and c.zero.offload_parameters == "nvme",
        "checkpoints of parameters on a drive hold AdamW's state only; set optim.name=adamw or "
        "zero.offload_parameters=cpu",
    ),
    Rule(
        ("optim.clip", "optim.name"),
        lambda c: c.optim.name == "muon" and c.optim.clip > 0,
        "ZeRO clips Muon's orthogonal update, not its gradient, and learns many times slower; set "
        "optim.clip=0 (the update's norm is fixed as it is)",
    ),
    Rule(
        ("model.attention", "model.dtype"),
        lambda c: c.model.attention in ("flash", "varlen") and c.model.dtype == "fp32",
        "FlashAttention knows bf16 and fp16 only; set model.dtype=bf16 or model.attention=auto",
    ),
    Rule(
        ("model.init", "method.kind"),
        lambda c: c.model.init == "random" and c.method.kind != "full",
        "an adapter on random weights trains nothing of use; set method=full",
    ),
    Rule(
        ("model.kernels", "model.checkpointing"),
        lambda c: c.model.kernels and c.model.checkpointing != "off",
        "the fused layers keep few activations and recompute none; set model.checkpointing=off",
    ),
    Rule(
        ("model.checkpoint_offload", "model.checkpointing"),
        lambda c: c.model.checkpoint_offload and c.model.checkpointing == "off",
        "what is moved is the input of recomputed layers; set model.checkpointing=on",
    ),
    Rule(
        ("model.compile", "model.kernels", "model.checkpointing", "model.tile_tokens", "model.fp8"),
        lambda c: (
            c.model.compile
            and (
                c.model.kernels
                or c.model.fp8
                or c.model.tile_tokens is not None
                or c.model.checkpointing != "off"
            )
        ),
        "each puts code of its own into the layers, which a compiled layer would leave or break "
        "into many graphs; set model.compile=false, or leave them off",
    ),
    Rule(
        ("model.compile", "zero.stage", "batch.sequence_parallel"),
        lambda c: c.model.compile and (c.zero.stage == 3 or c.batch.sequence_parallel > 1),
        "ZeRO-3 gathers weights by hooks in the layers, and sequence parallelism exchanges heads "
        "in them; set zero.stage=2 and batch.sequence_parallel=1",
    ),
    Rule(
        ("model.compile", "method.kind", "method.dropout"),
        lambda c: c.model.compile and (c.method.kind == "qlora" or c.method.dropout > 0),
        "NF4 is unpacked by a library of its own, and compiled dropout draws other masks than a "
        "resumed run would; set method=lora with method.dropout=0",
    ),
    Rule(
        ("model.cuda_graphs", "batch.packing"),
        lambda c: c.model.cuda_graphs and not c.batch.packing,
        "a graph has one shape, and rows padded to the longest have many; set batch.packing=true",
    ),
    Rule(
        ("model.cuda_graphs", "model.attention"),
        lambda c: c.model.cuda_graphs and c.model.attention in ("sdpa", "eager"),
        "their shapes follow the documents of a pack; set model.attention=auto, varlen or flash",
    ),
    Rule(
        (
            "model.cuda_graphs",
            "model.checkpointing",
            "model.tile_tokens",
            "model.compile",
            "model.fp8",
        ),
        lambda c: (
            c.model.cuda_graphs
            and (
                c.model.compile
                or c.model.fp8
                or c.model.tile_tokens is not None
                or c.model.checkpointing != "off"
            )
        ),
        "recomputation and tiles start a backward of their own in the captured one, compiled "
        "layers would capture themselves, and FP8's bytes would lose their scales as arguments of "
        "a graph; leave them off, or set model.cuda_graphs=false",
    ),
    Rule(
        ("model.cuda_graphs", "zero.stage", "batch.sequence_parallel"),
        lambda c: c.model.cuda_graphs and (c.zero.stage == 3 or c.batch.sequence_parallel > 1),
        "ZeRO-3 gathers weights by hooks in the layers, to another place each time, and sequence "
        "parallelism exchanges heads in them; set zero.stage=2 and batch.sequence_parallel=1",
    ),
    Rule(
        ("model.cuda_graphs", "method.kind", "method.dropout"),
        lambda c: c.model.cuda_graphs and (c.method.kind == "qlora" or c.method.dropout > 0),
        "NF4's blocks would be lost as arguments of a graph, and a mask drawn from a seed of the "
        "host would be the same in every replay; set method=lora with method.dropout=0",
    ),
    Rule(
        ("batch.documents", "batch.packing"),
        lambda c: c.batch.documents is not None and not c.batch.packing,
        "it limits packs; set batch.sequences, or batch.packing=true",
    ),
    Rule(
        ("model.fp8", "method.kind", "method.dora"),
        lambda c: c.model.fp8 and (c.method.kind == "qlora" or c.method.dora),
        "QLoRA's weights are in NF4, and DoRA needs each row's norm; set method=lora or full with "
        "method.dora=false, or model.fp8=false",
    ),
    Rule(
        ("model.fp8", "zero.stage"),
        lambda c: c.model.fp8 and c.zero.stage == 3,
        "rows are scaled from whole weights, which partitioned init never holds; set zero.stage=2 "
        "(the FP8 base is replicated)",
    ),
    Rule(
        ("model.fp8", "model.dtype"),
        lambda c: c.model.fp8 and c.model.dtype != "bf16",
        "a row-wise FP8 product on a GPU writes bf16 only; set model.dtype=bf16",
    ),
    Rule(
        ("model.tile_tokens", "model.kernels"),
        lambda c: c.model.tile_tokens is not None and c.model.kernels,
        "the fused layers compute their MLPs whole, and the loss in tiles already; set "
        "model.kernels=false",
    ),
    Rule(
        ("model.tile_tokens", "batch.tokens", "batch.sequence_parallel"),
        lambda c: c.model.tile_tokens is not None and c.model.tile_tokens >= c.batch.rank_tokens,
        "the part of a micro-batch that a rank holds is one tile; lower model.tile_tokens, or set "
        "it to null",
    ),
    Rule(
        ("method.dora", "method.rslora", "method.kind"),
        lambda c: c.method.kind == "full" and (c.method.dora or c.method.rslora),
        "DoRA and rsLoRA are kinds of LoRA; set method=lora",
    ),
    Rule(
        ("method.extra_modules", "method.kind"),
        lambda c: c.method.kind == "full" and bool(c.method.extra_modules or c.method.dropout),
        "method=full trains every module and drops nothing out; set method=lora, or unset "
        "method.extra_modules and method.dropout",
    ),
    Rule(
        ("method.prefetch", "method.kind"),
        lambda c: c.method.prefetch and c.method.kind != "qlora",
        "only QLoRA holds weights in NF4, to be unpacked ahead; set method=qlora, or "
        "method.prefetch=false",
    ),
    Rule(
        ("method.prefetch", "model.kernels"),
        lambda c: c.method.prefetch and not c.model.kernels,
        "without the fused layers bitsandbytes unpacks each weight inside its own product; set "
        "model.kernels=true",
    ),
    Rule(
        ("method.prefetch", "method.dora", "method.dropout"),
        lambda c: c.method.prefetch and c.method.dora and c.method.dropout > 0,
        "DoRA with dropout runs PEFT's own layers, and bitsandbytes' products in them; set "
        "method.dropout=0, or method.prefetch=false",
    ),
    Rule(
        ("data.format", "objective.kind"),
        lambda c: (
            (c.data.format, c.objective.kind) == ("text", "sft")
            or (
                c.data.format in ("messages", "prompt_completion", "classification", "extraction")
                and c.objective.kind == "pretrain"
            )
        ),
        "text rows are for objective=pretrain, chats, completions, labels and extractions for "
        "objective=sft",
    ),
    Rule(
        ("data.format", "objective.kind"),
        lambda c: c.data.format == "preference",
        "no objective compares answers; make prompt and completion of the chosen ones",
    ),
    Rule(
        (
            "checkpoint.asynchronous",
            "checkpoint.memory_every",
            "zero.offload",
            "zero.offload_parameters",
        ),
        lambda c: (
            (c.checkpoint.asynchronous or c.checkpoint.memory_every > 0)
            and "nvme" in (c.zero.offload, c.zero.offload_parameters)
        ),
        "state on a drive is gathered tensor by tensor, never copied whole to host memory; set "
        "checkpoint.asynchronous=false and checkpoint.memory_every=0",
    ),
    Rule(
        ("train.patience", "train.validate_every"),
        lambda c: (
            c.train.patience > 0 and (c.train.validate_every == 0 or c.data.validation is None)
        ),
        "an early stop needs validations; set train.validate_every=100 and data.validation",
    ),
)


UNREAD: tuple[Rule, ...] = (
    idle(
        "batch.sequences",
        lambda c: not c.batch.packing,
        "a pack takes what fits into batch.tokens, whatever its number; lower that, or set "
        "batch.documents or batch.packing=false",
    ),
    *(
        idle(
            f"method.{name}",
            lambda c: c.method.kind != "full",
            "method=full trains every weight and has no adapter; set method=lora, or leave it out",
        )
        for name in ("rank", "alpha", "targets")
    ),
    idle(
        "method.double_quantisation",
        lambda c: c.method.kind == "qlora",
        "only QLoRA holds its base in NF4; set method=qlora, or leave it out",
    ),
    idle(
        "optim.muon_lr",
        lambda c: c.optim.name == "muon",
        "only Muon reads it; set optim=muon, or optim.lr",
    ),
    idle(
        "optim.decay_fraction",
        lambda c: c.optim.schedule == "wsd",
        "the other schedules fall all the way; set optim.schedule=wsd, or leave it out",
    ),
    idle(
        "model.checkpoint_every_layers",
        lambda c: c.model.checkpointing == "selective",
        "every layer is recomputed, or none; set model.checkpointing=selective, or leave it out",
    ),
    idle(
        "zero.nvme_path",
        lambda c: "nvme" in (c.zero.offload, c.zero.offload_parameters),
        "nothing is moved to a drive; set zero.offload=nvme with zero.stage=3, or leave it out",
    ),
)
"""Values without an effect: refused where a person gives them, not in what a run has recorded."""


def refuse_unread(config: "TrainConfig") -> None:
    """Raise ConfigError for a value that nobody would read; a run that began with it goes on, and
    is trained again by `tuneloom erase`.
    """
    from tuneloom.train.runs import folder_of, recorded

    if "TUNELOOM_TRAINS_AGAIN" in os.environ:
        return
    if config.run.id is not None and recorded(folder_of(config)):
        return
    for rule in UNREAD:
        if rule.broken(config):
            raise ConfigError(f"{', '.join(rule.keys)}: {rule.reason}")


def violations(config: "TrainConfig") -> Iterator[str]:
    """A sentence for each rule that this config breaks."""
    for rule in RULES:
        if rule.broken(config):
            yield f"{', '.join(rule.keys)}: {rule.reason}"


# The table. An axis is dotted keys and the values they take together.

AXES: dict[str, tuple[dict[str, Any], ...]] = {
    "method": tuple({"method.kind": kind} for kind in ("full", "lora", "qlora")),
    "ZeRO": tuple({"zero.stage": stage} for stage in (0, 1, 2, 3)),
    "offload": (
        {"zero.offload": "none", "zero.offload_parameters": "none"},
        {"zero.offload": "cpu", "zero.offload_parameters": "none"},
        {"zero.offload": "cpu", "zero.offload_parameters": "cpu"},
        {"zero.offload": "nvme", "zero.offload_parameters": "none", "zero.nvme_path": "/mnt/nvme"},
    ),
    "optimizer": (
        {"optim.name": "adamw"},
        {"optim.name": "adamw8bit"},
        {"optim.name": "muon", "optim.clip": 0.0},
    ),
    "precision": tuple({"model.dtype": dtype} for dtype in ("bf16", "fp16", "fp32")),
    "packing": ({"batch.packing": True}, {"batch.packing": False}),
    "attention": tuple({"model.attention": name} for name in ("flash", "varlen", "sdpa", "eager")),
}
OFFLOADS = ("none", "optimizer to cpu", "optimizer and parameters to cpu", "optimizer to nvme")
BASE: dict[str, Any] = {
    "steps": 1,
    "model": {"path": "base"},
    "method": {"kind": "lora"},
    "objective": {"kind": "sft"},
    "data": {"path": "rows.jsonl"},
}


def with_keys(settings: dict[str, Any]) -> "TrainConfig":
    """A config with dotted keys set, past its own validators: the rules are asked afterwards."""
    from tuneloom.train.config import TrainConfig

    valid = TrainConfig.model_validate(BASE)
    parts: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        part, field = key.split(".")
        parts.setdefault(part, {})[field] = value
    update = {part: getattr(valid, part).model_copy(update=v) for part, v in parts.items()}
    return valid.model_copy(update=update)


def verdict(settings: dict[str, Any]) -> int | None:
    """Number of the first rule that refuses these settings, counted from 1; None when they run."""
    config = with_keys(settings)
    return next((n for n, rule in enumerate(RULES, 1) if rule.broken(config)), None)


def markdown() -> str:
    """The whole of docs/combinations.md."""
    parts = [_heading(), _counts(), _main_table(), _attention_table(), _rule_list()]
    return "\n".join(parts)


def _heading() -> str:
    return (
        "# Combinations\n\n"
        "Written by `python -m tuneloom.train.rules` from the rules in train/rules.py that refuse "
        "a config; do not edit.\nA cell is ok, or the number of the rule below that refuses it "
        "(exit 2, before anything starts).\n"
    )


def _counts() -> str:
    """Every combination of every axis, asked one by one."""
    every = [_merged(choice) for choice in itertools.product(*AXES.values())]
    refused = sum(verdict(settings) is not None for settings in every)
    names, run = " x ".join(AXES), len(every) - refused
    return f"{names}: {len(every):,} combinations, {run:,} run, {refused:,} refused.\n"


def _main_table() -> str:
    """Method, ZeRO and offload down; optimizer across: the axes that rules couple."""
    optimizers = [choice["optim.name"] for choice in AXES["optimizer"]]
    lines = [
        "| method | ZeRO | offload | " + " | ".join(optimizers) + " |",
        "|---|---|---|" + "---|" * len(optimizers),
    ]
    for method, stage in itertools.product(AXES["method"], AXES["ZeRO"]):
        for offload, label in zip(AXES["offload"], OFFLOADS, strict=True):
            cells = [_cell(method | stage | offload | o) for o in AXES["optimizer"]]
            names = f"| {method['method.kind']} | {stage['zero.stage']} | {label} | "
            lines.append(names + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _attention_table() -> str:
    """Precision and packing down, attention across; the same for every row above."""
    names = [choice["model.attention"] for choice in AXES["attention"]]
    lines = [
        "| precision | packing | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for precision, packing in itertools.product(AXES["precision"], AXES["packing"]):
        cells = [_cell(precision | packing | a) for a in AXES["attention"]]
        packed = "on" if packing["batch.packing"] else "off"
        lines.append(f"| {precision['model.dtype']} | {packed} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _rule_list() -> str:
    lines = ["## Rules\n"]
    lines += [f"{n}. `{'`, `'.join(rule.keys)}`: {rule.reason}." for n, rule in enumerate(RULES, 1)]
    lines.append("\nValues that nobody would read are refused, too (exit 2), where they are not "
                 "the default:\n")  # fmt: skip
    lines += [f"- `{rule.keys[0]}`: {rule.reason}." for rule in UNREAD]
    lines.append(
        "\nWhat depends on the machine is no rule but asked there: fp16 and flash or varlen "
        "attention need a GPU,\nflash its package, varlen torch 2.12, NVMe DeepSpeed's async_io op "
        "(libaio), and `tuneloom plan` says what fits in memory."
    )
    return "\n".join(lines) + "\n"


def _cell(settings: dict[str, Any]) -> str:
    number = verdict(settings)
    return "ok" if number is None else str(number)


def _merged(choice: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    return {key: value for part in choice for key, value in part.items()}


def main() -> None:
    """Write docs/combinations.md in the repository that this file lies in."""
    name = "python -m tuneloom.train.rules"
    argparse.ArgumentParser(prog=name, description=main.__doc__).parse_args()
    path = Path(__file__).resolve().parents[1] / TABLE
    path.parent.mkdir(exist_ok=True)
    path.write_text(markdown(), encoding="utf-8")
    print(f"{path}: {len(RULES)} rules")


if __name__ == "__main__":
    main()
