"""Preflight of nodes that join later: nobody trains on a node that was not examined.

The first gang's preflight decides whether the run starts. After that a new node, which took a lost
one's place or lets a shrunken run grow, is compared with what rank 0 said then; where it differs it
is left out for the rest of the run, with one line that says why.
"""

import dataclasses
import shutil
import time
from typing import Any

from tuneloom.launch.preflight import (
    PATIENCE_SECONDS,
    Facts,
    needed_bytes,
    probe_folder,
    skew,
    verdict,
)
from tuneloom.launch.worker import Worker, devices, environment
from tuneloom.train.config import TrainConfig
from tuneloom.train.runs import digest

NODE_LABEL = "ray.io/node-id"


class Admission:
    """Which nodes of a cluster passed, and which are left out."""

    def __init__(self, gpus: int) -> None:
        self.left_out: dict[str, str] = {}
        """By node: its name and the first reason."""
        self._passed: set[str] = set()
        self._gpus = gpus
        self._reference: Facts | None = None

    def start(self, places: list[dict[str, Any]], first: Facts) -> None:
        """The first gang agreed: these nodes passed, and `first` is what others are held to."""
        self._passed = {place["node"] for place in places}
        self._reference = first

    @property
    def started(self) -> bool:
        """True once a first gang agreed."""
        return self._reference is not None

    def selector(self, apart: frozenset[str]) -> dict[str, str]:
        """Labels of the nodes that may take ranks, `apart` from these."""
        nodes = apart | self.left_out.keys()
        return {NODE_LABEL: f"!in({','.join(sorted(nodes))})"} if nodes else {}

    def admits(self, actors: list[Any], places: list[dict[str, Any]], config: TrainConfig) -> bool:
        """Examine the nodes of a gang that are new; False when one of them is left out now."""
        new = [rank for rank, place in enumerate(places) if place["node"] not in self._passed]
        probes = [ask(actors[rank], rank, places[rank]["host"], config) for rank in new]
        return not new or self.judge_all(
            [actors[rank] for rank in new], [places[rank] for rank in new], probes, config
        )

    def judge_all(
        self, actors: list[Any], places: list[dict[str, Any]], probes: list[Any],
        config: TrainConfig,
    ) -> bool:  # fmt: skip
        """True when every node passed; each that did not is left out."""
        before = frozenset(self._passed)
        try:
            verdicts = [
                place["node"] in before or self._judge(place, probe, actor, config)
                for place, probe, actor in zip(places, probes, actors, strict=True)
            ]
        finally:
            shutil.rmtree(probe_folder(config), ignore_errors=True)
        return all(verdicts)

    def _judge(self, place: dict[str, Any], probe: Any, actor: Any, config: TrainConfig) -> bool:
        """True when what a node's worker said is what rank 0 said at the start."""
        node, name = place["node"], place["host"]
        reasons = self._reasons(probe, actor, config)
        if not reasons:
            if node not in self._passed:
                print(f"preflight: {name} joined and agrees with rank 0", flush=True)
            self._passed.add(node)
            return True
        if node not in self.left_out:
            more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
            print(f"preflight: {name} joined and is left out: {reasons[0]}{more}", flush=True)
            self.left_out[node] = f"{name}: {reasons[0]}"
        return False

    def _reasons(self, probe: Any, actor: Any, config: TrainConfig) -> list[str]:
        """Why a worker's node may not take ranks; empty when it may."""
        import ray
        from ray.exceptions import GetTimeoutError, RayTaskError

        assert self._reference is not None, "no gang was examined yet"
        deadline = time.monotonic() + PATIENCE_SECONDS
        try:
            facts = Facts(**ray.get(probe, timeout=PATIENCE_SECONDS))
            ahead = skew(actor, deadline=deadline)
        except RayTaskError as error:
            return [f"its examination failed: {str(error.cause).strip()}"]
        except GetTimeoutError:
            return [f"no answer in {PATIENCE_SECONDS:.0f} s; look at its disks and network"]
        # What it wrote must be seen where the launcher is, as what rank 0 wrote was.
        seen = (probe_folder(config) / str(facts.rank)).is_file()
        facts = dataclasses.replace(facts, clock_skew=ahead, unseen=() if seen else (0,))
        # The share of the batch changes with the number of ranks, and with it the digest.
        reference = dataclasses.replace(self._reference, config=digest(config))
        need = needed_bytes(config, reference)
        return verdict([reference, facts], gpus_per_rank=self._gpus, need_bytes=need)


def ask(actor: Any, rank: int, host: str, config: TrainConfig) -> Any:
    """Have a worker examine its node; what it says is awaited by `Admission.judge_all`."""
    probe_folder(config).mkdir(parents=True, exist_ok=True)  # or NFS believes it absent for long
    return actor.examine.remote(config.model_dump(mode="json"), rank, host)


class Probes:
    """Workers that examine the slots a shrunken run could grow into, while it trains on."""

    def __init__(self, slots: Any, ranks: int, *, share: int, gpus: int) -> None:
        """One for each of `ranks` that would stand there, `share` of them in a bundle."""
        import ray

        self._actors: list[Any] = [
            ray.remote(Worker).options(
                num_cpus=1, num_gpus=gpus, placement_group=slots,
                placement_group_bundle_index=rank // share, max_restarts=0,
            ).remote(environment() | devices(gpus))
            for rank in range(ranks)
        ]  # fmt: skip
        self._asked = [actor.place.remote() for actor in self._actors]
        self._places: list[dict[str, Any]] = []

    def agree(self, admission: Admission, config: TrainConfig, first_rank: int) -> bool | None:
        """None while they examine; then whether every node of them is admitted."""
        import ray

        if ray.wait(self._asked, num_returns=len(self._asked), timeout=0)[1]:
            return None
        if not self._places:
            self._places = ray.get(self._asked)
            self._asked = [
                ask(actor, first_rank + number, self._places[number]["host"], config)
                for number, actor in enumerate(self._actors)
            ]
            return None
        return admission.judge_all(self._actors, self._places, self._asked, config)

    def end(self) -> None:
        """Kill them; the slots stay."""
        import ray

        for actor in self._actors:
            ray.kill(actor)
