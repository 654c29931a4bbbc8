"""What W&B's own files hold, for the tests of tracking."""

import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

History = Callable[[Path], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def offline_history() -> History:
    return history


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


def history(run: Path) -> list[dict[str, Any]]:
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
