"""The rows of a dataset folder or of a raw JSONL file: len, random access, and a digest.

A raw file is memory-mapped and one line is parsed at a time; a dataset is read through Arrow.
"""

import bisect
import hashlib
import json
import mmap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tuneloom.data.records import Format, Record, loads, parse
from tuneloom.errors import DataError

LONGEST_ROW = 4 * 2**20
"""Bytes; a row of 4 MiB is about a million tokens, a longer one most often a broken export."""
CHUNK = 2**20


class Rows(Protocol):
    """Rows by index; `digest` names their content, whatever the machine or path."""

    digest: str

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Record: ...
    def source(self, index: int) -> str: ...
    def where(self, index: int) -> str: ...


def open_rows(
    path: str | Path, split: str = "train", format: Format = "auto", *, verify: bool = True
) -> "Rows":
    """A dataset folder (`datasets/name`, `datasets/name@id`) or a raw .jsonl as `Rows`.

    `verify=False` skips the checksums of a dataset's shards, for ranks beside the one that checked.
    """
    path = Path(path)
    if path.is_dir():
        return DatasetRows(path, split, verify=verify)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder{_near(path)}; set data.path")
    if path.suffix in (".parquet", ".csv", ".tsv", ".gz", ".zst", ".zip"):
        raise DataError(f"{path}: expected JSONL or a dataset folder; run tuneloom ingest on it")
    try:
        return JsonlRows(path, format)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


class JsonlRows:
    """One JSON object a line; memory use is 16 bytes a row, whatever the size of the file."""

    def __init__(self, path: Path, format: Format = "auto") -> None:
        self.path = path
        self.format = format
        self._starts, self._ends, self._lines, sha = _index(path)
        self.digest = hashlib.sha256(f"jsonl {format} {sha}".encode()).hexdigest()
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Record:
        where = self.where(index)
        raw = self._map[self._starts[index] : self._ends[index]]
        try:
            line = raw.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where}: invalid UTF-8 at byte {error.start} of the line "
                f"(0x{raw[error.start]:02x}); save the file as UTF-8"
            ) from None
        return parse(loads(line, where), self.format, source=self.path.name, where=where)

    def source(self, index: int) -> str:
        return self[index].source

    def where(self, index: int) -> str:
        """path:line, as messages name it."""
        return f"{self.path}:{self._lines[index]}"


def _index(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Start, end and line number of every non-blank line, and the file's sha256, in one pass."""
    newlines, sha, size, head = [], hashlib.sha256(), 0, b""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            head = head or chunk[:3]
            newlines.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + size)
            sha.update(chunk)
            size += len(chunk)
    if not size:
        raise DataError(f"{path}: the file is empty; expected one JSON object a line")
    ends = np.append(np.concatenate(newlines), size)
    starts = np.append(0, ends[:-1] + 1)
    starts[0] = 3 if head == b"\xef\xbb\xbf" else 0
    lengths = ends - starts
    filled = lengths > 0
    if len(single := np.flatnonzero(lengths == 1)):  # blank too, if it is the \r of \r\n
        filled[single] = np.memmap(path, np.uint8, "r")[starts[single]] != 13
    kept = np.flatnonzero(filled)
    if not len(kept):
        raise DataError(f"{path}: the file holds only blank lines; expected one JSON object a line")
    longest = kept[lengths[kept].argmax()]
    if lengths[longest] > LONGEST_ROW:
        raise DataError(
            f"{path}:{longest + 1}: the row has {lengths[longest]:,} bytes, at most "
            f"{LONGEST_ROW:,} are read; split or remove it"
        )
    return starts[kept], ends[kept], (kept + 1).astype(np.int32), sha.hexdigest()


class DatasetRows:
    """A split of a folder that `tuneloom ingest` wrote; shards stay in Arrow's memory."""

    def __init__(self, path: Path, split: str, *, verify: bool = True) -> None:
        self.path = path
        self.manifest = manifest_of(path)
        splits = self.manifest["splits"]
        if split not in splits:
            raise DataError(f"{path}: no split {split!r}; it has {sorted(splits)}")
        self._shards: list[dict[str, Any]] = splits[split]["shards"]
        if verify:
            for shard in self._shards:
                verify_shard(path / shard["file"], shard["sha256"])
        self._first = np.cumsum([0, *(shard["rows"] for shard in self._shards)]).tolist()
        shas = " ".join(shard["sha256"] for shard in self._shards)
        self.digest = hashlib.sha256(f"dataset {shas}".encode()).hexdigest()
        self._tables: dict[int, Any] = {}
        if not self._first[-1]:
            raise DataError(f"{path}: split {split!r} has no rows")

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        table, row = self._locate(index)
        where = self.where(index)
        record = parse(loads(table["record"][row].as_py(), where), where=where)
        return Record(
            table["id"][row].as_py(), record.content, table["source"][row].as_py(), record.kind
        )

    def source(self, index: int) -> str:
        table, row = self._locate(index)
        return str(table["source"][row].as_py())

    def sources(self) -> dict[str, int]:
        """Rows by source."""
        found: Counter[str] = Counter()
        for shard in self._shards:
            counted = _columns(self.path / shard["file"])["source"].value_counts().to_pylist()
            found.update({one["values"]: one["counts"] for one in counted})
        return found

    def where(self, index: int) -> str:
        """path/shard:row, as messages name it."""
        number = bisect.bisect_right(self._first, index) - 1
        return f"{self.path / self._shards[number]['file']}:{index - self._first[number]}"

    def _locate(self, index: int) -> tuple[dict[str, Any], int]:
        """The Arrow columns of the shard that holds `index`, and the row in it."""
        number = bisect.bisect_right(self._first, index) - 1
        if number not in self._tables:
            self._tables[number] = _columns(self.path / self._shards[number]["file"])
        return self._tables[number], int(index) - self._first[number]


def _columns(path: Path) -> dict[str, Any]:
    """id, record and source of one shard as contiguous Arrow arrays (no Python objects).

    With offsets of 64 bits: those of pa.string() end at 2 GiB of text.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=["id", "record", "source"], memory_map=True)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable shard ({error}); ingest again") from None
    return {
        name: table[name].cast(pa.large_string()).combine_chunks() for name in table.column_names
    }


def manifest_of(path: Path) -> dict[str, Any]:
    """The manifest of a dataset folder; raises DataError where it is not one."""
    file = path / "manifest.json"
    if not file.exists():
        raise DataError(f"{path}: no manifest.json, so not a dataset folder; run tuneloom ingest")
    try:
        manifest = json.loads(file.read_text())
        names = [str(manifest.get("name", "")), *manifest["splits"]]
        for split in manifest["splits"].values():
            names += [s["file"] for s in split["shards"] if (s["rows"], s["sha256"])]
        if outside := [name for name in names if name != Path(name).name]:  # files are made by them
            raise ValueError(f"{outside[0]!r} is no name")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: not a dataset manifest ({error!r}); ingest again") from None
    return dict(manifest)


def verify_shard(path: Path, sha256: str) -> None:
    """Raise DataError unless the shard is the one that the manifest tells of."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); ingest again") from None
    if found != sha256:
        raise DataError(
            f"{path}: damaged: sha256 {found[:12]}, the manifest says {sha256[:12]}; ingest again"
        )


def _near(path: Path) -> str:
    """Versions of a dataset whose plain name (the link to the newest) is missing."""
    versions: Iterator[Path] = path.parent.glob(f"{path.name}@*") if path.name else iter(())
    names = sorted(str(version) for version in versions)
    return f"; did you mean {names[-1]!r}?" if names else ""
