"""Combinations that cannot run, as data: each rule names its keys, when it holds, and the way out.

`python -m tuneloom.train.rules` writes docs/combinations.md from these very rules.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuneloom.train.config import TrainConfig


@dataclass(frozen=True)
class Rule:
    """`broken(config)` is True when the combination cannot run."""

    keys: tuple[str, ...]
    broken: Callable[["TrainConfig"], bool]
    reason: str
    """Why, and what to do instead; follows `keys: ` in the message."""


RULES: tuple[Rule, ...] = (
    Rule(
        ("method.kind", "zero.stage"),
        lambda c: c.method.kind == "qlora" and c.zero.stage == 3,
        "NF4 weights cannot be partitioned by ZeRO-3; set zero.stage=2 (the base is replicated)",
    ),
    Rule(
        ("zero.offload", "zero.stage"),
        lambda c: c.zero.offload != "none" and c.zero.stage == 0,
        "optimizer offload needs ZeRO; set zero.stage=1, 2 or 3",
    ),
    Rule(
        ("zero.offload", "zero.stage"),
        lambda c: c.zero.offload == "nvme" and c.zero.stage != 3,
        "NVMe offload needs ZeRO-3; set zero.stage=3 or zero.offload=cpu",
    ),
    Rule(
        ("zero.offload_parameters", "zero.stage"),
        lambda c: c.zero.offload_parameters != "none" and c.zero.stage != 3,
        "parameter offload needs ZeRO-3; set zero.stage=3",
    ),
    Rule(
        ("zero.nvme_path", "zero.offload"),
        lambda c: "nvme" in (c.zero.offload, c.zero.offload_parameters) and not c.zero.nvme_path,
        "NVMe offload needs a folder on the drive; set zero.nvme_path=/mnt/nvme",
    ),
    Rule(
        ("optim.name", "zero.offload"),
        lambda c: c.optim.name != "adamw" and c.zero.offload != "none",
        "only adamw has a CPU implementation for offload; set optim.name=adamw",
    ),
    Rule(
        ("objective.kind", "method.kind"),
        lambda c: c.model.init == "random" and c.method.kind != "full",
        "an adapter on random weights trains nothing of use; set method=full",
    ),
    Rule(
        ("method.dora", "method.kind"),
        lambda c: c.method.kind == "full" and (c.method.dora or c.method.rslora),
        "DoRA and rsLoRA are kinds of LoRA; set method=lora",
    ),
)


def violations(config: "TrainConfig") -> Iterator[str]:
    """A sentence for each rule that this config breaks."""
    for rule in RULES:
        if rule.broken(config):
            yield f"{', '.join(rule.keys)}: {rule.reason}"
