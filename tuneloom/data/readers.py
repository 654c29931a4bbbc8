"""Rows of raw files in numbered blocks, in constant memory, in an order that no machine changes.

JSONL goes to the workers as lines; CSV, TSV, Parquet, Arrow, JSON and plain text are parsed here.
"""

import codecs
import csv
import errno
import io
import itertools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from tuneloom.data.archives import parts_of
from tuneloom.data.mapping import UnknownShape, recognise
from tuneloom.data.payloads import DEEPEST, deeper
from tuneloom.data.schema import Reject, unique
from tuneloom.data.sources import Source
from tuneloom.data.streams import Counted
from tuneloom.data.strict_json import TOO_DEEP
from tuneloom.errors import DataError, TuneloomError

BLOCK_BYTES = 4 << 20
BLOCK_ROWS = 2_000
LONGEST_LINE = 64 << 20
"""Bytes; what goes beyond is cut off, and the row is rejected as too long or as broken JSON."""
LARGEST_JSON = 256 << 20
"""Bytes of one .json file, which has to be read whole; JSONL has no such limit."""
UNCLOSED = "unexpected end of data"
"""What csv says of a quote that is open where the file ends."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
Row = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """Whole lines of one source, or its parsed rows; `first` is the number of the first, from 1."""

    number: int
    source: str
    first: int
    lines: bytes = b""
    rows: list[Row | Reject] | None = None

    def without_rows(self) -> "Block":
        """The same block for book-keeping, its rows let go."""
        return Block(self.number, self.source, self.first)


@dataclass(frozen=True)
class Passed:
    """A source was read to its end: its digest and size, as it lies on disk or in its archive."""

    source: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Refused:
    """A file that could not be read to its end, and the sentence that says why."""

    source: str
    why: str


def read_blocks(
    sources: list[Source],
    ends: list[Passed | Refused],
    *,
    max_archive_bytes: int,
    refuse_files: bool = False,
) -> Iterator[Block]:
    """All rows of all sources, in the order of names; `ends` grows by every source.

    With `refuse_files` each file is read once more beforehand: of one that is bad somewhere no row
    is taken.
    """
    number = 0
    for source in sources:
        if refuse_files and (why := _fault_of(source, max_archive_bytes)):
            ends.append(Refused(source.name, why))
            continue
        for block in _blocks_of_file(source, ends, max_archive_bytes):
            yield replace(block, number=number)
            number += 1


def _fault_of(source: Source, max_archive_bytes: int) -> str | None:
    """Why a file cannot be read to its end, or None."""
    try:
        for _ in _blocks_of_file(source, [], max_archive_bytes):
            pass
    except DataError as error:
        return str(error)
    return None


def _blocks_of_file(
    source: Source, ends: list[Passed | Refused], max_archive_bytes: int
) -> Iterator[Block]:
    """The rows of a file, or of all files in an archive; raises DataError for what is broken."""
    try:
        for part in parts_of(source, max_archive_bytes):
            yield from _blocks_of(part, ends)
    except TuneloomError:
        raise
    except (OSError, ValueError, OverflowError, LookupError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise
        why = getattr(error, "strerror", None) or error  # without the path, which a machine changes
        raise DataError(f"{source.name}: cannot be read as {source.kind} ({why})") from None


def _blocks_of(source: Source, ends: list[Passed | Refused]) -> Iterator[Block]:
    """One source's rows, counted from 1."""
    first = 1
    with Counted(source) as stream:
        if source.kind == "lines":
            for lines in _whole_lines(stream):
                yield Block(0, source.name, first, lines)
                first += lines.count(b"\n")
        else:
            for rows in _grouped(READERS[source.kind](stream, source)):
                yield Block(0, source.name, first, rows=rows)
                first += len(rows)
        ends.append(Passed(source.name, *stream.finish()))


