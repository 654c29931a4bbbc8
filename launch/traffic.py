"""Bytes that one rank sends in an optimizer step: what DeepSpeed 0.19.8 does under train/zero.py.

Counted as rings send: an all-reduce of b bytes over n ranks 2 b (n - 1) / n, an all-gather, a
reduce-scatter or a reduce half of that. tests/launch/test_traffic.py counts the collectives of real
steps. Not counted: norms and overflow flags (18 bytes), and Muon's own exchanges, which are more
than all of this under ZeRO-3.
"""

import math
from dataclasses import dataclass

from tuneloom.launch.anatomy import Anatomy
from tuneloom.launch.memory import BYTES, MAX_LIVE
from tuneloom.train.config import ModelConfig, TrainConfig


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step."""

    this: int
    replicated: int
    """The same step with the weights on every rank (ZeRO-2)."""


def traffic(config: TrainConfig, anatomy: Anatomy, *, ranks: int) -> Traffic:
    """Of `config` on `ranks` ranks, and beside it ZeRO-2.

    8B on 8 ranks, one micro-batch: LoRA 0.22 GB under ZeRO-2, 26.6 under ZeRO-3; full 42.2, 40.4.
    """
    if ranks == 1:
        return Traffic(0, 0)
    frozen = config.method.kind != "full"
    multiplied = anatomy.linear + anatomy.experts
    again = multiplied * recomputed_share(config.model) if frozen else 0.0
    shared = exchange_bytes(config, anatomy)

    def sent(stage: int) -> int:
        elements = zero_elements(
            stage, parameters=anatomy.base + (anatomy.trainable if frozen else 0),
            trained=anatomy.trainable, accumulation=config.batch.accumulation, again=again,
        )  # fmt: skip
        return round(BYTES[config.model.dtype] * elements * (ranks - 1) / ranks) + shared

    return Traffic(sent(config.zero.stage), sent(2))


def zero_elements(
    stage: int,
    *,
    parameters: int,
    trained: int,
    accumulation: int,
    again: float = 0.0,
    live: int = MAX_LIVE,
) -> float:
    """Elements that a rank of many sends in a step; `parameters` are all, trained and frozen.

    Gradients are all-reduced and each rank keeps its part (use_multi_rank_bucket_allreduce): once a
    step under ZeRO 0 and 1, every micro-batch under ZeRO-2. ZeRO 1 and 2 then gather the weights.
    ZeRO-3 scatters gradients every micro-batch and gathers weights for forward and for backward,
    but for `live` ones that stay; recomputation gathers frozen ones (`again`) once more.
    """
    if stage == 3:
        gathered = 2 * parameters - min(parameters, live) + again
        return accumulation * (gathered + trained)
    reduced = 2 * trained * (accumulation if stage == 2 else 1)
    return reduced + (trained if stage else 0)


def recomputed_share(model: ModelConfig) -> float:
    """Of the layers, those that recompute."""
    return {"off": 0.0, "on": 1.0, "selective": 1 / model.checkpoint_every_layers}[
        model.checkpointing
    ]


def exchange_bytes(config: TrainConfig, anatomy: Anatomy) -> int:
    """All-to-alls of a step under batch.sequence_parallel=S: q, k, v and the output of each layer,
    (S - 1) / S of them, forward and backward, and forward again where layers are recomputed.
    """
    batch, size = config.batch, config.batch.sequence_parallel
    kv_heads = math.lcm(anatomy.kv_heads, size)
    numbers = 2 * (anatomy.heads + kv_heads) * anatomy.head_width * batch.rank_tokens
    passes = 2 + recomputed_share(config.model)
    once = BYTES[config.model.dtype] * numbers * anatomy.layers * (size - 1) // size
    return round(once * passes) * batch.accumulation
