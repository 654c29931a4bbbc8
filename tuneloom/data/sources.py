"""The raw files that a pattern means: local or remote, each with a name that no machine changes."""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO

import fsspec

from tuneloom.errors import ConfigError, DataError

FORMATS = {
    ".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet", ".arrow": "arrow", ".txt": "text", ".md": "text",
}  # fmt: skip
ARCHIVES = {".zip": "zip", ".tar": "tar"}
SHORT = {".tgz": ".tar.gz", ".tbz2": ".tar.bz2", ".txz": ".tar.xz", ".tzst": ".tar.zst"}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
PAPERWORK = ("dataset_info.json", "state.json", "dataset_dict.json", "README.md")
"""Files beside the data in a Hugging Face datasets folder."""


@dataclass(frozen=True)
class Source:
    """One raw file: where it is, its name below what all files share, how it is read.

    A file inside an archive has the archive's path and an `opener` of its own.
    """

    path: str
    name: str
    kind: str
    compression: str | None
    opener: Callable[[], IO[bytes]] | None = field(default=None, compare=False)

    def open(self) -> IO[bytes]:
        """The bytes as they lie there."""
        if self.opener:
            return self.opener()
        local = self.path.removeprefix("file://")
        if local != self.path and not os.path.isfile(local) and os.path.exists(local):
            raise OSError(errno.EINVAL, "no regular file")  # a pipe would be waited on for ever
        return fsspec.open(self.path, "rb").open()


def find_sources(patterns: list[str]) -> list[Source]:
    """Every file the patterns mean, sorted by name; a name is the same wherever the folder lies."""
    paths = sorted({path for pattern in patterns for path in _expand(pattern)})
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return sorted((_source(path, common) for path in paths), key=lambda source: source.name)


def _expand(pattern: str) -> list[str]:
    """Files of a folder (those of a known kind), of a glob, or the one file, as full addresses."""
    if not pattern.strip():
        raise ConfigError("source: empty, which would be this whole folder; name a file or folder")
    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
    except (ImportError, ValueError) as error:  # fsspec says which package the protocol needs
        raise ConfigError(f"source: {pattern} cannot be reached: {error}") from None
    if filesystem.isdir(path):
        found = [
            p
            for p in filesystem.find(path)
            if kind_of(p) and not is_hidden(os.path.relpath(p, path))
        ]
    elif filesystem.exists(path):
        found = [path]
    else:
        named = (p for p in filesystem.glob(path) if not os.path.basename(p).startswith("."))
        found = [p for p in named if filesystem.isfile(p)]
    if not found:
        raise DataError(f"source: no file at {pattern!r}; give files, a folder or a quoted glob")
    return [filesystem.unstrip_protocol(p) for p in found]


def is_hidden(name: str) -> bool:
    """Below a folder or in a file whose name starts with a dot or is a dataset's own paperwork."""
    parts = name.split(os.sep)
    return any(part.startswith(".") and part != "." for part in parts) or parts[-1] in PAPERWORK


def kind_of(path: str) -> str | None:
    """How a file of this name is read; None for one that is not."""
    stem, suffix = os.path.splitext(_long(path))
    if suffix not in COMPRESSIONS:
        return (FORMATS | ARCHIVES).get(suffix)
    inner = os.path.splitext(stem)[1]
    return "tar" if inner == ".tar" else FORMATS.get(inner)


def compression_of(path: str) -> str | None:
    """How a file of this name is compressed."""
    return COMPRESSIONS.get(os.path.splitext(_long(path))[1])


def _long(path: str) -> str:
    """`a.tgz` as `a.tar.gz`."""
    stem, suffix = os.path.splitext(path.lower())
    return stem + SHORT.get(suffix, suffix)


def _source(path: str, common: str) -> Source:
    kind = kind_of(path)
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"source: {path!a} has a name that is not UTF-8; rename the file") from None
    if kind is None:
        raise DataError(
            f"source: {path} is of no kind that is read here ({', '.join(FORMATS)}, .tar, each "
            f"also {', '.join(COMPRESSIONS)}; and .zip)"
        )
    return Source(path, os.path.relpath(path, common), kind, compression_of(path))
