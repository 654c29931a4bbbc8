"""Ranks as Ray actors in one placement group: started together, watched, restarted from the last checkpoint.

Ray Core and not Ray Train: bare Ray Train needs 22 s from a killed worker to the next step, resumes from
what its controller polled last (up to one interval older than the disk), and `report()` costs 2 s a step
(measured on 2.60.0). Here a checkpoint on disk that verifies is the only thing a restart believes.
"""

import os
import socket
import time
from typing import Any

from tuneloom.errors import RefusedError, TrainingError, TuneloomError
from tuneloom.launch.config import LaunchConfig
from tuneloom.train.config import TrainConfig

ENVIRONMENT = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "TUNELOOM_STARTED", "HF_HUB_OFFLINE", "HF_HOME",
               "DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME",
               "CUDA_HOME")  # fmt: skip
"""Variables that ranks inherit; secrets are not among them."""


def supervise(config: TrainConfig, launch: LaunchConfig) -> None:
    """Run the gang until it is done; restart it at most `max_restarts` times when a worker dies.

    Raises the error a rank raised, or TrainingError when workers kept dying.
    """
    import ray

    connect(launch)
    try:
        for attempt in range(launch.max_restarts + 1):
            lost = run_gang(config, launch, attempt)
            if lost is None:
                return
            print(f"launch: {lost}; restart {attempt + 1} of {launch.max_restarts}", flush=True)
        raise TrainingError(f"launch.max_restarts: {launch.max_restarts} restarts used up; last: {lost}")
    finally:
        ray.shutdown()


def connect(launch: LaunchConfig) -> None:
    """Start an embedded Ray (`local`) or join the cluster this process is on (`ray`).

    Never address="auto": on a shared host it follows a pointer in /tmp/ray into another user's cluster.
    """
    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    shared: dict[str, Any] = {"logging_level": "warning", "log_to_driver": True}
    if launch.kind == "local":
        ray.init(
            address="local", num_cpus=max(launch.workers, os.cpu_count() or 1), include_dashboard=False,
            object_store_memory=80 * 2**20, **shared,
        )  # fmt: skip
        return
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        raise RefusedError("launch=ray: RAY_ADDRESS is unset; use `ray job submit`, or launch=local")
    ray.init(address=address, **shared)


def run_gang(config: TrainConfig, launch: LaunchConfig, attempt: int) -> str | None:
    """One attempt: place, start, wait. None when done, a sentence when a worker was lost."""
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
    from ray.util.placement_group import placement_group, remove_placement_group

    gpus = gpus_per_worker(launch)
    bundle = {"CPU": 1.0} | ({"GPU": float(gpus)} if gpus else {})
    group = placement_group([bundle] * launch.workers, strategy="PACK")
    try:
        ray.get(group.ready(), timeout=300)
    except GetTimeoutError:
        have = ray.cluster_resources()
        raise RefusedError(
            f"launch.workers: {launch.workers} x {bundle} cannot be placed; the cluster has "
            f"{have.get('CPU', 0):.0f} CPU and {have.get('GPU', 0):.0f} GPU"
        ) from None
    actors = [_worker_class().options(
        num_cpus=1, num_gpus=gpus, placement_group=group, placement_group_bundle_index=rank,
        runtime_env={"env_vars": environment()}, max_restarts=0,
    ).remote() for rank in range(launch.workers)]  # fmt: skip
    try:
        places = ray.get([actor.place.remote() for actor in actors])
        address, port = places[0]["address"], places[0]["port"]
        hosts = [place["node"] for place in places]
        waiting = [
            actor.run.remote(config.model_dump(mode="json"), launch.model_dump(mode="json"), {
                "RANK": str(rank), "WORLD_SIZE": str(launch.workers),
                "LOCAL_RANK": str(0 if gpus else hosts[:rank].count(hosts[rank])),
                "MASTER_ADDR": address, "MASTER_PORT": str(port), "TUNELOOM_ATTEMPT": str(attempt),
            })
            for rank, actor in enumerate(actors)
        ]  # fmt: skip
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            for error in ray.get(done):
                if error is not None:
                    raise revived(error)
        return None
    except RayActorError as error:
        return f"a worker was lost ({type(error).__name__})"
    except RayTaskError as error:
        raise TrainingError(f"a rank failed: {str(error.cause).strip()}") from error
    finally:
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(group)


def revived(error: dict[str, str]) -> TuneloomError:
    """A rank's error as the class it was."""
    classes = {c.__name__: c for c in _subclasses(TuneloomError)}
    return classes.get(error["class"], TrainingError)(error["message"])


def _subclasses(kind: type) -> list[type]:
    return [s for c in kind.__subclasses__() for s in (c, *_subclasses(c))]


def gpus_per_worker(launch: LaunchConfig) -> int:
    """GPUs a rank holds: what was asked, or 1 where the cluster has any."""
    import ray

    if launch.gpus_per_worker != "auto":
        return launch.gpus_per_worker
    return 1 if ray.cluster_resources().get("GPU", 0) else 0


def environment() -> dict[str, str]:
    """Variables that the ranks get from here."""
    passed = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    passed.setdefault("OMP_NUM_THREADS", "1")
    return passed


def _worker_class() -> Any:
    import ray

    return ray.remote(Worker)


class Worker:
    """One rank in a process of its own."""

    def place(self) -> dict[str, Any]:
        """Where this rank landed; rank 0's address and a free port become the rendezvous."""
        import ray

        with socket.socket() as listener:
            listener.bind(("", 0))
            port = listener.getsockname()[1]
        return {
            "address": ray.util.get_node_ip_address(),
            "port": port,
            "node": ray.get_runtime_context().get_node_id(),
            "time": time.time(),
        }

    def run(
        self, config: dict[str, Any], launcher: dict[str, Any], environment: dict[str, str]
    ) -> dict[str, str] | None:
        """Train as this rank; a TuneloomError comes back as its class and sentence."""
        os.environ.update(environment)
        from tuneloom.config import build
        from tuneloom.train.loop import fit

        try:
            fit(build(TrainConfig, config), launcher=launcher)
        except TuneloomError as error:
            return {"class": type(error).__name__, "message": str(error)}
        return None


