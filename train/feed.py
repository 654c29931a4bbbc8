"""The data of a run on one rank: tokens, plan, this rank's micro-batches, and the record of who saw what."""

from pathlib import Path
from typing import Any

import numpy as np

from tuneloom.data.ledger import Ledger
from tuneloom.data.packing import pack
from tuneloom.data.plan import Plan
from tuneloom.data.render import Renderer
from tuneloom.data.rows import Rows, open_rows
from tuneloom.data.tokens import TokenStore
from tuneloom.errors import DataError
from tuneloom.train.batches import MicroBatch, collate
from tuneloom.train.config import TrainConfig
from tuneloom.train.distributed import World
from tuneloom.train.exposure import Exposure


class Feed:
    """Training rows as the steps' micro-batches; `state` and `restore` make a resume exact."""

    def __init__(self, config: TrainConfig, tokenizer: Any, world: World, accumulation: int) -> None:
        self.config, self.world, self.accumulation = config, world, accumulation
        batch = config.batch
        self.rows: Rows = open_rows(
            config.data.path, config.data.split, config.data.format, verify=world.first
        )
        self.renderer = renderer(config, tokenizer)
        self.store = store(config, self.rows, self.renderer, world)
        self.plan = Plan(
            len(self.rows),
            self.store.lengths,
            epochs=config.epochs,
            seed=config.seed,
            shuffle=batch.shuffle,
            packing=batch.packing,
            tokens=batch.tokens,
            sequences=batch.sequences,
            window=batch.window,
            micro_batches=world.size * accumulation,
        )
        self.ledger = Ledger()

    def next_step(self) -> list[np.ndarray] | None:
        """Row indices of every micro-batch of the step, all ranks'; None when the epochs are over."""
        return self.plan.next_step()

    def mine(self, bins: list[np.ndarray]) -> list[MicroBatch]:
        """This rank's micro-batches, moved to its device."""
        own = bins[self.world.rank :: self.world.size] if self.config.batch.packing else _dealt(
            bins, self.world, self.accumulation
        )  # fmt: skip
        return [self.collated(rows) for rows in own]

    def collated(self, rows: np.ndarray) -> MicroBatch:
        examples = [self.store.example(int(row)) for row in rows]
        return collate(list(rows), examples, packing=self.config.batch.packing).to(self.world.device)


def _dealt(bins: list[np.ndarray], world: World, accumulation: int) -> list[np.ndarray]:
    return bins[world.rank :: world.size]


def renderer(config: TrainConfig, tokenizer: Any) -> Renderer:
    """The one renderer of training, validation and samples."""
    return Renderer(
        tokenizer,
        config.objective.kind,
        max_length=config.batch.max_length,
        over_length=config.batch.over_length,
    )


def store(config: TrainConfig, rows: Rows, render: Renderer, world: World) -> TokenStore:
    """Tokens of `rows`, tokenised once by rank 0 into a cache beside the runs."""
    raise DataError("not wired")


__all__ = ["Exposure", "Feed", "Path", "pack"]