def _whole_lines(stream: Counted) -> Iterator[bytes]:
    """The file in pieces that end at a line's end; of an endless line only the start is kept."""
    rest: list[bytes] = []
    while piece := stream.read(BLOCK_BYTES):
        cut = piece.rfind(b"\n") + 1
        if cut:
            yield b"".join([*rest, piece[:cut]])
            rest = []
        if len(rest) < LONGEST_LINE // BLOCK_BYTES:
            rest.append(piece[cut:])
    if last := b"".join(rest):
        yield last


def _grouped(rows: Iterator[Row | Reject]) -> Iterator[list[Row | Reject]]:
    """Rows in lists of a block's length."""
    group: list[Row | Reject] = []
    for row in rows:
        group.append(row)
        if len(group) == BLOCK_ROWS:
            yield group
            group = []
    if group:
        yield group


def _csv(stream: Counted, source: Source) -> Iterator[Row | Reject]:
    """Rows under a header, which shows what parts the cells; a row of another width is a reject."""
    text = io.TextIOWrapper(
        io.BufferedReader(stream), "utf-8-sig", errors="surrogateescape", newline=""
    )
    blank = 0
    while (start := text.readline()) and not start.strip():
        blank += 1
    csv.field_size_limit(64 << 20)
    reader = csv.reader(
        itertools.chain(["\n"] * blank, [start], text),
        delimiter=max(",;\t|", key=start.count),
        strict=True,
    )
    rows = _csv_rows(reader, source)
    header = next((cells for cells in rows if cells), [])
    if isinstance(header, Reject):
        raise DataError(f"{source.name}: the header is not CSV ({header.sentence}); correct it")
    _refuse_twice(source, header)
    if any(map(_undecoded, header)):
        raise DataError(f"{source.name}: the header {header} is not UTF-8; save the file as UTF-8")
    for cells in rows:
        if isinstance(cells, Reject):
            yield cells
        elif not cells:
            continue
        elif len(cells) != len(header):
            yield Reject("invalid_csv", f"{len(cells)} cells under a header of {len(header)}")
        elif any(map(_undecoded, cells)):
            yield Reject("invalid_utf8", "a cell is not UTF-8")
        else:
            yield {name: cell for name, cell in zip(header, cells, strict=True) if cell}


def _csv_rows(reader: Any, source: Source) -> Iterator[list[str] | Reject]:
    """Rows of cells, the header first; a quote that is never closed is a DataError."""
    number = 0
    while True:
        line = reader.line_num + 1
        cells: list[str] | Reject
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if str(error) == UNCLOSED:
                raise DataError(
                    f"{source.name}: row {number} (line {line}) opens a quote that is never "
                    "closed, so all after it would be one cell; close it"
                ) from None
            cells = Reject("invalid_csv", str(error))
        yield cells
        number += cells != []


def _json(stream: Counted, source: Source) -> Iterator[Row | Reject]:
    """One array of rows, or an object that is a row or whose only list holds them."""
    data = stream.read(LARGEST_JSON + 1)
    if len(data) > LARGEST_JSON:
        raise DataError(f"{source.name}: over {LARGEST_JSON >> 20} MiB for one JSON; write JSONL")
    try:
        value = json.loads(
            data.removeprefix(codecs.BOM_UTF8), object_pairs_hook=_object, parse_constant=_constant
        )
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source.name}: not JSON ({error})") from None
    if isinstance(value, dict):
        value = _rows_in(value)
    for row in value if isinstance(value, list) else [value]:
        if isinstance(row, dict) and deeper(row, DEEPEST):
            yield Reject("invalid_json", TOO_DEEP)
        elif isinstance(row, dict):
            yield _fault(row) or row
        elif isinstance(row, Reject):
            yield row
        else:
            yield Reject("not_an_object", f"expected an object, got {type(row).__name__}")


def _rows_in(value: Row) -> list[Any]:
    """The rows in an object's only list, or the object itself where it is one."""
    lists = [inner for inner in value.values() if isinstance(inner, list)]
    rows = lists[0] if len(lists) == 1 else []
    objects = [row for row in rows if isinstance(row, dict | Reject)]
    shape = _shape(value)
    if shape == {"text"} and any(isinstance(row, dict) and _shape(row) for row in rows):
        shape = set()  # what is said about the rows
    return rows if objects and not shape else [value]


