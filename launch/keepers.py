"""What a run keeps in memory of a cluster's nodes (`checkpoint.memory_every`) goes with its driver.

One actor a node, which Ray ends with the driver however that ended; a reaper of its own then gives
the memory back, while the actors of ranks come and go.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tuneloom.launch.reaper import after_us
from tuneloom.train import shm


class Keeper:
    """Stands on a node for as long as the driver lives."""

    def __init__(self, run: Path) -> None:
        self.run = run
        after_us(run)

    def keep(self) -> None:
        """For the same command: nobody gives the memory back."""
        shm.keep_run(self.run)

    def forget(self) -> None:
        """Give back what ranks that did not end by themselves left here."""
        shm.forget_when_ended(self.run)


class Keepers:
    """Those of a run."""

    def __init__(self, run: Path) -> None:
        self._run = run.resolve()
        self._actors: dict[str, Any] = {}

    def stand_on(self, nodes: Iterable[str]) -> None:
        """Start one on each of these nodes that has none."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        for node in set(nodes) - self._actors.keys():
            self._actors[node] = ray.remote(Keeper).options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote(self._run)  # fmt: skip

    def keep(self) -> None:
        """Have the memory kept on all of them, as the end may be known to one rank alone."""
        self._wait([actor.keep.remote() for actor in self._actors.values()])

    def forget(self) -> None:
        """Have the memory given back now; a node that is gone took its own along."""
        self._wait([actor.forget.remote() for actor in self._actors.values()])

    def _wait(self, asked: list[Any]) -> None:
        import ray

        ray.wait(asked, num_returns=len(asked), timeout=2 * shm.ENDING_SECONDS)
