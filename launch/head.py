"""The head of an embedded Ray: when it dies, the ranks save and the command ends, in seconds.

Ray's own client waits 60 s for it and then ends the driver with exit 1 and no word of ours; ranks
train on meanwhile, but one that dies is no longer replaced (measured on 2.60.0). Heads of other
machines are not watched: they are their owner's.
"""

import json
import os
import sys
import time
from pathlib import Path

import psutil

from tuneloom.errors import DONE, STOPPED, TRAINING

PATIENCE_SECONDS = 60.0
"""How long ranks may take to save and leave."""


class Head:
    """Ray's control store, a child of this process."""

    def __init__(self, run: Path) -> None:
        self.run = run
        children = psutil.Process().children(recursive=True)
        self._stores = [child for child in children if "gcs_server" in child.name()]

    def look(self) -> None:
        """Return while it lives. Else have the ranks save, and end this process: whatever asks Ray
        for something now does not come back.
        """
        if all(store.is_running() and store.status() != "zombie" for store in self._stores):
            return
        (self.run / "stop").touch()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._state() == "running" and time.monotonic() < deadline:
            time.sleep(0.1)
        state = self._state()
        print(
            f"tuneloom train: launch: Ray's head process died, the run is {state}; the same "
            "command resumes it",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit({"done": DONE, "stopped": STOPPED}.get(state, TRAINING))

    def _state(self) -> str:
        record = self.run / "run.json"
        if not record.exists():
            return "not begun"
        return str(json.loads(record.read_text(encoding="utf-8"))["state"])
