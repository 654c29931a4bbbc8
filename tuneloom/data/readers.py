"""Raw files as numbered blocks of rows, in constant memory, in an order that no machine changes."""

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tuneloom.errors import DataError

BLOCK_BYTES = 4 << 20
SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Source:
    """One raw file: where it is, and its name below what all files have in common."""

    path: str
    name: str


@dataclass(frozen=True)
class Block:
    """Whole lines of one source; `first` is the number of its first line, from 1."""

    number: int
    source: str
    first: int
    lines: bytes


def find_sources(patterns: list[str]) -> list[Source]:
    """Every file the patterns mean, sorted by name; a name is the same wherever the folder lies."""
    paths = sorted({str(Path(p).absolute()) for pattern in patterns for p in _expand(pattern)})
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return sorted(
        (Source(path, os.path.relpath(path, common)) for path in paths), key=lambda s: s.name
    )


def _expand(pattern: str) -> list[str]:
    """Files of a folder, of a glob, or the one file."""
    if os.path.isdir(pattern):
        found = [str(p) for p in Path(pattern).rglob("*") if p.name.endswith(SUFFIXES)]
    else:
        found = [p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]
    if not found:
        raise DataError(f"source: no file at {pattern!r}; give files, a folder or a quoted glob")
    return found


def blocks(sources: list[Source]) -> Iterator[Block]:
    """All lines of all sources, a few MB at a time; numbers rise in the order of names."""
    number = 0
    for source in sources:
        first = 1
        for lines in _whole_lines(source.path):
            yield Block(number, source.name, first, lines)
            number += 1
            first += lines.count(b"\n")


def _whole_lines(path: str) -> Iterator[bytes]:
    """The file in pieces that end at a line's end; a line longer than a piece stays whole."""
    rest: list[bytes] = []
    with open(path, "rb") as file:
        while piece := file.read(BLOCK_BYTES):
            cut = piece.rfind(b"\n") + 1
            if cut:
                yield b"".join([*rest, piece[:cut]])
                rest = []
            rest.append(piece[cut:])
    if last := b"".join(rest):
        yield last
