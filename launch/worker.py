"""One rank in a process of its own: the Ray actor, and nothing else that a worker imports early."""

import os
import socket
from typing import Any


class Worker:
    """Says where it landed, then trains as the rank it is told to be."""

    def place(self) -> dict[str, Any]:
        """This rank's address, a free port on it, and its node."""
        import ray

        with socket.socket() as listener:
            listener.bind(("", 0))
            port = listener.getsockname()[1]
        return {
            "address": ray.util.get_node_ip_address(),
            "port": port,
            "node": ray.get_runtime_context().get_node_id(),
        }

    def run(
        self, config: dict[str, Any], launcher: dict[str, Any], environment: dict[str, str]
    ) -> dict[str, str] | None:
        """Train; a TuneloomError comes back as its class and sentence."""
        os.environ.update(environment)
        from tuneloom.config import build
        from tuneloom.errors import TuneloomError
        from tuneloom.train.config import TrainConfig
        from tuneloom.train.loop import fit

        try:
            fit(build(TrainConfig, config), launcher=launcher)
        except TuneloomError as error:
            return {"class": type(error).__name__, "message": str(error)}
        return None
