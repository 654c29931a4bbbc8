"""W&B behind one door: a run always writes its own offline file, and a side process uploads it.

`wandb.init` blocks 90 s on a server that does not answer and then raises (measured, 0.31.0), and a
failed one cannot be followed by an offline one of the same id. So training only ever writes a file,
and what the network does costs no step and loses no row.

W&B's writer is a process of its own that keeps up to 32 KiB of rows back, and drops without a word
what a full disk does not take, and all after it (measured, 0.31.0). So metrics.jsonl is the
record, and what W&B's files lack of it is written at a resume, or by
`python -m tuneloom.train.metrics RUN`.
"""

import json
import logging
import netrc
import os
import struct
import time
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tuneloom.train.config import TrackerConfig
from tuneloom.train.uploader import Uploader


class Tracker:
    """`mode` and `reason` say what really happens: online, offline or off, and why."""

    def __init__(
        self, tracker: TrackerConfig, folder: Path, run_id: str, config: dict[str, Any]
    ) -> None:
        self.folder = folder
        self.run: Any = None
        self.uploader: Uploader | None = None
        self.mode, self.reason = _decide(tracker.mode)
        print(f"tracker: W&B {self.mode} ({self.reason})", flush=True)
        if self.mode == "off":
            return
        import wandb

        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, x_disable_stats=True
        )  # fmt: skip
        root = folder / "wandb"
        with self._tolerated("could not begin"):
            root.mkdir(exist_ok=True)
            earlier = sorted(root.glob("offline-run-*"))
            self.run = wandb.init(
                mode="offline", settings=settings, project=tracker.project, id=run_id, name=run_id,
                dir=str(folder), config=config, resume="allow",
            )  # fmt: skip
            if self.mode == "online":
                self.uploader = Uploader(earlier, Path(self.run.dir).parent)
        if self.run is None:
            self.mode, self.reason = "off", "W&B's file could not begin"

    @contextmanager
    def _tolerated(self, what: str) -> Iterator[None]:
        """What W&B cannot write ends no run; it is said once, with the way out."""
        import wandb

        # What W&B cannot write into its own debug.log would be a page of traceback a line.
        logging.raiseExceptions, before = False, logging.raiseExceptions
        try:
            yield
        except (OSError, wandb.Error) as error:
            self.run = None
            self._incomplete(f"{what} ({error})")
        finally:
            logging.raiseExceptions = before

    def _incomplete(self, why: str) -> None:
        print(
            f"tracker: W&B's file {why}; no row is lost: `python -m tuneloom.train.metrics "
            f"{self.folder}` writes those of metrics.jsonl that it lacks",
            flush=True,
        )

    def log(self, row: dict[str, Any]) -> None:
        if self.run is not None:
            with self._tolerated(f"ends before step {row['step']}"):
                self.run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def finish(self) -> None:
        """Close the file; wait for its upload while that gets on, and say so where it did not."""
        if self.run is not None:
            (file,) = Path(self.run.dir).parent.glob("*.wandb")
            with self._tolerated("was not closed"):
                self.run.finish()
                if not _ended(file):
                    self._incomplete("has no end, as where a disk is full")
            self.run = None
        if self.uploader is not None:
            left = self.uploader.finish()
            self.uploader = None
            if left:
                print(f"tracker: {left}", flush=True)


def _decide(wanted: str) -> tuple[str, str]:
    if wanted != "auto":
        return wanted, "asked for"
    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "dryrun", "disabled"):
        return "off" if mode == "disabled" else "offline", f"WANDB_MODE={mode}"
    where, fault = key()
    if where is not None:
        return "online", where
    return "offline", f"{fault or 'no key was found'}; `wandb sync` uploads later"


def key() -> tuple[str | None, str | None]:
    """Where W&B's key is, None without one: the variable, or a login for the host in ~/.netrc; and
    why that file could not be read.
    """
    if os.environ.get("WANDB_API_KEY"):
        return "WANDB_API_KEY is set", None
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        if file.exists() and netrc.netrc(str(file)).authenticators(host):
            return f"{host} is in {file}", None
    except (netrc.NetrcParseError, OSError, ValueError) as error:
        return None, f"{file} cannot be read ({error})"
    return None, None


def _records(path: Path) -> Iterator[bytes]:
    """Records of a .wandb file up to one that is damaged or cut off: a 7-byte head, then LevelDB's
    log format in blocks of 32 KiB, its checksum a plain CRC-32 (wandb 0.31.0).
    """
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        checksum, size, kind = struct.unpack_from("<IHB", data, at)
        if zlib.crc32(data[at + 6 : at + 7 + size]) != checksum:
            return
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # full, last
            yield parts
            parts = b""


def rows_written(run: Path) -> list[dict[str, Any]]:
    """Rows of every W&B file of a run; `finish` returns up to seconds before the last is written
    (wandb 0.31.0), so a file without its end is waited for.
    """
    files = _files(run)
    for path in files:
        _ended(path)
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row.item}
        for path in files
        for row in _history(path)
    ]


def steps_written(run: Path) -> set[int]:
    """Steps that have a row in a W&B file of a run."""
    return {row.step.num for path in _files(run) for row in _history(path)}


def _files(run: Path) -> list[Path]:
    return sorted((run / "wandb").glob("offline-run-*/*.wandb"))


def _ended(path: Path) -> bool:
    """Whether a W&B file has its end, or gets it within 5 s."""
    deadline = time.monotonic() + 5.0
    while not (ended := any(_parsed(data).HasField("exit") for data in deque(_records(path), 1))):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return ended


def _history(path: Path) -> Iterator[Any]:
    """Its rows, as W&B's own messages."""
    for data in _records(path):
        record = _parsed(data)
        if record.HasField("history"):
            yield record.history


def _parsed(data: bytes) -> Any:
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2
    return messages.Record.FromString(data)
