"""What W&B's own files hold, for the tests of tracking."""

import json
import struct
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
    """Rows of every W&B file of a run, parsed with W&B's own message types."""
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2

    rows = []
    for path in sorted(run.glob("wandb/**/*.wandb")):
        for data in _records(path):
            record = messages.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append(
                    {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
                )
    return rows
