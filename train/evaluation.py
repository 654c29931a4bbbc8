"""Validation loss and samples during training, on the live, possibly sharded, model."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tuneloom.data.packing import pack, split
from tuneloom.data.rows import manifest_of, open_rows
from tuneloom.errors import ConfigError, DataError
from tuneloom.train import distributed, samples
from tuneloom.train.batches import collate
from tuneloom.train.config import TrainConfig
from tuneloom.train.distributed import World
from tuneloom.train.feed import make_store, renderer
from tuneloom.train.loss import loss_sum


class Validation:
    """The first `train.validation_rows` rows of the validation split, tokenised once."""

    def __init__(self, config: TrainConfig, tokenizer: Any, world: World) -> None:
        self.config, self.world, self.tokenizer = config, world, tokenizer
        self.rows: Any = self._open()
        if not self.rows:
            return
        self.renderer = renderer(config, tokenizer)
        count = min(len(self.rows), config.train.validation_rows)
        self.order = np.arange(count)
        self.store = make_store(config, self.rows, self.renderer, self.order, world)

    def _open(self) -> Any:
        data = self.config.data
        if data.validation is None:
            return None
        path, dataset = Path(data.validation), Path(data.path)
        is_split = dataset.is_dir() and data.validation in manifest_of(dataset)["splits"]
        if not is_split and (path.suffix == ".jsonl" or path.is_dir()):
            return open_rows(path, "train", data.format)
        default = type(data).model_fields["validation"].default
        empty = is_split and data.validation == default and not _rows_in(dataset, default)
        if dataset.is_dir() and not empty:  # where it has no such split, this says which it has
            return open_rows(dataset, data.validation, data.format, verify=self.world.first)
        if data.validation != default:
            raise ConfigError(
                f"data.validation: expected a .jsonl file or a dataset's folder, as {data.path} is "
                f"a file without splits, got {data.validation}; name one, or set "
                "data.validation=null"
            )
        if self.config.train.validate_every or self.config.train.sample_every:
            raise ConfigError(
                f"data.validation: {data.path} has no rows in such a split, so there is nothing "
                "to validate on or to answer; set data.validation=FILE.jsonl, or "
                "train.validate_every=0 and train.sample_every=0"
            )
        if self.world.first:
            print(
                f"validation: none, since {data.path} has no rows in such a split; "
                "set data.validation=FILE.jsonl, or null",
                flush=True,
            )
        return None

    def refuse(self) -> None:
        """Wait for all rows; raises DataError for one that cannot be rendered, too much lost, or no
        row left.
        """
        if self.rows and not self.store.lengths(self.order).any():
            raise DataError(
                f"data.validation: all of the first {len(self.order):,} rows "
                f"(train.validation_rows) are longer than batch.max_length="
                f"{self.config.batch.max_length} and dropped; raise it, set "
                "batch.over_length=truncate, or data.validation=null"
            )

    @torch.no_grad()
    def loss(self, engine: Any) -> float:
        """-log p per target token over all validation rows; the same on all ranks; collective."""
        lengths = self.store.lengths(self.order)
        kept = self.order[lengths > 0]
        bins = [kept[members] for members in self._bins(lengths[lengths > 0])]
        world, packing = self.world, self.config.batch.packing
        bins += [np.empty(0, np.int64)] * (-len(bins) % world.data_size)
        engine.eval()
        totals = torch.zeros(2, dtype=torch.float64)
        for rows in bins[world.data_rank :: world.data_size]:
            examples = [self.store.example(int(r)) for r in rows]
            micro = collate(list(rows), examples, packing=packing, multiple=world.sequence)
            part = micro.shard(world.sequence_rank, world.sequence).to(world.device)
            totals[0] += float(loss_sum(engine, part))
            totals[1] += micro.target_tokens
        engine.train()
        distributed.sum_over_ranks(totals)
        return float(totals[0] / (totals[1] / world.sequence))

    def _bins(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Rows of each micro-batch, laid out as in training: packs, or rows of like lengths."""
        batch = self.config.batch
        if batch.packing:
            return pack(lengths, batch.tokens)
        return split([np.argsort(lengths, kind="stable")], batch.sequences) if len(lengths) else []

    def sample(self, engine: Any, path: Path, step: int) -> None:
        """Answer the first prompts on every rank alike; rank 0 writes them."""
        if self.config.objective.kind == "pretrain":
            return
        kept = self.order[self.store.lengths(self.order) > 0]
        records = [self.rows[int(i)] for i in kept[: self.config.train.samples]]
        prompts = [self.renderer.prompt_ids(record) for record in records]
        if not prompts:
            return
        stops = self._stops()
        answers = samples.answer(
            engine.module, prompts, stops=stops, max_tokens=self.config.train.sample_tokens,
            device=self.world.device,
        )  # fmt: skip
        rows = [
            {
                "prompt": self.tokenizer.decode(prompt),
                "answer": self.tokenizer.decode(answer, skip_special_tokens=True),
                "expected": self.renderer.expected(record),
            }
            for prompt, answer, record in zip(prompts, answers, records, strict=True)
        ]
        distributed.on_first(lambda: samples.append(path, step, rows), where=path)

    def _stops(self) -> set[int]:
        """The end-of-sequence token and the one that the chat template ends a turn with."""
        stops = {self.tokenizer.eos_token_id}
        if self.tokenizer.chat_template and self.renderer.template.end_of_turn:
            stops.add(self.tokenizer.convert_tokens_to_ids(self.renderer.template.end_of_turn))
        return {int(token) for token in stops if token is not None}

    def close(self) -> None:
        if self.rows:
            self.store.close()


def _rows_in(dataset: Path, split: str) -> int:
    shards = manifest_of(dataset)["splits"][split]["shards"]
    return sum(int(shard["rows"]) for shard in shards)
