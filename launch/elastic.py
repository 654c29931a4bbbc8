"""Fewer ranks when nodes are gone, all of them again when nodes return: `launch.min_workers`.

Only sizes that divide the micro-batches of a step are taken, so the global batch, and with it the
curve, stays what it was; the state goes through the universal checkpoint.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuneloom.errors import RefusedError, Stopped
from tuneloom.launch.admission import Admission, Probes
from tuneloom.launch.config import LaunchConfig
from tuneloom.launch.worker import losses
from tuneloom.train.config import TrainConfig
from tuneloom.train.runs import folder_of, recorded

QUIET_SECONDS = 3.0
"""A cluster with room gives it sooner; after that a person is told what is waited for."""
LOOK_SECONDS = 0.5
"""Between two looks at signals, of which Ray's own wait hears none."""
SMALLER_SECONDS = 10.0
"""How long a smaller size may take to be placed: what is free is placed in less than one."""


def bundles(launch: LaunchConfig, gpus: int) -> list[dict[str, float]]:
    """What the ranks need, as bundles that each stand on one node."""
    share = ranks_a_bundle(launch)
    bundle = {"CPU": float(share)} | ({"GPU": float(gpus * share)} if gpus else {})
    return [bundle] * (launch.workers // share)


def ranks_a_bundle(launch: LaunchConfig) -> int:
    """Ranks that must stand on one node together; 1 leaves the choice to Ray."""
    return launch.workers // launch.nodes if launch.nodes > 1 else 1


def micro_batches(config: TrainConfig, launch: LaunchConfig) -> int:
    """Micro-batches a step of the whole run: what its last attempt took, else what was asked."""
    attempts = recorded(folder_of(config)).get("attempts")
    if attempts:
        last = attempts[-1]
        shared = int(last.get("sequence_parallel", 1))  # runs older than the key shared none
        return int(last["workers"]) * int(last["accumulation"]) // shared
    return launch.workers * config.batch.accumulation // config.batch.sequence_parallel


def smaller(launch: LaunchConfig, group: int, sequence: int = 1) -> Iterator[LaunchConfig]:
    """The sizes below the full one, largest first, that share `group` micro-batches evenly, each
    micro-batch on `sequence` ranks.

    Nodes keep their number of ranks: with `launch.nodes` above 1 whole nodes are left out.
    """
    share = ranks_a_bundle(launch)
    for workers in range(
        launch.workers - share, (launch.min_workers or launch.workers) - 1, -share
    ):
        if workers > 0 and workers % sequence == 0 and group * sequence % workers == 0:
            nodes = workers // share if launch.nodes > 1 else 1
            yield launch.model_copy(update={"workers": workers, "nodes": nodes})


def place(
    launch: LaunchConfig, gpus: int, group: int, sequence: int, admission: Admission,
    signals: list[int],
) -> tuple[Any, LaunchConfig]:  # fmt: skip
    """Reserve a slot for every rank at once; returns the placement group and the size it holds.

    With `launch.nodes` above 1 each node takes an equal share, ranks in order; else nodes are
    filled one by one. Raises RefusedError when not even the smallest size finds room, Stopped once
    there is one in `signals`.
    """
    spread = "STRICT_SPREAD" if launch.nodes > 1 else "PACK"
    placed = _placed(launch, spread, gpus, launch.wait_seconds, admission, signals)
    if placed is not None:
        return placed, launch
    for size in smaller(launch, group, sequence):
        if size.nodes == 1 < launch.nodes:  # its ranks are bundles of one each
            spread = "STRICT_PACK"
        placed = _placed(size, spread, gpus, SMALLER_SECONDS, admission, signals)
        if placed is not None:
            print(
                f"launch.min_workers: no room for {launch.workers} workers in "
                f"{launch.wait_seconds:g} s; going on with {size.workers} x "
                f"{group * sequence // size.workers} micro-batches a step, the same global batch",
                flush=True,
            )
            return placed, size
    raise RefusedError(_no_room(launch, gpus, admission))


def _placed(
    launch: LaunchConfig, strategy: str, gpus: int, seconds: float, admission: Admission,
    signals: list[int],
) -> Any:  # fmt: skip
    """A placement group that is ready within `seconds`, or None; raises Stopped on a signal."""
    from ray.util.placement_group import remove_placement_group

    group = slots(bundles(launch, gpus), admission, strategy=strategy)
    started, said = time.monotonic(), False
    while not group.wait(LOOK_SECONDS):
        waited = time.monotonic() - started
        if signals or waited >= seconds:
            remove_placement_group(group)
            if signals:
                raise Stopped(
                    f"stopped on a signal while it waited for room for {launch.workers} workers; "
                    "no rank had started; the same command tries again"
                )
            return None
        if waited >= QUIET_SECONDS and not said:
            said = True
            print(
                f"launch: waiting {seconds - waited:.0f} s for room for {launch.workers} workers",
                flush=True,
            )
    return group


def slots(
    wanted: list[dict[str, float]], admission: Admission, *, strategy: str,
    apart: frozenset[str] = frozenset(),
) -> Any:  # fmt: skip
    """A placement group of these bundles on nodes that are not left out, nor among `apart`."""
    from ray.util.placement_group import placement_group

    selector = admission.selector(apart)
    chosen = [selector] * len(wanted) if selector else None
    return placement_group(wanted, strategy=strategy, bundle_label_selector=chosen)


def _no_room(launch: LaunchConfig, gpus: int, admission: Admission) -> str:
    import ray

    have, wanted = ray.cluster_resources(), bundles(launch, gpus)
    out = "".join(f"; left out: {reason}" for reason in admission.left_out.values())
    least = "" if launch.min_workers is None else f" (nor {launch.min_workers} workers)"
    return (
        f"launch.workers: {len(wanted)} x {wanted[0]} cannot be placed{least}; the cluster has "
        f"{have.get('CPU', 0):.0f} CPU and {have.get('GPU', 0):.0f} GPU on "
        f"{sum(node['Alive'] for node in ray.nodes())} nodes{out}; free some, or lower "
        "launch.workers"
    )


def with_group(config: TrainConfig, workers: int, group: int) -> TrainConfig:
    """The config whose accumulation gives `group` micro-batches a step on `workers` ranks."""
    shares = workers // config.batch.sequence_parallel
    batch = config.batch.model_copy(update={"accumulation": group // shares})
    return config.model_copy(update={"batch": batch})


class Growth:
    """Watches for room for the ranks that a shrunken gang lacks, has it examined, then asks the
    gang to save and stop.

    The missing slots are asked of Ray as a placement group, so an autoscaler sees the wish and
    other people's use counts.
    """

    def __init__(
        self, stop: Path, full: LaunchConfig, now: LaunchConfig, gpus: int, config: TrainConfig,
        admission: Admission, nodes: frozenset[str],
    ) -> None:  # fmt: skip
        """`nodes` are those that the gang stands on."""
        self.asked = False
        self._stop, self._full, self._now, self._gpus = stop, full, now, gpus
        self._config, self._admission = config, admission
        self._apart = nodes if full.nodes > 1 else frozenset()
        self._wish()

    def _wish(self) -> None:
        lacking = (self._full.workers - self._now.workers) // ranks_a_bundle(self._full)
        wanted = bundles(self._full, self._gpus)[:lacking]
        strategy = "STRICT_SPREAD" if self._full.nodes > 1 else "PACK"
        self._slots: Any = slots(wanted, self._admission, strategy=strategy, apart=self._apart)
        self._probes: Probes | None = None

    def look(self) -> None:
        """Called now and then while the gang runs."""
        if self.asked or not self._slots.wait(0):
            return
        sound = self._sound()
        if sound is None:
            return
        if not sound:  # ask for other nodes
            self.close()
            self._wish()
            return
        self.asked = True
        print(
            f"launch.min_workers: room for {self._full.workers} workers again; saving, then going "
            "on with all",
            flush=True,
        )
        self._stop.touch()

    def _sound(self) -> bool | None:
        """Whether the nodes of the slots passed preflight; None while they are examined."""
        if self._probes is None:
            self._probes = Probes(
                self._slots, self._full.workers - self._now.workers,
                share=ranks_a_bundle(self._full), gpus=self._gpus,
            )  # fmt: skip
        try:
            return self._probes.agree(self._admission, self._config, self._now.workers)
        except losses():  # the node went again
            return False

    def close(self) -> None:
        """Give the slots back, so that the full gang can take them."""
        from ray.util.placement_group import remove_placement_group

        if self._probes:
            self._probes.end()
        remove_placement_group(self._slots)
