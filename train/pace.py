"""Stragglers: which rank computes slower than the others, from what each measures about itself.

A step takes as long as its slowest rank, so wall time says only that one is slow. Each rank times
its own forward pass per token it computed, without what waits there for other ranks (`waiting`):
the shards of ZeRO-3, the exchanges of sequence parallelism. The times travel in the reduction that
every step does anyway.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import median

import torch

from tuneloom.train.distributed import World

WINDOW = 20
"""Steps whose median counts: a few slow steps are page faults or a neighbour's job, however slow;
twenty are a slow machine."""
SLOW = 1.5


class Pace:
    """Forward seconds a token of every rank, over the last steps."""

    def __init__(self, world: World, hosts: list[str]) -> None:
        self.world, self.hosts = world, hosts
        self.measured = world.size > 1
        self.slowest: float | None = None
        """Of the slowest rank, in medians of all; None until twenty steps were measured."""
        self._seconds, self._tokens = 0.0, 0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event, int]] = []
        self._steps: deque[list[float]] = deque(maxlen=WINDOW)
        self._named: set[int] = set()

    @contextmanager
    def timed(self, tokens: int) -> Iterator[None]:
        """Around the forward pass of one micro-batch of `tokens`, padding included; a step's first
        one counts, as a model has hundreds of waits.
        """
        global _timing
        if not self.measured or self._tokens:
            yield
            return
        self._tokens = tokens
        _timing = self  # recomputation in a backward pass is not timed, nor are its waits
        try:
            with self.counted(1):
                yield
        finally:
            _timing = None

    @contextmanager
    def counted(self, sign: int) -> Iterator[None]:
        """Add what passes within to this rank's seconds, or take it off; on a GPU, what passes on
        its current stream.
        """
        if self.world.device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            yield
            after.record()
            self._events.append((before, after, sign))
            return
        started = time.perf_counter()
        yield
        self._seconds += sign * (time.perf_counter() - started)

    def slots(self) -> list[float]:
        """Last step's seconds a token in this rank's place of one a rank, to be summed over ranks;
        the loop has read that step's loss, so no event is waited for.
        """
        own = [0.0] * self.world.size
        seconds = (
            self._seconds
            + sum(sign * before.elapsed_time(after) for before, after, sign in self._events) / 1000
        )
        if self._tokens:
            own[self.world.rank] = seconds / self._tokens
        self._seconds, self._tokens = 0.0, 0
        self._events.clear()
        return own

    def note(self, paces: list[float]) -> None:
        """All ranks' seconds a token of a step; names each slow rank once, on rank 0."""
        if not self.measured or not all(paces):
            return
        self._steps.append(paces)
        if len(self._steps) < WINDOW:
            return
        usual = [median(step[rank] for step in self._steps) for rank in range(len(paces))]
        middle = sorted(usual)[(len(usual) - 1) // 2]
        self.slowest = max(usual) / middle
        for rank, pace in enumerate(usual):
            if pace >= SLOW * middle and rank not in self._named:
                self._named.add(rank)
                self._say(rank, pace / middle)

    def _say(self, rank: int, ratio: float) -> None:
        if self.world.first:
            print(
                f"straggler: rank {rank} on {self.hosts[rank]} computes {ratio:.1f} x as long as "
                f"the median rank, over {WINDOW} steps; every step waits for it",
                flush=True,
            )


_timing: Pace | None = None
"""Whose forward pass is under way in this process."""


def waiting() -> AbstractContextManager[None]:
    """Around what waits for other ranks: in a timed forward pass it is not this rank's own time."""
    return _timing.counted(-1) if _timing else nullcontext()


def working() -> AbstractContextManager[None]:
    """Around this rank's own work within `waiting`."""
    return _timing.counted(1) if _timing else nullcontext()
