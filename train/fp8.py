"""FP8 (kernels/fp8.py), let in by the loss of one batch, before and after: a frozen base is held in
it, and where all weights are trained, their products are in it.

The batch is the run's first, on all ranks; adapters are not there yet, and would add nothing (B is
0). What was compared stands in effects.json.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tuneloom.errors import ConfigError, RefusedError
from tuneloom.kernels import fp8
from tuneloom.train import distributed
from tuneloom.train.batches import MicroBatch
from tuneloom.train.config import TrainConfig
from tuneloom.train.distributed import World
from tuneloom.train.loss import loss_sum
from tuneloom.train.model import moe_blocks

LOSS_GAP = 0.01
"""Largest |difference| of the first batch's loss, as a share of the loss in bf16."""


@dataclass(frozen=True)
class Held:
    """What FP8 holds, and what it did to the loss a target token of the first batch."""

    linears: int
    bytes: int
    """Numbers and scales of this rank; bf16 would take `bytes_in_bf16`."""
    bytes_in_bf16: int
    loss: float
    loss_in_fp8: float
    gap: float
    gap_allowed: float = LOSS_GAP


def hold(
    network: nn.Module, config: TrainConfig, micros: list[MicroBatch], world: World
) -> Held | None:
    """Hold the linears of `network` in FP8; None where `model.fp8` is off. Collective.

    Raises ConfigError for a model that cannot be held, RefusedError for a GPU without FP8 and when
    the loss moves by more than LOSS_GAP.
    """
    if not config.model.fp8:
        return None
    refuse_device(world.device)
    before = _loss(network, micros, world)
    trained = config.method.kind == "full"
    linears = hold_linears(network, config.method.extra_modules, trained=trained)
    after = _loss(network, micros, world)
    gap = abs(after - before) / before
    if not gap <= LOSS_GAP:  # a NaN is refused, too
        raise RefusedError(
            f"model.fp8: the first batch's loss is {before:.4f} in bf16 and {after:.4f} in FP8, "
            f"{gap:.2%} apart where {LOSS_GAP:.0%} is allowed; set model.fp8=false"
        )
    weights = [linear.weight for linear in linears]
    in_bf16 = sum(2 * w.numel() for w in weights)
    held = in_bf16 if trained else sum(w.numel() + 4 * w.shape[0] for w in weights)
    return Held(len(weights), held, in_bf16, before, after, gap)


def hold_linears(
    network: nn.Module, extra_modules: list[str], *, trained: bool = False
) -> list[nn.Linear]:
    """The linears that are now in FP8: all but the head and an adapter's modules that are trained
    whole. `trained`: their weights are bf16 still.
    """
    experts = moe_blocks(network)
    if experts:
        raise ConfigError(
            f"model.fp8: {experts[0].__name__} routes tokens to experts, whose weights are no "
            "linears and whose router must not be rounded; set model.fp8=false"
        )
    keep = {name.rsplit(".", 1)[-1] for name in extra_modules}
    try:
        names = fp8.hold_linears(network, keep=keep, trained=trained)
    except ValueError as error:
        raise ConfigError(f"model.fp8: {error}; set model.fp8=false") from None
    return [network.get_submodule(name) for name in names]  # type: ignore[misc]


def refuse_device(device: torch.device) -> None:
    """RefusedError for a GPU older than Ada and Hopper; a CPU emulates the product."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < fp8.CAPABILITY:
        raise RefusedError(
            f"model.fp8: {torch.cuda.get_device_name(device)} has no FP8 products, which came with "
            "Ada and Hopper (8.9); set model.fp8=false"
        )


@torch.no_grad()
def _loss(network: Any, micros: list[MicroBatch], world: World) -> float:
    """Loss a target token over all ranks' micro-batches."""
    total = torch.zeros(2, dtype=torch.float64)
    for micro in micros:
        part = micro.shard(world.sequence_rank, world.sequence)
        targets = micro.target_tokens / world.sequence
        total += torch.tensor([float(loss_sum(network, part)), targets], dtype=torch.float64)
    distributed.sum_over_ranks(total)
    return float(total[0] / total[1])