def _shape(row: Row) -> set[str]:
    """Keys of what a row is known as without a recipe; none where it is not known."""
    try:
        return set(recognise(row))
    except (UnknownShape, RecursionError):
        return set()


def _object(pairs: list[tuple[str, Any]]) -> Row | Reject:
    """An object, or in its place what is wrong with it, for its row to be rejected by."""
    try:
        return unique(pairs)
    except Reject as fault:
        return fault


def _constant(name: str) -> Reject:
    return Reject("not_finite", f"{name} is no JSON number")


def _fault(row: Row) -> Reject | None:
    """The first fault in a row, however deep it lies."""
    left: list[Any] = [row]
    while left:
        value = left.pop()
        if isinstance(value, Reject):
            return value
        if isinstance(value, dict | list):
            left += value.values() if isinstance(value, dict) else value
    return None


def _parquet(stream: Counted, source: Source) -> Iterator[Row | Reject]:
    """Row groups, one batch at a time; Parquet must be sought in, so a remote one is copied."""
    import pyarrow.parquet as pq

    with _seekable(stream, source) as file:
        parquet = pq.ParquetFile(file)
        _refuse_twice(source, parquet.schema_arrow.names)
        for batch in parquet.iter_batches(BLOCK_ROWS):
            yield from batch.to_pylist()


def _arrow(stream: Counted, source: Source) -> Iterator[Row | Reject]:
    """Arrow streams, as Hugging Face datasets writes them, and Arrow files."""
    with _seekable(stream, source) as file:
        try:
            reader = pa.ipc.open_stream(file)
        except pa.ArrowInvalid:
            file.seek(0)
            whole = pa.ipc.open_file(file)
            reader = (whole.get_batch(i) for i in range(whole.num_record_batches))
        for batch in reader:
            _refuse_twice(source, batch.schema.names)
            for start in range(0, len(batch), BLOCK_ROWS):
                yield from batch.slice(start, BLOCK_ROWS).to_pylist()


def _seekable(stream: Counted, source: Source) -> IO[bytes]:
    """The source as a file that can be sought in: itself, or a copy without its compression."""
    if not source.compression and not source.opener and source.path.startswith("file://"):
        return Path(source.path.removeprefix("file://")).open("rb")
    copy = tempfile.TemporaryFile()  # noqa: SIM115 - closed by the reader that asked for it
    while piece := stream.read(BLOCK_BYTES):
        copy.write(piece)
    copy.seek(0)
    return copy


def _refuse_twice(source: Source, columns: list[str]) -> None:
    """Raise DataError where one of two columns would be lost."""
    if len(set(columns)) < len(columns):
        raise DataError(f"{source.name}: a column stands twice in the header {columns}; rename one")


def _undecoded(text: str) -> bool:
    """True where a byte that is not UTF-8 was kept as half of a surrogate pair."""
    return not text.isascii() and any("\udc80" <= c <= "\udcff" for c in text)


def _paragraph(lines: list[str]) -> Row | Reject:
    text = "\n".join(lines)
    return Reject("invalid_utf8", "not UTF-8") if _undecoded(text) else {"text": text}


def _text(stream: Counted, source: Source) -> Iterator[Row | Reject]:
    """Paragraphs, parted by blank lines, as `{"text": ...}`."""
    paragraph: list[str] = []
    for line in io.TextIOWrapper(io.BufferedReader(stream), "utf-8-sig", errors="surrogateescape"):
        if line.strip():
            paragraph.append(line.rstrip("\n"))
        elif paragraph:
            yield _paragraph(paragraph)
            paragraph = []
    if paragraph:
        yield _paragraph(paragraph)


READERS = {"csv": _csv, "json": _json, "parquet": _parquet, "arrow": _arrow, "text": _text}
