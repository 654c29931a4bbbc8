"""W&B behind one door: a run always writes its own offline file, and a side process uploads it.

`wandb.init` blocks 90 s on a server that does not answer and then raises (measured, 0.31.0), and a
failed one cannot be followed by an offline one of the same id. So training only ever writes a file,
and what the network does costs no step and loses no row.
"""

import json
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuneloom.train.config import TrackerConfig
from tuneloom.train.uploader import Uploader


class Tracker:
    """`mode` and `reason` say what really happens: online, offline or off, and why."""

    def __init__(
        self, tracker: TrackerConfig, folder: Path, run_id: str, config: dict[str, Any]
    ) -> None:
        self.run: Any = None
        self.uploader: Uploader | None = None
        self.mode, self.reason = _decide(tracker.mode)
        print(f"tracker: W&B {self.mode} ({self.reason})", flush=True)
        if self.mode == "off":
            return
        import wandb

        root = folder / "wandb"
        root.mkdir(exist_ok=True)
        earlier = sorted(root.glob("offline-run-*"))
        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, x_disable_stats=True
        )  # fmt: skip
        self.run = wandb.init(
            mode="offline", settings=settings, project=tracker.project, id=run_id, name=run_id,
            dir=str(folder), config=config, resume="allow",
        )  # fmt: skip
        if self.mode == "online":
            self.uploader = Uploader(earlier, Path(self.run.dir).parent)

    def log(self, row: dict[str, Any]) -> None:
        if self.run is not None:
            self.run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def finish(self) -> None:
        """Close the file; wait for its upload while that gets on, and say so where it did not."""
        if self.run is not None:
            self.run.finish()
            self.run = None
        if self.uploader is not None:
            left = self.uploader.finish()
            self.uploader = None
            if left:
                print(f"tracker: {left}", flush=True)


def _decide(wanted: str) -> tuple[str, str]:
    if wanted != "auto":
        return wanted, "asked for"
    if os.environ.get("WANDB_API_KEY") or _netrc_has_wandb():
        return "online", "a key was found"
    return "offline", "no key was found; `wandb sync` uploads later"


def _netrc_has_wandb() -> bool:
    netrc = Path.home() / ".netrc"
    return netrc.exists() and "api.wandb.ai" in netrc.read_text(encoding="utf-8", errors="replace")


def _records(path: Path) -> Iterator[bytes]:
    """Records of a .wandb file: a 7-byte head, then LevelDB's log format in blocks of 32 KiB."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        if kind == 0:
            return
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # full, last
            yield parts
            parts = b""


def rows_written(run: Path) -> list[dict[str, Any]]:
    """Rows of every W&B file of a run; `finish` returns up to seconds before the last is written
    (wandb 0.31.0), so a file without its end is read again for a while.
    """
    deadline = time.monotonic() + 5.0
    while True:
        rows, ended = _history(run)
        if ended or time.monotonic() > deadline:
            return rows
        time.sleep(0.1)


def _history(run: Path) -> tuple[list[dict[str, Any]], bool]:
    """Rows parsed with W&B's own message types, and whether every file has its end."""
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2

    rows, open_files = [], 0
    for path in sorted(run.glob("wandb/**/*.wandb")):
        open_files += 1
        for data in _records(path):
            record = messages.Record()
            record.ParseFromString(data)
            open_files -= record.WhichOneof("record_type") == "exit"
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append(
                    {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
                )
    return rows, not open_files
