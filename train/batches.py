"""Micro-batches of one rank: the plan's bins turned into tensors, packed or padded, with what they
hold.

Labels are already shifted: labels[b, t] is the token that follows input_ids[b, t], or -100. An
empty bin
(the run's last step may not fill every rank) becomes one token without a label, so that every rank
still takes part in every collective.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tuneloom.kernels import attention

IGNORED = -100
Example = tuple[np.ndarray, np.ndarray]
"""(ids (L,) int32, target (L,) bool) as rendered: target[i] says that token i is predicted with
loss.
"""


@dataclass(frozen=True)
class Frame:
    """The one shape of all packs of a run, which a captured layer asks for."""

    tokens: int
    max_length: int
    documents: int
    """Most rows of a pack."""

    @property
    def places(self) -> int:
        """Documents that cu_seqlens names: the rows, and padding in pieces of `max_length`."""
        return self.documents + -(-self.tokens // self.max_length)


@dataclass(frozen=True)
class MicroBatch:
    """B rows of S positions: B = 1 when packed, S = the longest row when padded."""

    input_ids: Tensor  # (B, S) int64
    labels: Tensor  # (B, S) int64, IGNORED where there is no loss
    position_ids: Tensor  # (B, S) int64, from 0 in each document
    cu_seqlens: Tensor | None  # (N + 1,) int32 offsets of the packed documents
    max_length: int
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    targets: tuple[int, ...]
    kept: Tensor | None = None  # (targets,) int64, positions of a pack with a label, or one without
    sharded: bool = False
    """Its tensors are one rank's part of the positions; all else is of the whole."""

    @property
    def tokens(self) -> int:
        """Real tokens, padding not counted."""
        return sum(self.lengths)

    @property
    def target_tokens(self) -> int:
        return sum(self.targets)

    @property
    def square_tokens(self) -> int:
        return sum(n * n for n in self.lengths)

    @property
    def padded(self) -> int:
        return self.input_ids.numel() - self.tokens

    def to(self, device: torch.device) -> "MicroBatch":
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            name: value.pin_memory().to(device, non_blocking=True)
            if isinstance(value, Tensor)
            else value
            for name, value in vars(self).items()
        }
        if self.cu_seqlens is not None:
            attention.HOSTS[moved["cu_seqlens"]] = self.cu_seqlens
        return MicroBatch(**moved)

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of a transformers causal LM's forward."""
        inputs: dict[str, Any] = {
            "input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False,
        }  # fmt: skip
        if self.cu_seqlens is not None:
            inputs |= {
                "cu_seq_lens_q": self.cu_seqlens, "cu_seq_lens_k": self.cu_seqlens,
                "max_length_q": self.max_length, "max_length_k": self.max_length,
            }  # fmt: skip
        if self.sharded:
            inputs[attention.SHARDED] = True
        return inputs

    def shard(self, index: int, count: int) -> "MicroBatch":
        """Part `index` of `count`: S / count neighbouring positions of every row."""
        if count == 1:
            return self
        width = self.input_ids.shape[1] // count
        assert width * count == self.input_ids.shape[1], (self.input_ids.shape, count)
        part = slice(index * width, (index + 1) * width)
        return replace(
            self, input_ids=self.input_ids[:, part], labels=self.labels[:, part],
            position_ids=self.position_ids[:, part], kept=None, sharded=True,
        )  # fmt: skip


def collate(
    rows: Sequence[int], examples: Sequence[Example], *, packing: bool, multiple: int = 1,
    frame: Frame | None = None,
) -> MicroBatch:  # fmt: skip
    """One micro-batch of these rows; `packing` chooses the layout, `multiple` divides S.

    What a pack lacks to it, or to `frame`, is padded as documents that no other sees.
    """
    lengths = tuple(len(ids) for ids, _ in examples)
    targets = tuple(int(target[1:].sum()) for _, target in examples)
    if frame is not None:
        return _framed(tuple(int(r) for r in rows), examples, lengths, targets, frame)
    if not examples:
        blank = torch.zeros(1, multiple, dtype=torch.int64)
        cu_seqlens = torch.tensor([0, multiple], dtype=torch.int32) if packing else None
        return MicroBatch(blank, blank + IGNORED, blank, cu_seqlens, multiple, (), (), ())
    layout = _pack if packing else _pad
    return layout(tuple(int(r) for r in rows), examples, lengths, targets, multiple)


