"""A Ray whose control store is gone: the ranks save and stop, and the command ends by its contract.

Ray's client ends the driver with exit 1 when its control store (GCS) has not answered for 60 s
(2.60.0, gcs_rpc_server_reconnect_timeout_s), from C++, past every handler. The ranks need no store
to train, so a thread asks them to save before that.
"""

import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

from tuneloom.errors import DONE, STOPPED, TRAINING

GONE_SECONDS = 10.0
"""A store that restarts (with Redis behind it) may take as long."""
SAVE_SECONDS = 40.0
"""From then on; the client would end the driver 10 s later."""


class Watch:
    """Looks once a second whether anything listens where the store did, until it is closed."""

    def __init__(self, address: str, folder: Path) -> None:
        self.address, self.folder = address, folder
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._look, name="ray head", daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.closed.set()
        self.thread.join()

    def _look(self) -> None:
        seen = time.monotonic()
        while not self.closed.wait(1.0):
            if listens(self.address):
                seen = time.monotonic()
            elif time.monotonic() - seen > GONE_SECONDS:
                self._leave()

    def _leave(self) -> None:
        """Past Ray, of which every call would wait for the store."""
        print(f"launch: Ray's head at {self.address} is gone: saving, then stopping", flush=True)
        (self.folder / "stop").touch()
        asked, deadline = time.time(), time.monotonic() + SAVE_SECONDS
        while (state := self._ended_since(asked)) is None and time.monotonic() < deadline:
            time.sleep(0.2)
        code = {"stopped": STOPPED, "done": DONE}.get(str(state), TRAINING)
        said = {STOPPED: "the ranks saved and stopped; the same command resumes",
                DONE: "the run was done by then"}  # fmt: skip
        print(f"tuneloom train: Ray's head at {self.address} has been gone for {GONE_SECONDS:.0f} "
              f"s; {said.get(code, 'the same command resumes from the last checkpoint')}",
              file=sys.stderr, flush=True)  # fmt: skip
        os._exit(code)

    def _ended_since(self, moment: float) -> str | None:
        """How run.json says the run ended; None while it says so of an earlier time, or nothing."""
        path = self.folder / "run.json"
        if not path.exists() or path.stat().st_mtime < moment:
            return None
        state = str(json.loads(path.read_text(encoding="utf-8"))["state"])
        return None if state == "running" else state


def listens(address: str) -> bool:
    """Whether a connection to HOST:PORT is taken."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
    except OSError:
        return False
    return True
