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
from tuneloom.launch.worker import START_SECONDS, Worker, devices, environment
from tuneloom.train.config import TrainConfig
from tuneloom.train.runs import digest

NODE_LABEL = "ray.io/node-id"
ANSWER_SECONDS = 2.0
"""For one that has answered in time, to tell its clock."""


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
            [actors[rank] for rank in new], [places[rank] for rank in new], probes, config,
            deadline=time.monotonic() + PATIENCE_SECONDS,
        )  # fmt: skip

    def judge_all(
        self, actors: list[Any], places: list[dict[str, Any]], probes: list[Any],
        config: TrainConfig, *, deadline: float,
    ) -> bool:  # fmt: skip
        """True when every node passed; each that did not, or says nothing before `deadline` of the
        monotonic clock, is left out.
        """
        before = frozenset(self._passed)
        try:
            verdicts = [
                place["node"] in before or self._judge(place, probe, actor, config, deadline)
                for place, probe, actor in zip(places, probes, actors, strict=True)
            ]
        finally:
            shutil.rmtree(probe_folder(config), ignore_errors=True)
        return all(verdicts)

    def _judge(
        self, place: dict[str, Any], probe: Any, actor: Any, config: TrainConfig, deadline: float
    ) -> bool:
        """True when what a node's worker said is what rank 0 said at the start."""
        node, name = place["node"], place["host"]
        reasons = self._reasons(probe, actor, config, deadline)
        if not reasons:
            if node not in self._passed:
                print(f"preflight: {name} joined and agrees with rank 0", flush=True)
            self._passed.add(node)
            return True
        self.leave_out(node, name, reasons)
        return False

    def leave_out(self, node: str, name: str, reasons: list[str]) -> None:
        """No rank stands there from now on."""
        if node not in self.left_out:
            more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
            print(f"preflight: {name} joined and is left out: {reasons[0]}{more}", flush=True)
            self.left_out[node] = f"{name}: {reasons[0]}"

    def _reasons(self, probe: Any, actor: Any, config: TrainConfig, deadline: float) -> list[str]:
        """Why a worker's node may not take ranks; empty when it may."""
        import ray
        from ray.exceptions import GetTimeoutError, RayTaskError

        assert self._reference is not None, "no gang was examined yet"
        deadline = max(deadline, time.monotonic() + ANSWER_SECONDS)
        try:
            facts = Facts(**ray.get(probe, timeout=deadline - time.monotonic()))
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
        self._slots, self._share = slots, share
        self._asked = [actor.place.remote() for actor in self._actors]
        self._since = time.monotonic()
        self._places: list[dict[str, Any]] = []

    def agree(self, admission: Admission, config: TrainConfig, first_rank: int) -> bool | None:
        """None while they examine; then whether every node of them is admitted."""
        import ray

        silent = ray.wait(self._asked, num_returns=len(self._asked), timeout=0)[1]
        waited = time.monotonic() - self._since
        if silent and waited < (PATIENCE_SECONDS if self._places else START_SECONDS):
            return None
        if not self._places:
            if silent:
                self._leave_out(silent, admission)
                return False
            self._places, self._since = ray.get(self._asked), time.monotonic()
            self._asked = [
                ask(actor, first_rank + number, self._places[number]["host"], config)
                for number, actor in enumerate(self._actors)
            ]
            return None
        return admission.judge_all(
            self._actors, self._places, self._asked, config, deadline=time.monotonic()
        )

    def _leave_out(self, silent: list[Any], admission: Admission) -> None:
        """Nodes where no worker starts; only Ray knows which those are."""
        from ray.util.placement_group import placement_group_table

        nodes = placement_group_table(self._slots)["bundles_to_node_id"]
        for number, asked in enumerate(self._asked):
            if asked in silent:
                node = nodes[number // self._share]
                reason = f"no worker started in {START_SECONDS:.0f} s; look at Ray's logs there"
                admission.leave_out(node, f"node {node[:12]}", [reason])

    def end(self) -> None:
        """Kill them; the slots stay."""
        import ray

        for actor in self._actors:
            ray.kill(actor)