def _shifted(ids: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(L,) int64 labels: at t the token at t + 1 if it is a target."""
    labels = np.full(len(ids), IGNORED, dtype=np.int64)
    labels[:-1] = np.where(target[1:], ids[1:], IGNORED)
    return labels


def _pack(
    rows: tuple[int, ...],
    examples: Sequence[Example],
    lengths: tuple[int, ...],
    targets: tuple[int, ...],
    multiple: int,
) -> MicroBatch:
    lacking = -sum(lengths) % multiple
    return _joined(rows, examples, lengths, targets, [lacking] if lacking else [])


def _framed(
    rows: tuple[int, ...],
    examples: Sequence[Example],
    lengths: tuple[int, ...],
    targets: tuple[int, ...],
    frame: Frame,
) -> MicroBatch:
    """A pack of the frame's shape: padding in pieces, then documents of no token."""
    lacking = frame.tokens - sum(lengths)
    assert lacking >= 0 and len(rows) <= frame.documents, (lengths, frame)
    whole, rest = divmod(lacking, frame.max_length)
    pieces = [frame.max_length] * whole + [rest] * bool(rest)
    micro = _joined(rows, examples, lengths, targets, pieces)
    assert micro.cu_seqlens is not None and micro.max_length <= frame.max_length, (lengths, frame)
    empty = frame.places + 1 - len(micro.cu_seqlens)
    offsets = torch.cat([micro.cu_seqlens, micro.cu_seqlens[-1:].expand(empty)])
    return replace(micro, cu_seqlens=offsets, max_length=frame.max_length)


def _joined(
    rows: tuple[int, ...],
    examples: Sequence[Example],
    lengths: tuple[int, ...],
    targets: tuple[int, ...],
    pieces: list[int],
) -> MicroBatch:
    """Documents one behind the other, then padding, each piece a document of its own."""
    padding = [np.zeros(length, np.int64) for length in pieces]
    spans = [*lengths, *pieces]
    offsets = np.concatenate([[0], np.cumsum(spans)]).astype(np.int32)
    ids = np.concatenate([*(ids for ids, _ in examples), *padding]).astype(np.int64)
    blank = [part + IGNORED for part in padding]
    labels = np.concatenate([*(_shifted(i, t) for i, t in examples), *blank])
    positions = np.arange(len(ids)) - np.repeat(offsets[:-1], spans)
    kept = np.flatnonzero(labels != IGNORED)
    return MicroBatch(
        input_ids=torch.from_numpy(ids)[None],
        labels=torch.from_numpy(labels)[None],
        position_ids=torch.from_numpy(positions.astype(np.int64))[None],
        cu_seqlens=torch.from_numpy(offsets),
        max_length=max(spans),
        rows=rows,
        lengths=lengths,
        targets=targets,
        kept=torch.from_numpy(kept if len(kept) else np.zeros(1, np.int64)),
    )


def _pad(
    rows: tuple[int, ...],
    examples: Sequence[Example],
    lengths: tuple[int, ...],
    targets: tuple[int, ...],
    multiple: int,
) -> MicroBatch:
    """Right padding: under causal attention no real token sees it, so no mask is needed."""
    longest = max(lengths)
    shape = (len(examples), longest + -longest % multiple)
    ids, labels = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    for row, (tokens, target) in enumerate(examples):
        ids[row, : len(tokens)] = tokens
        labels[row, : len(tokens)] = _shifted(tokens, target)
    return MicroBatch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.arange(shape[1]).expand(shape).contiguous(),
        cu_seqlens=None,
        max_length=shape[1],
        rows=rows,
        lengths=lengths,
        targets=targets,
    )
