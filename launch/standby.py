"""A second gang that has imported everything and waits (`launch.standby`): after a lost worker the
run goes on at once, where new processes first start and import for some five seconds.

It stands in the slots of the gang that trains, asks Ray for no processor and no GPU, and holds
about 0.6 GiB of host memory a rank (not seen on a GPU yet). It starts after the gang's first step,
not to compete with that. Where one of it does not answer, because a whole host is gone, the next
gang is placed anew.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuneloom.launch.config import LaunchConfig
from tuneloom.launch.elastic import ranks_a_bundle
from tuneloom.launch.worker import Worker

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
                placement_group_bundle_index=rank // ranks_a_bundle(self.size),
                runtime_env={"env_vars": environments[rank]}, max_restarts=0,
            ).remote()
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

    def __init__(self) -> None:
        self._gang: Gang | None = None
        self._environments: list[dict[str, str]] = []
        self._metrics, self._since = Path(), 0.0
        self._importing: list[Any] = []

    def follow(self, gang: Gang, environments: list[dict[str, str]], metrics: Path) -> None:
        """Be ready to follow `gang` from the next line in `metrics` on."""
        self._gang = Gang(gang.slots, gang.size)
        self._environments = environments
        self._metrics, self._since = metrics, _changed(metrics)

    def look(self) -> None:
        """Called about once a second while a gang trains."""
        import ray
        from ray.exceptions import RayActorError

        gang = self._gang
        if gang is None:
            return
        if not gang.actors and _changed(self._metrics) > self._since:
            gang.start(self._environments, cpus=0, gpus=0)
            self._importing = [actor.import_all.remote() for actor in gang.actors]
        if self._importing:
            done, self._importing = ray.wait(self._importing, num_returns=1, timeout=0)
            try:
                ray.get(done)
            except RayActorError as error:  # none of the run's own: start them again
                print(f"launch.standby: a worker was lost ({type(error).__name__})", flush=True)
                gang.end()
                self._importing = []
                return
            if not self._importing:
                print(f"launch.standby: {len(gang.actors)} workers wait beside the run", flush=True)

    def keeps(self, gang: Gang) -> bool:
        """True while the slots of `gang` are held for the next one."""
        return self._gang is not None and self._gang.slots is gang.slots

    def take(self) -> Gang | None:
        """The gang that waits, or None where there is none or one of it does not answer."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        gang, self._gang, self._importing = self._gang, None, []
        if gang is None:
            return None
        try:
            ray.get([actor.now.remote() for actor in gang.actors], timeout=ANSWER_SECONDS)
        except (GetTimeoutError, RayActorError):
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
