"""One file of the token cache: examples of some rows as Arrow columns, named by their own checksum.

A shard is written to a temporary file, fsynced and renamed to `<number>-<sha256>.arrow`, so a file
under that name is whole, and a reader proves it by hashing what it maps. Nothing in it is code (no
pickle).
"""

import hashlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tuneloom.data.records import Record
from tuneloom.data.render import Example


@dataclass(frozen=True)
class Shard:
    """Memory-mapped columns; `rows`, `lengths`, `tokens`, `trained`, `targets`: (n,) arrays."""

    rows: np.ndarray
    lengths: np.ndarray
    """Tokens kept; 0 for a dropped row."""
    tokens: np.ndarray
    """Tokens before the example was cut to max_length."""
    trained: np.ndarray
    """Target tokens kept."""
    targets: np.ndarray
    """Target tokens before the cut."""
    table: Any

    def example(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """ids: (L,) int32, read-only; target: (L,) bool."""
        ids, target = self.table["ids"][position], self.table["target"][position]
        return _numpy(ids.values), _numpy(target.values.cast(pa.uint8())).view(bool)

    def text(self, column: str, position: int) -> str:
        return str(self.table[column][position].as_py())


def write(
    folder: Path, number: int, rows: np.ndarray, records: Sequence[Record], done: Sequence[Example]
) -> Path:
    """Write one shard; when this returns, the file is whole and on disk."""
    table = pa.table(
        {
            "row": pa.array(rows, pa.int64()),
            "id": pa.array([record.id for record in records], pa.string()),
            "source": pa.array([record.source for record in records], pa.string()),
            "dropped": pa.array([example.dropped for example in done], pa.string()),
            "tokens": pa.array([example.tokens for example in done], pa.int32()),
            "targets": pa.array([example.targets for example in done], pa.int32()),
            "trained": pa.array([int(example.target.sum()) for example in done], pa.int32()),
            "ids": _lists([example.ids for example in done]),
            "target": _lists([example.target for example in done]),
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue()
    path = folder / f"{number:06d}-{hashlib.sha256(data).hexdigest()}.arrow"
    write_whole(path, data)
    return path


def write_whole(path: Path, data: Any) -> None:
    """Temporary file, fsync, rename, fsync of the folder: `path` is whole or absent."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> Shard | None:
    """Map a shard; None when its bytes are not those that its name promises."""
    with pa.memory_map(str(path)) as file:
        data = file.read_buffer()
    if hashlib.sha256(data).hexdigest() != path.stem.split("-", 1)[1]:
        return None
    table = pa.ipc.open_file(data).read_all().combine_chunks()
    columns = {name: table[name].chunk(0) for name in table.column_names}
    lengths = np.diff(_numpy(columns["ids"].offsets))
    numbers = (_numpy(columns[name]) for name in ("row", "tokens", "trained", "targets"))
    rows, tokens, trained, targets = numbers
    return Shard(rows, lengths, tokens, trained, targets, columns)


def _numpy(array: Any) -> np.ndarray:
    """Numbers of an Arrow array, read-only and not copied. (`to_numpy` imports pandas: 0.5 s.)"""
    return np.from_dlpack(array)


def _lists(arrays: Sequence[np.ndarray]) -> Any:
    """Arrays of any length as one Arrow list column."""
    offsets = np.cumsum([0, *(len(array) for array in arrays)])
    return pa.LargeListArray.from_arrays(
        pa.array(offsets, pa.int64()), pa.array(np.concatenate(arrays))
    )
