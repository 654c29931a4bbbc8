"""A dataset folder on disk: shards, manifest, and the id that is the digest of what they hold."""

import fcntl
import filecmp
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tuneloom.data.lock import alone_in
from tuneloom.data.rows import manifest_of
from tuneloom.errors import ConfigError, DataError

TIMING = "timing.json"
ROWS_PER_SHARD = 50_000
ROWS_PER_GROUP = 10_000
COLUMNS = ("id", "record", "source", "meta")
SCHEMA = pa.schema([(name, pa.string()) for name in COLUMNS])


class ColumnDigest:
    """sha256 of a column of text that does not show in which pieces the column came."""

    def __init__(self) -> None:
        self.lengths, self.text = hashlib.sha256(), hashlib.sha256()

    def add(self, column: pa.ChunkedArray) -> None:
        """Take the next piece; reads Arrow's buffers, so a row costs nanoseconds."""
        for chunk in column.chunks:
            offsets = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset :][: len(chunk) + 1]
            if len(chunk):
                self.lengths.update(np.diff(offsets).tobytes())
                self.text.update(chunk.buffers()[2][int(offsets[0]) : int(offsets[-1])])

    def hexdigest(self) -> str:
        return hashlib.sha256(self.lengths.digest() + self.text.digest()).hexdigest()


class ShardWriter:
    """Writes one split's rows, in the order given, into shards of a fixed number of rows."""

    def __init__(self, folder: Path, split: str, rows_per_shard: int) -> None:
        self.folder, self.split, self.rows_per_shard = folder, split, rows_per_shard
        self.waiting = SCHEMA.empty_table()
        self.rows, self.in_shard = 0, 0
        self.writer: pq.ParquetWriter | None = None
        self.shards: list[dict[str, Any]] = []
        self.digests = {column: ColumnDigest() for column in ("id", "source", "meta")}

    def add(self, table: pa.Table) -> None:
        """Append rows; shards are cut at row counts, so memory ranges do not show in the files."""
        table = table.select(COLUMNS)
        for column, digest in self.digests.items():
            digest.add(table[column])
        self.waiting = pa.concat_tables([self.waiting, table])
        self.rows += len(table)
        while len(self.waiting) >= (wanted := self._group()):
            self._write(wanted)

    def close(self) -> dict[str, Any]:
        """Write what is left; returns the manifest's entry of this split."""
        if len(self.waiting):
            self._write(len(self.waiting))
        self._cut()
        text = "".join(digest.hexdigest() for digest in self.digests.values())
        digest = hashlib.sha256(text.encode()).hexdigest()
        return {"rows": self.rows, "digest": digest, "shards": self.shards}

    def _group(self) -> int:
        """Rows of the next row group: as many as one holds, or as the shard still takes."""
        return min(ROWS_PER_GROUP, self.rows_per_shard - self.in_shard)

    def _write(self, count: int) -> None:
        """One row group, in one chunk; a full shard is closed."""
        group = self.waiting.slice(0, count).combine_chunks()
        self.waiting = self.waiting.slice(count)
        if self.writer is None:
            self.writer = pq.ParquetWriter(self._path(), SCHEMA, compression="zstd")
        self.writer.write_table(group, row_group_size=ROWS_PER_GROUP)
        self.in_shard += count
        if self.in_shard == self.rows_per_shard:
            self._cut()

    def _cut(self) -> None:
        """Close the shard that is open, if there is one."""
        if self.writer is not None:
            self.writer.close()
            entry = {"file": self._path().name, "rows": self.in_shard}
            self.shards.append(entry | {"sha256": file_digest(self._path())})
            self.writer, self.in_shard = None, 0

    def _path(self) -> Path:
        return self.folder / f"{self.split}-{len(self.shards):05d}.parquet"


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(splits: dict[str, Any]) -> str:
    """One digest over the rows of all splits."""
    text = " ".join(f"{name} {part['digest']}" for name, part in sorted(splits.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def manifest_id(manifest: dict[str, Any]) -> str:
    """Twelve hex digits over all that the manifest says, the digests of content among it.

    Digests of shard files are left out: another version of Parquet may pack equal rows otherwise.
    """
    splits = {name: part | {"shards": []} for name, part in manifest["splits"].items()}
    said = manifest | {"splits": splits}
    text = json.dumps(said, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]


@contextmanager
def draft_in(root: Path) -> Iterator[Path]:
    """A folder in `root` to write in, unseen until it is whole, and gone at the end if it is not.

    Its lock is let go of with this process: what a process that was killed left is removed here.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock, name = tempfile.mkstemp(prefix=".draft-", suffix=".lock", dir=root)
        fcntl.flock(lock, fcntl.LOCK_EX)
        _sweep(root)
        folder = Path(name).with_suffix("")
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise ConfigError(f"root: {root} cannot be written ({error.strerror})") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        Path(name).unlink(missing_ok=True)
        os.close(lock)


def _sweep(root: Path) -> None:
    """Remove drafts, which hold texts of rows, that no process writes any more."""
    for lock in root.glob(".draft-*.lock"):
        with lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)


def publish(
    draft: Path, root: Path, manifest: dict[str, Any], *, replaces: Path | None = None
) -> Path:
    """Move a finished draft to NAME@ID in one step and point the link NAME at it; with `replaces`,
    only a link to that version. One that is there to the byte stays: a run may be reading it.
    """
    name, identity = manifest["name"], manifest["id"]
    write_json(draft / "manifest.json", manifest)
    draft.chmod(0o755)  # it was private
    folder, link = root / f"{name}@{identity}", root / name
    old, fresh = root / f".{name}.old", root / f".{name}.new"
    with alone_in(root):
        if link.exists() and not link.is_symlink():
            raise DataError(f"{link}: a folder stands where the link to the newest version belongs")
        shutil.rmtree(old, ignore_errors=True)  # of a process that was killed here
        if folder.exists() and same_files(folder, draft):
            shutil.rmtree(draft)
        else:
            if folder.exists():  # damaged since, or packed by another version of Parquet
                folder.rename(old)
            draft.rename(folder)
        if replaces is None or link.resolve() == replaces.resolve():
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(folder.name)
            fresh.replace(link)
        shutil.rmtree(old, ignore_errors=True)
    return folder


def same_files(one: Path, other: Path) -> bool:
    """True when two folders hold the same files, byte for byte, but for how long they took."""
    names, others = (
        {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {TIMING}
        for folder in (one, other)
    )
    return names == others and not any(filecmp.cmpfiles(one, other, names, shallow=False)[1:])


def write_json(path: Path, value: Any) -> None:
    """JSON that a person can read, the same bytes on every machine."""
    text = json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a dataset folder; raises DataError where there is none."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise DataError(
            f"{folder}: no dataset here (no manifest.json); make one with tuneloom ingest"
        )
    return manifest_of(folder)


def read_column(folder: Path, manifest: dict[str, Any], split: str, column: str) -> Iterator[str]:
    """One column of one split, in order."""
    for shard in manifest["splits"][split]["shards"]:
        with pq.ParquetFile(folder / shard["file"]) as file:
            for batch in file.iter_batches(1_000, columns=[column]):
                yield from batch[column].to_pylist()
