"""One rank in a process of its own: the Ray actor, and nothing else that a worker imports early."""

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

INHERITED = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "TUNELOOM_STARTED", "HF_HUB_OFFLINE", "HF_HOME",
             "DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME",
             "CUDA_HOME", "PATH", "TORCHINDUCTOR_CACHE_DIR")  # fmt: skip
"""Variables that ranks get from the driver; secrets are not among them, W&B reads its own netrc."""
START_SECONDS = 300.0
"""For worker processes, which import from a file system that 1,000 others may read."""
DEVICES = ("CUDA_VISIBLE_DEVICES", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")
"""Which GPUs are this rank's, and that Ray is to leave that alone."""


def environment() -> dict[str, str]:
    """Variables that the ranks get from here."""
    passed = {name: os.environ[name] for name in INHERITED if name in os.environ}
    passed.setdefault("OMP_NUM_THREADS", "1")
    return passed


def devices(gpus: int) -> dict[str, str]:
    """What makes a rank of `gpus` GPUs see no more than those: Ray shows it its one, and without
    any what the host has, since it is told to leave that alone, and torch would train there.
    """
    return {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}


def losses() -> tuple[type[Exception], ...]:
    """What Ray raises for a worker that is gone; its own monitor of a host's memory ends some."""
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError

    return RayActorError, OutOfMemoryError, NodeDiedError


class Worker:
    """Says where it landed and what it sees there, then trains as the rank it is told to be."""

    def __init__(self, environment: dict[str, str]) -> None:
        # Not by `runtime_env`, with which Ray cannot use a process that is already there.
        os.environ.update(environment)

    def import_now(self) -> None:
        """Import what training will, before anything else is asked of this rank: on a cluster
        preflight asks new nodes alone, and the others would wait to import until it is over.
        """
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # looking for a GPU starts nothing there
        _import_all()

    def place(self) -> dict[str, Any]:
        """This rank's address, a free port on it, its node, and that node's name."""
        import ray

        with socket.socket() as listener:
            listener.bind(("", 0))
            port = listener.getsockname()[1]
        return {
            "address": ray.util.get_node_ip_address(),
            "port": port,
            "node": ray.get_runtime_context().get_node_id(),
            "host": socket.gethostname(),
            "devices": {name: os.environ[name] for name in DEVICES if name in os.environ},
        }

    def import_all(self, room: int) -> str | None:
        """Import what training will, and go on waiting; starts nothing on a GPU. Where this host
        has less than `room` bytes to spare: says so, and imports nothing.

        In a thread of the lowest priority, as the gang that trains needs its processors: Linux
        keeps priorities by thread, so the one that will train has its own still.
        """
        from tuneloom.launch.machine import host_bytes

        if (spare := host_bytes()) < room:
            host, gib = socket.gethostname(), 2**30
            return f"{host} has {spare / gib:.1f} GiB to spare, {room / gib:.0f} are wanted"
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # looking for a GPU starts nothing there
        with ThreadPoolExecutor(1, initializer=lambda: os.nice(19)) as aside:
            aside.submit(_import_all).result()
        return None

    def examine(self, config: dict[str, Any], rank: int, host: str) -> dict[str, Any]:
        """Preflight: `preflight.Facts` as a mapping."""
        from tuneloom.launch import preflight

        return asdict(preflight.examine(_training(config), rank, host))

    def unseen_by(self, config: dict[str, Any], ranks: int) -> tuple[int, ...]:
        """Preflight: ranks whose file this one cannot read."""
        from tuneloom.launch import preflight

        return preflight.unseen_by(_training(config), ranks)

    def now(self) -> float:
        """Preflight: this host's clock."""
        return time.time()

    def links(self, environment: dict[str, str], timeout_seconds: int) -> dict[str, float]:
        """Preflight: seconds of a message and of an all-reduce."""
        os.environ.update(environment)
        from tuneloom.launch import preflight

        return preflight.links(timeout_seconds=timeout_seconds)

    def run(
        self, config: dict[str, Any], launcher: dict[str, Any], environment: dict[str, str]
    ) -> dict[str, str] | None:
        """Train; a TuneloomError comes back as its class and sentence."""
        os.environ.update(environment)
        from tuneloom.errors import TuneloomError
        from tuneloom.imports import unswept

        with unswept():
            from tuneloom.train.loop import fit

        try:
            fit(_training(config), launcher=launcher)
        except TuneloomError as error:
            return {"class": type(error).__name__, "message": str(error)}
        return None


def _import_all() -> None:
    from tuneloom.imports import unswept

    with unswept():
        from tuneloom.train import distributed, loop

        distributed.choose_accelerator()
        loop.import_all()


def _training(config: dict[str, Any]) -> Any:
    from tuneloom.config import build
    from tuneloom.train.config import TrainConfig

    return build(TrainConfig, config)
