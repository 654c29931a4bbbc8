"""Is Ray's head still there? Without it the ranks train on, but nothing can be placed or ended, and
Ray's client ends this process with its own exit 1 once the head is silent for long.

So ranks are asked to save and stop before that: their answers come to the launcher directly.
"""

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuneloom.errors import STOPPED, RefusedError, TrainingError
from tuneloom.launch.embedded import CLIENT_PATIENCE

SILENT_SECONDS = 10.0
"""A head that is this long away does not come back; one restarted with its store does sooner."""
CLIENT_SECONDS = 60.0
"""Ray's own patience (gcs_rpc_server_reconnect_timeout_s, 2.60.0)."""
MARGIN_SECONDS = 15.0
"""Before the client's end, for the ranks' answers and our own."""


class Head:
    """Asked about once a second; touches `stop` once Ray's control store no longer answers."""

    def __init__(self, stop: Path) -> None:
        import ray

        self.lost = False
        self.address = str(ray.get_runtime_context().gcs_address)
        self._stop, self._heard = stop, time.monotonic()
        patience = float(os.environ.get(CLIENT_PATIENCE, CLIENT_SECONDS))
        self._limit = max(patience - MARGIN_SECONDS, SILENT_SECONDS)

    def look(self) -> None:
        """Raises TrainingError when the ranks did not save before Ray's client gives up."""
        if not self.lost and self.answers():
            self._heard = time.monotonic()
        silent = time.monotonic() - self._heard
        if silent > self._limit:
            raise TrainingError(
                self.sentence(f"the ranks did not stop in {silent:.0f} s and end with Ray")
            )
        if silent > SILENT_SECONDS and not self.lost:
            self.lost = True
            print(
                f"launch: Ray's head at {self.address} is gone; saving, then stopping", flush=True
            )
            self._stop.touch()

    @contextmanager
    def before_training(self) -> Iterator[None]:
        """While ranks are placed and examined: calls of Ray's wait for a lost head, so the process
        ends from beside them, with 75 since nothing was lost.
        """
        over = threading.Event()

        def watch() -> None:
            while not over.wait(1.0):
                if self.answers():
                    self._heard = time.monotonic()
                elif time.monotonic() - self._heard > SILENT_SECONDS:
                    said = self.sentence("no rank has started yet")
                    print(f"tuneloom train: {said}", file=sys.stderr, flush=True)
                    os._exit(STOPPED)

        self._heard = time.monotonic()
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._heard = time.monotonic()

    def gone(self) -> bool:
        """True when it stays silent; for a worker that was lost may have been lost with it."""
        while not (self.lost or self.answers()):
            self.lost = time.monotonic() - self._heard > SILENT_SECONDS
            time.sleep(0.5)
        return self.lost

    def sentence(self, ranks: str) -> str:
        """What to say of the run; `ranks` is what became of them."""
        return (
            f"launch: Ray's head at {self.address} answers no more; {ranks}; look at "
            "gcs_server.out in Ray's logs, and give the same command again with "
            f"run.id={self._stop.parent.name} to resume"
        )

    def answers(self) -> bool:
        """Asked once, for at most two seconds."""
        return listens(self.address)


def listens(address: str) -> bool:
    """Whether somebody takes a connection at HOST:PORT within two seconds."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
    except (OSError, OverflowError):
        return False
    return True


def join(address: str, **options: Any) -> None:
    """`ray.init` on the cluster at RAY_ADDRESS; raises RefusedError where there is none.

    Ray alone asks a head that is not there for minutes, without a word.
    """
    import ray
    from ray.exceptions import RayError

    if not re.fullmatch(r"[^/]+:\d{1,5}", address):
        raise RefusedError(
            f"RAY_ADDRESS: expected HOST:PORT as `ray start --address` takes it, got {address!r}; "
            "the dashboard's address is for `ray job submit`"
        )
    started = time.monotonic()
    while not listens(address):
        if time.monotonic() - started > SILENT_SECONDS:
            raise RefusedError(
                f"RAY_ADDRESS: nobody answers at {address} for {SILENT_SECONDS:.0f} s; start Ray's "
                "head there, or look at its port and at firewalls"
            )
        time.sleep(0.5)
    try:
        ray.init(address=address, **options)
    except (ValueError, ConnectionError, RuntimeError, RayError) as error:
        raise RefusedError(
            f"RAY_ADDRESS: no Ray cluster could be joined at {address}: {error}"
        ) from error
