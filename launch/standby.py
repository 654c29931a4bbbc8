"""A second gang that has imported everything and waits (`launch.standby`): after a lost worker the
run goes on at once, where new processes first start and import for some four seconds.

It stands in the slots of the gang that trains, asks Ray for no processor and no GPU, and holds
about 0.6 GiB of host memory a rank (not seen on a GPU yet), so it is left out where a host has
little to spare. It starts some time after the gang's first step, not to compete with that, nor in
runs that are over soon. Where one of it does not answer, because a whole host is gone, the next
gang is placed anew.
"""

import math
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuneloom.launch.config import LaunchConfig
from tuneloom.launch.elastic import ranks_a_bundle
from tuneloom.launch.worker import Worker, environment

ROOM = 2 * 2**30
"""Bytes that a host must have to spare for each rank on it; training may yet grow."""
ANSWER_SECONDS = 10.0
"""How long workers that wait may take to say that they live; they may still be importing."""


@dataclass
class Gang:
    """Actors in rank order, and the placement group that they stand in."""

    slots: Any
    size: LaunchConfig
    actors: list[Any] = field(default_factory=list)

    def start(self, environments: list[dict[str, str]], *, cpus: int, gpus: int) -> None:
        """Start an actor a rank; one that takes 0 stands in a slot beside the one it may follow."""
        import ray

        self.actors = [
            ray.remote(Worker).options(
                num_cpus=cpus, num_gpus=gpus, placement_group=self.slots,
                placement_group_bundle_index=rank // ranks_a_bundle(self.size), max_restarts=0,
            ).remote(environments[rank])
            for rank in range(self.size.workers)
        ]  # fmt: skip

    def end(self) -> None:
        """Kill its actors; the slots stay."""
        import ray

        for actor in self.actors:
            ray.kill(actor)
        self.actors = []

    def free(self) -> None:
        """Kill its actors and give the slots back."""
        from ray.util.placement_group import remove_placement_group

        self.end()
        remove_placement_group(self.slots)


class Standby:
    """At most one gang that waits to follow the one that trains."""

    def __init__(self, after_seconds: float) -> None:
        """`after_seconds`: from a gang's first step until the one that waits is started."""
        self._after = after_seconds
        self._gang: Gang | None = None
        self._environments: list[dict[str, str]] = []
        self._metrics, self._since, self._due = Path(), 0.0, math.inf
        self._room = 0
        self._importing: list[Any] = []

    def follow(self, gang: Gang, places: list[dict[str, Any]], metrics: Path) -> None:
        """Be ready to follow `gang`, whose ranks stand at `places`, from the next line in `metrics`
        on.
        """
        self._gang = Gang(gang.slots, gang.size)
        self._environments = [environment() | place["devices"] for place in places]
        self._room = ROOM * max(Counter(place["node"] for place in places).values())
        self._metrics, self._since, self._due = metrics, _changed(metrics), math.inf

    def look(self) -> None:
        """Called about once a second while a gang trains."""
        gang = self._gang
        if gang is None:
            return
        if self._due == math.inf and _changed(self._metrics) > self._since:
            self._due = time.monotonic() + self._after
        if not gang.actors and time.monotonic() >= self._due:
            gang.start(self._environments, cpus=0, gpus=0)
            self._importing = [actor.import_all.remote(self._room) for actor in gang.actors]
        if self._importing:
            self._ask(gang)

    def _ask(self, gang: Gang) -> None:
        """Who has imported, and where is no room for it?"""
        import ray
        from ray.exceptions import RayError

        done, self._importing = ray.wait(self._importing, num_returns=1, timeout=0)
        try:
            refused = [reason for reason in ray.get(done) if reason]
        except RayError as error:  # of one that waits, none of the run's own
            refused = [f"a worker was lost ({type(error).__name__})"]
        if refused:
            print(f"launch.standby: {refused[0]}; none waits, a restart starts anew", flush=True)
            gang.end()
            self._importing, self._due = [], math.inf
            self._since = math.inf
        elif not self._importing and done:
            print(f"launch.standby: {len(gang.actors)} workers wait beside the run", flush=True)

    def keeps(self, gang: Gang) -> bool:
        """True while the slots of `gang` are held for the next one."""
        return self._gang is not None and self._gang.slots is gang.slots

    def take(self) -> Gang | None:
        """The gang that waits, or None where there is none or one of it does not answer."""
        import ray
        from ray.exceptions import RayError

        gang, self._gang, self._importing = self._gang, None, []
        if gang is None:
            return None
        try:
            ray.get([actor.now.remote() for actor in gang.actors], timeout=ANSWER_SECONDS)
        except RayError:
            gang.end()
        if gang.actors:
            return gang
        gang.free()
        return None

    def abandon(self) -> None:
        """End what waits; its slots went with Ray's head."""
        if self._gang is not None:
            self._gang.end()
            self._gang = None

    def close(self) -> None:
        """End what waits."""
        if self._gang is not None:
            self._gang.free()
            self._gang = None


def _changed(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0
