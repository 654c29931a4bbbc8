"""The data of a run on one rank: tokens, plan, this rank's micro-batches, and the account of who
saw what.
"""

from pathlib import Path
from typing import Any

import numpy as np

from tuneloom.data.ledger import Ledger
from tuneloom.data.plan import Plan, PlanConfig, epoch_order, share
from tuneloom.data.render import Renderer
from tuneloom.data.rows import Rows, open_rows
from tuneloom.data.tokens import TokenStore
from tuneloom.train.batches import Frame, MicroBatch, collate
from tuneloom.train.config import TrainConfig
from tuneloom.train.distributed import World, barrier
from tuneloom.train.exposure import Exposure

DENSEST = 32
"""Mean tokens of a document below which packs of one shape are split: attention launches blocks for
every place in cu_seqlens, used or not."""


def frame_of(config: TrainConfig) -> Frame | None:
    """The shape that packs are padded to, where layers are captured."""
    batch = config.batch
    if not config.model.cuda_graphs:
        return None
    documents = batch.documents or -(-batch.tokens // DENSEST)
    return Frame(batch.tokens, batch.max_length, documents)


class Feed:
    """Training rows as the steps' micro-batches; `state` and `restore` make a resume exact."""

    def __init__(
        self, config: TrainConfig, tokenizer: Any, world: World, accumulation: int
    ) -> None:
        self.config, self.world, self.accumulation = config, world, accumulation
        batch, data = config.batch, config.data
        self.frame = frame_of(config)
        self.rows: Rows = open_rows(data.path, data.split, data.format, verify=world.first)
        self.renderer = renderer(config, tokenizer)
        order = epoch_order(len(self.rows), config.seed, 0, batch.shuffle)
        self.store = make_store(config, self.rows, self.renderer, order, world)
        self.plan = Plan(len(self.rows), self.store.lengths, PlanConfig(
            seed=config.seed, epochs=config.epochs, shuffle=batch.shuffle, packing=batch.packing,
            tokens=batch.tokens, sequences=batch.sequences, window=batch.window,
            balance=batch.balance, group=world.data_size * accumulation,
            documents=self.frame.documents if self.frame else batch.documents,
        ))  # fmt: skip
        self.ledger = Ledger()

    def next_step(self) -> list[np.ndarray]:
        """Row indices of every micro-batch of the step, all ranks'; empty when the epochs are
        over.
        """
        bins = self.plan.next_step()
        if not bins:  # rows too long at the very end belong to no step
            self.ledger.count(self.plan.dropped, self.store)
        return bins

    def peek(self) -> list[MicroBatch]:
        """This rank's micro-batches of the run's first step, none of it consumed."""
        before = self.plan.state()
        micros = self.mine(self.plan.next_step())
        self.plan.restore(before)
        return micros

    def mine(self, bins: list[np.ndarray]) -> list[MicroBatch]:
        """This rank's micro-batches on its device, whole: the loop cuts them."""
        world = self.world
        return [self._collated(rows) for rows in share(bins, world.data_rank, world.data_size)]

    def _collated(self, rows: np.ndarray) -> MicroBatch:
        examples = [self.store.example(int(row)) for row in rows]
        micro = collate(
            list(rows), examples, packing=self.config.batch.packing, multiple=self.world.sequence,
            frame=self.frame,
        )  # fmt: skip
        return micro.to(self.world.device)

    def blank(self) -> MicroBatch:
        """A micro-batch without a row, in the shape that all have where layers are captured."""
        return self._collated(np.empty(0, np.int64))

    def account(self, bins: list[np.ndarray], step: int, padded: int, exposure: Exposure) -> None:
        """Book one step of all ranks on the ledger and the exposure record; rank 0 only."""
        self.store.hurry()
        rows = np.concatenate(bins)
        shares = np.arange(len(bins)) % self.world.data_size
        ranks = np.repeat(shares * self.world.sequence, [len(b) for b in bins])
        facts = self.store.facts(rows)
        ids = [self.store.record_id(row) for row in rows.tolist()]
        exposure.add(ids, step, ranks, facts.kept, facts.trained)
        self.ledger.count(rows, self.store, padded=padded)
        self.ledger.count(self.plan.dropped, self.store)

    def state(self) -> dict[str, Any]:
        return {"plan": self.plan.state(), "ledger": self.ledger.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.plan.restore(state["plan"])
        self.ledger.restore(state["ledger"])

    def close(self) -> None:
        self.store.close()


def renderer(config: TrainConfig, tokenizer: Any) -> Renderer:
    """The one renderer of training, validation and samples."""
    batch = config.batch
    return Renderer(
        tokenizer, config.objective.kind, max_length=batch.max_length, over_length=batch.over_length
    )


def make_store(
    config: TrainConfig, rows: Rows, render: Renderer, order: np.ndarray, world: World
) -> TokenStore:
    """Tokens of `rows`, made once by rank 0 in a cache that the runs under `run.root` share;
    collective.
    """

    def construct() -> TokenStore:
        return TokenStore(
            Path(config.run.root) / ".tokens", rows, render, order, writer=world.first, paced=True,
            max_lost_answer_tokens=config.batch.max_lost_answer_tokens,
        )  # fmt: skip

    if world.first:
        store = construct()
    barrier()
    return store if world.first else construct()
