"""The order of training: which rows make each micro-batch, whatever the number of ranks.

Epochs are permutations drawn from (seed, epoch) and laid end to end. Packed, that stream is cut
into windows; each is packed with the rows that the window before could not place well, and its
bins are shuffled. Step s takes bins [s * G, (s + 1) * G) with G = world * accumulation. Not
packed, step s takes the next G * sequences rows. Either way the rows of a step depend on G alone,
so 1 x 8 equals 2 x 4, and a small JSON state continues the stream exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tuneloom.data import windows
from tuneloom.data.balance import arrange, costs_of, dearest
from tuneloom.data.packing import pack, split
from tuneloom.errors import DataError

FULL = 0.98
"""Bins at least this full are sent; emptier ones wait for the next window, once."""
CARRIED = 8
"""At most 1/8 of a window waits, so a window always makes progress."""

Lengths = Callable[[np.ndarray], np.ndarray]
"""Row indices -> tokens of each (0: dropped); blocks until they are tokenised."""
EMPTY = np.empty(0, np.int64)
FIXED = ("rows", "seed", "shuffle", "packing", "tokens", "documents", "window", "balance")
"""Keys of a state that must be those of the run it is restored in."""
VERSION = 3
"""Of the order that a state continues; raise it whenever the same config would give another."""


@dataclass(frozen=True)
class PlanConfig:
    """What decides the order; `group` is G, micro-batches of one step over all ranks."""

    seed: int
    epochs: float | None
    shuffle: bool
    packing: bool
    tokens: int
    sequences: int
    window: int | None
    """Rows packed together; None: chosen and growing, see `windows`."""
    balance: bool
    """Whether packs of like cost may share a step; false: always in random order."""
    group: int
    documents: int | None = None
    """Most rows of a pack; None: as many as fit."""


def epoch_order(rows: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """The permutation of one epoch: (rows,) int64."""
    if not shuffle:
        return np.arange(rows)
    return _generator(seed, epoch, 0).permutation(rows)


def share(bins: list[np.ndarray], rank: int, world: int) -> list[np.ndarray]:
    """Micro-batches of one rank, in order of accumulation: bin a * world + rank."""
    return bins[rank::world]


class Plan:
    """Iterates over steps; `lengths` may block, the rest is arithmetic, the same on all ranks."""

    def __init__(self, rows: int, lengths: Lengths, config: PlanConfig) -> None:
        assert rows > 0, rows
        self.rows, self.config = rows, config
        self.total = None if config.epochs is None else max(1, round(config.epochs * rows))
        self._lengths = lengths
        self._order: tuple[int, np.ndarray] = (-1, EMPTY)
        self._window = 0  # windows before the current one
        self._start, self._stop = 0, 0  # its place in the stream
        self._width: int | None = None  # rows of the next window, where they are chosen and known
        self._waiting = EMPTY  # rows carried into the current window
        self._group, self._phase = config.group, 0  # what the current window is arranged for
        self._bins: list[np.ndarray] | None = None
        self._last = False  # the current window is the run's last
        self._carried = EMPTY  # rows the current window hands on
        self._dropped = EMPTY
        self._next = 0  # packed: next bin of the window; not packed: next row of the stream
        self.dropped = EMPTY
        """Rows of length 0 that the last `next_step` passed over, for the ledger; there may be some
        when it gives [], at the very end."""

    def next_step(self) -> list[np.ndarray]:
        """The step's G micro-batches of row indices, empty ones at the very end; [] after it."""
        passed: list[np.ndarray] = []
        bins = self._packed_step(passed) if self.config.packing else self._padded_step(passed)
        self.dropped = np.concatenate([EMPTY, *passed])
        if not bins:
            return []
        return bins + [EMPTY] * (self.config.group - len(bins))

    @property
    def consumed(self) -> int:
        """Rows of the stream that `next_step` has given, or has reported in `dropped`."""
        if not self.config.packing:
            return self._next
        start = self._start - len(self._waiting)
        if self._bins is None:
            return start
        sent = sum(len(members) for members in self._bins[: self._next])
        return start + sent + len(self._dropped)

    @property
    def progress(self) -> float:
        """Share of the run's rows, 0 to 1; 0 while `epochs` is None (the stream has no end)."""
        return self.consumed / self.total if self.total else 0.0

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.consumed / self.rows

    def state(self) -> dict[str, Any]:
        """Small JSON from which `restore` continues exactly."""
        config = self.config
        return {
            "version": VERSION,
            "rows": self.rows,
            "seed": config.seed,
            "shuffle": config.shuffle,
            "packing": config.packing,
            **(self._of_packs() if config.packing else {}),
            "index": self._window,
            "start": self._start,
            "stop": self._stop,
            "width": self._width,
            "waiting": self._waiting.tolist(),
            "group": self._group,
            "phase": self._phase,
            "opened": self._bins is not None,
            "last": self._last,
            "next": self._next,
        }

    def _of_packs(self) -> dict[str, Any]:
        config = self.config
        return {
            "tokens": config.tokens, "documents": config.documents, "window": config.window,
            "balance": config.balance,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`; raises what `refuse_other` does.

        The global batch and the number of epochs may differ: the window that was open is finished
        as it was begun, and what follows is new.
        """
        self.refuse_other(state)
        self._window, self._next = state["index"], state["next"]
        self._start, self._stop = state["start"], state["stop"]
        self._width = state["width"]
        self._waiting = np.asarray(state["waiting"], np.int64)
        self._group, self._phase = state["group"], state["phase"]
        self._bins = None
        if state["opened"]:
            self._open(last=state["last"])
            self._next = state["next"]

    def refuse_other(self, state: dict[str, Any]) -> None:
        """A DataError names what differs from the run that saved `state`."""
        if state.get("version", 1) != VERSION:
            raise DataError(
                f"resume: the checkpoint's order of rows is version {state.get('version', 1)}, "
                f"this is version {VERSION}; finish the run with the code that began it, or "
                "choose another run.id"
            )
        for key, mine in self.state().items():
            if key in FIXED and state.get(key) != mine:  # older states know no `documents`
                raise DataError(
                    f"resume: the checkpoint was made with {key}={state.get(key)}, this run has "
                    f"{mine}, and the order of rows would differ; set it back, or choose another "
                    "run.id and resume=never"
                )

    def _padded_step(self, passed: list[np.ndarray]) -> list[np.ndarray]:
        """The next G * sequences rows that are not dropped, `sequences` to a micro-batch."""
        wanted = self.config.group * self.config.sequences
        rows, idle = EMPTY, 0
        while len(rows) < wanted:
            found = self._stream(self._next, self._within(self._next + wanted - len(rows)))
            if not len(found):
                break
            kept = self._lengths(found) > 0
            passed.append(found[~kept])
            rows = np.concatenate([rows, found[kept]])
            self._next += len(found)
            idle = 0 if kept.any() else idle + len(found)
            self._refuse_all_dropped(idle)
        return [
            rows[i : i + self.config.sequences] for i in range(0, len(rows), self.config.sequences)
        ]

    def _packed_step(self, passed: list[np.ndarray]) -> list[np.ndarray]:
        """The next G bins of the stream of windows."""
        bins: list[np.ndarray] = []
        idle = 0
        while len(bins) < self.config.group:
            if self._bins is None:
                if self.total is not None and self._start >= self.total:
                    break
                self._stop = self._within(self._start + self._rows_wanted())
                self._open(last=self.total is not None and self._stop >= self.total)
                passed.append(self._dropped)
            assert self._bins is not None
            taken = self._bins[self._next : self._next + self.config.group - len(bins)]
            bins += taken
            self._next += len(taken)
            idle = 0 if self._bins else idle + len(self._dropped)
            self._refuse_all_dropped(idle)
            if self._next == len(self._bins):
                # With a changed global batch, steps begin anew at the next window.
                phase = self._phase + self._next if self._group == self.config.group else len(bins)
                self._group, self._phase = self.config.group, phase % self.config.group
                self._window, self._waiting = self._window + 1, self._carried
                self._start = self._stop
                self._bins, self._next = None, 0
        return bins

    def _open(self, *, last: bool) -> None:
        """Pack the current window together with the rows that wait for it; the last keeps none."""
        self._last = last
        fresh = self._stream(self._start, self._stop)
        rows = np.concatenate([self._waiting, fresh])
        lengths = np.asarray(self._lengths(rows), np.int64)
        if self.config.window is None:
            self._width = windows.following(len(fresh), lengths, self._capacity)
        self._dropped = rows[lengths == 0]
        waited = (np.arange(len(rows)) < len(self._waiting))[lengths > 0]
        rows, lengths = rows[lengths > 0], lengths[lengths > 0]
        bins = split(pack(lengths, self.config.tokens), self.config.documents)
        free = np.array([not waited[members].any() for members in bins], bool) & (not last)
        sent = self._without_emptiest(bins, lengths, free, len(fresh))
        if not last and self._grows(len(fresh), lengths):
            free = np.ones(len(bins), bool)  # a longer window has more of their like
        sent = self._without_dearest(bins, lengths, free, sent)
        kept = np.setdiff1d(np.arange(len(bins)), sent)
        self._carried = np.concatenate([EMPTY, *(rows[bins[i]] for i in kept)])
        order = self._arrangement([bins[i] for i in sent], lengths)
        self._bins, self._next = [rows[bins[i]] for i in sent[order]], 0

    def _without_emptiest(
        self, bins: list[np.ndarray], lengths: np.ndarray, free: np.ndarray, fresh: int
    ) -> np.ndarray:
        """Bins to send, in order; the others are the emptiest of those free to wait."""
        fill = np.array([lengths[members].sum() for members in bins]) / self.config.tokens
        sent = np.ones(len(bins), bool)
        left = fresh // CARRIED
        for index in np.argsort(fill, kind="stable").tolist():
            if fill[index] >= FULL or len(bins[index]) > left:
                break
            if free[index]:
                sent[index] = False
                left -= len(bins[index])
        return np.flatnonzero(sent)

    def _without_dearest(
        self, bins: list[np.ndarray], lengths: np.ndarray, free: np.ndarray, sent: np.ndarray
    ) -> np.ndarray:
        """`sent` without those that the next window can put beside more of their like."""
        if not (self.config.shuffle and self.config.balance and len(sent)):
            return sent
        costs = costs_of([bins[i] for i in sent], lengths)
        generator = _generator(self.config.seed, self._window, 2)
        return np.delete(sent, dearest(costs, free[sent], self._group, self._phase, generator))

    def _grows(self, fresh: int, lengths: np.ndarray) -> bool:
        """Whether the window after this one of `fresh` rows is longer, by the micro-batches a step
        that this one was begun with.
        """
        capacity = self._group * self.config.tokens
        return self.config.window is None and windows.following(fresh, lengths, capacity) > fresh

    def _arrangement(self, sent: list[np.ndarray], lengths: np.ndarray) -> np.ndarray:
        """Order of a window's bins: random but for cost, or by their first row in the stream."""
        if not self.config.shuffle:
            return np.argsort([members[0] for members in sent], kind="stable")
        generator = _generator(self.config.seed, self._window, 1)
        if not (self.config.balance and sent):
            return generator.permutation(len(sent))
        return arrange(costs_of(sent, lengths), self._group, self._phase, generator)

    def _rows_wanted(self) -> int:
        """Rows of the window that opens next."""
        if self.config.window is not None:
            return windows.given(self.config.window, self._window)
        if self._width is not None:
            return self._width
        probed = self._stream(0, self._within(windows.PROBED))
        return windows.first(np.asarray(self._lengths(probed)), self._capacity)

    @property
    def _capacity(self) -> int:
        """Tokens of a step."""
        return self.config.group * self.config.tokens

    def _within(self, position: int) -> int:
        """A stream position, not beyond the end of the run."""
        return position if self.total is None else min(position, self.total)

    def _stream(self, start: int, stop: int) -> np.ndarray:
        """Rows at stream positions [start, stop), across epochs."""
        pieces = [EMPTY]
        while start < stop:
            epoch, offset = divmod(start, self.rows)
            taken = self._epoch(epoch)[offset : offset + stop - start]
            pieces.append(taken)
            start += len(taken)
        return np.concatenate(pieces)

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            config = self.config
            self._order = (epoch, epoch_order(self.rows, config.seed, epoch, config.shuffle))
        return self._order[1]

    def _refuse_all_dropped(self, idle: int) -> None:
        if idle >= self.rows:
            raise DataError(
                f"all {self.rows:,} rows are longer than batch.max_length and dropped; "
                f"raise batch.max_length"
            )


def _generator(seed: int, index: int, purpose: int) -> np.random.Generator:
    """PCG64 seeded from (seed, epoch or window, purpose): the same on every machine."""
    return np.random.Generator(np.random.PCG64([seed, index, purpose]))
