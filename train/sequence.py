"""Sequence parallelism: S neighbouring ranks share every micro-batch, 1/S of its tokens each.

Around attention two all-to-alls give each rank all tokens of 1/S of the heads and take them back
(DeepSpeed-Ulysses, arXiv 2309.14509), so any backend, and the packs' cu_seqlens, work as they are.

DeepSpeed's `DistributedAttention` does the exchange; its `UlyssesSPAttentionHF` is not used: it
fixes the rows of a batch, gathers position ids in every layer, which cu_seqlens make needless, and
refuses 10 key/value heads over 4 ranks. DeepSpeed's engine is not told either: it averages
gradients over all ranks and the loop multiplies by all ranks, so a gradient is the sum of the
ranks' parts whether they are of other documents or of other tokens (0.19.8).
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tuneloom.errors import ConfigError
from tuneloom.train import distributed, pace
from tuneloom.train.distributed import World

SEEN: Counter[str] = Counter()
"""What the exchanges did since `SEEN.clear()`; effects.json is written from it."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Exchange:
    """Runs an attention on all tokens and this rank's heads; the same call on all S ranks."""

    def __init__(self, group: Any, size: int) -> None:
        from deepspeed.sequence.layer import DistributedAttention

        self.size = size
        self._distributed = DistributedAttention(_local, group, scatter_idx=2, gather_idx=1)

    def __call__(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query: (B, H, T / S, C); key, value: (B, K, T / S, C); returns (B, T / S, H, C).

        `attend` gets (B, H / S, T, C) and (B, K' / S, T, C), with K' = lcm(K, S): key/value heads
        are repeated only where S ranks cannot share them evenly.
        """
        heads = math.lcm(key.shape[1], self.size)
        if heads > key.shape[1]:
            times = heads // key.shape[1]
            key, value = (t.repeat_interleave(times, dim=1) for t in (key, value))
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))  # (B, T / S, heads, C)
        with pace.waiting():
            out: Tensor = self._distributed(q, k, v, batch_dim_idx=0, attend=attend)
        SEEN["all_to_alls"] += 4
        SEEN["bytes_sent"] += sum(_bytes(t) for t in (q, k, v, out)) * (self.size - 1) // self.size
        SEEN["tokens_held"] += q.shape[0] * q.shape[1]
        return out


def _local(query: Tensor, key: Tensor, value: Tensor, *, attend: Attend) -> Tensor:
    """Between the exchanges; (B, T, heads, C) in and out."""
    SEEN["tokens_attended"] += query.shape[0] * query.shape[1]
    with pace.working():
        return attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def exchange(world: World, text: Any, *, timeout_seconds: int) -> Exchange | None:
    """The exchange of this rank's S neighbours, None where S is 1; collective.

    `text`: the language model's config. Raises ConfigError when S ranks cannot share its heads.
    """
    if world.sequence == 1:
        return None
    refuse_heads(text.num_attention_heads, world.sequence)
    group = distributed.neighbours(world.sequence, timeout_seconds=timeout_seconds)
    return Exchange(group, world.sequence)


def refuse_heads(heads: int, sequence: int) -> None:
    """Raise ConfigError when `sequence` ranks cannot share the heads evenly."""
    if heads % sequence:
        raise ConfigError(
            f"batch.sequence_parallel: {sequence} ranks cannot share the model's {heads} attention "
            f"heads evenly; use a divisor of {heads}"
        )
