"""The files inside a zip or tar, read where they lie: nothing is unpacked under a name of theirs.

A zip's members are streamed out of it. A compressed tar becomes one nameless temporary file, within
a cap, because its members cannot be sought otherwise. An archive with anything in it that a set of
raw files does not need (links, devices, paths that lead out, two members of one name, an archive in
an archive) is refused whole, in one sentence.
"""

import io
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import IO, Any

from tuneloom.data.sources import ARCHIVES, Source, compression_of, is_hidden, kind_of
from tuneloom.data.streams import BROKEN, MAX_EXPANSION, Counted
from tuneloom.errors import DataError

MOST_MEMBERS = 10_000
LARGEST_ZIP_TABLE = 4 << 20
"""Bytes; what 90,000 members with names of one letter take."""
LARGEST_TAR_HEADER = 8 << 10
"""Bytes of a member's extended header; a path has at most 4,096."""
LONGEST_NUMBER = re.compile(rb"\d{64}")
"""tarfile before Python 3.11.10 takes quadratic time over a run of digits (CVE-2024-6232)."""
FREE_EXPANSION = 1 << 20
"""Bytes that a zip's member may hold however well it is packed."""
CHUNK = 1 << 20
BAD_NAME = re.compile("[\x00-\x1f\x7f\ud800-\udfff\\\\]|^[A-Za-z]:")
LINK, REGULAR, KIND = 0o120000, 0o100000, 0o170000
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
ENCRYPTED = 0x1
MEANT = "unpack it yourself if it is meant"


@dataclass(frozen=True)
class Member:
    """A regular file in an archive; `at` is zipfile's or tarfile's own account of it."""

    name: str
    size: int
    at: Any


def parts_of(source: Source, max_bytes: int) -> Iterator[Source]:
    """The source itself, or the files of a known kind in it, by name, while the archive is open."""
    if source.kind not in ARCHIVES.values():
        yield source
        return
    with Archive(source, max_bytes) as archive:
        found = 0
        for member in sorted(archive.members, key=lambda member: member.name):
            kind = kind_of(member.name)
            if kind is None or is_hidden(member.name):
                continue
            if kind in ARCHIVES.values():
                archive.refuse(f"{member.name!r} is an archive in an archive")
            found += 1
            yield replace(
                source, name=f"{source.name}/{member.name}", kind=kind,
                compression=compression_of(member.name), opener=partial(archive.open, member),
            )  # fmt: skip
        if not found:
            raise DataError(f"{source.name}: holds no file of a kind that is read here")


class Archive:
    """One archive, open; all its members are checked before a byte of any is given."""

    def __init__(self, source: Source, max_bytes: int) -> None:
        self.name, self.kind, self.max_bytes = source.name, source.kind, max_bytes
        self.file = Bounded(_seekable(source, max_bytes), source)
        self.handle: Any = None
        try:
            self.members = list(self._checked())
        except (*BROKEN, OSError, RecursionError, ValueError, LookupError, OverflowError) as error:
            self.file.close()
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self.name}: cannot be read as {self.kind} ({error})") from None
        self.file.limit = None

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def open(self, member: Member) -> IO[bytes]:
        """The bytes of one member."""
        try:
            opened = (self.handle.open if self.kind == "zip" else self.handle.extractfile)(
                member.at
            )
        except (*BROKEN, ValueError) as error:
            raise DataError(f"{self.name}: {member.name!r} cannot be read ({error})") from None
        return opened

    def refuse(self, why: str) -> None:
        """Raise DataError: the archive and what is wrong with it."""
        raise DataError(f"{self.name}: {why}; {MEANT}")

    def _checked(self) -> Iterator[Member]:
        """Every member that is a file, by the rules that zip and tar share."""
        names: set[str] = set()
        total = 0
        for count, (member, folder) in enumerate(
            self._zip() if self.kind == "zip" else self._tar()
        ):
            if count >= MOST_MEMBERS:
                self.refuse(f"holds more than {MOST_MEMBERS:,} members")
            self._refuse_name(member.name.rstrip("/") if folder else member.name)
            if folder:
                continue
            if member.name in names:
                self.refuse(f"holds {member.name!r} twice")
            names.add(member.name)
            total += member.size
            if total > self.max_bytes:
                self.refuse(f"holds more than {self.max_bytes:,} bytes, which is max_archive_bytes")
            yield member

    def _zip(self) -> Iterator[tuple[Member, bool]]:
        """Members in the order of their bytes, and which are folders."""
        self.handle = zipfile.ZipFile(self.file)
        end = 0
        for info in sorted(self.handle.infolist(), key=lambda info: info.header_offset):
            name, mode = info.filename, info.external_attr >> 16 & KIND
            if info.header_offset < end:
                self.refuse("its members overlap, as a bomb's do")
            end = info.header_offset + info.compress_size
            if info.orig_filename != name:  # cut at a zero byte
                self.refuse(f"{info.orig_filename[:60]!r} is no name for a file")
            if mode not in (0, REGULAR) and not info.is_dir():
                self.refuse(f"{name[:60]!r} is {'a link' if mode == LINK else 'no file'}")
            if info.flag_bits & ENCRYPTED:
                self.refuse(f"{name[:60]!r} is encrypted")
            if info.compress_type not in METHODS:
                self.refuse(f"{name[:60]!r} is packed by method {info.compress_type}, not deflate")
            if info.file_size > FREE_EXPANSION + MAX_EXPANSION * info.compress_size:
                self.refuse(f"{name[:60]!r} grows more than {MAX_EXPANSION} times, as a bomb does")
            yield Member(name, info.file_size, info), info.is_dir()

    def _tar(self) -> Iterator[tuple[Member, bool]]:
        """Members in their order, and which are folders; the end mark must be there."""
        self.handle = tarfile.TarFile(fileobj=self.file)
        before = -1
        for info in self.handle:
            if info.offset <= before or info.size < 0:  # backwards without end: CVE-2025-8194
                self.refuse("its members do not follow one another")
            before = info.offset
            if info.issym() or info.islnk() or not (info.isreg() or info.isdir()):
                what = "a link" if info.issym() or info.islnk() else "no file"
                self.refuse(f"{info.name[:60]!r} is {what}")
            if info.issparse():
                self.refuse(f"{info.name[:60]!r} is sparse")
            if info.isreg() and info.offset_data + info.size > self.file.size:
                self.refuse(f"{info.name[:60]!r} is cut off")
            yield Member(info.name, info.size, info), info.isdir()
        # tarfile takes a damaged header for the end, and what comes after it would be lost.
        self.file.seek(self.handle.offset)
        if (mark := self.file.read(tarfile.BLOCKSIZE)).strip(b"\0") or not mark:
            self.refuse(f"is damaged or cut off at byte {self.handle.offset:,}")

    def _refuse_name(self, name: str) -> None:
        """Names stay below the folder on every system."""
        parts = name.split("/")
        if name.startswith("/") or ".." in parts:
            self.refuse(f"{name[:60]!r} leads out of it")
        if BAD_NAME.search(name) or len(name) > 1000 or not parts[-1]:
            self.refuse(f"{name[:60]!r} is no name for a file")


class Bounded(io.RawIOBase):
    """An archive's file that gives only so much at once while its tables are read."""

    def __init__(self, file: IO[bytes], source: Source) -> None:
        self.file, self.name, self.kind = file, source.name, source.kind
        self.size = file.seek(0, io.SEEK_END)
        file.seek(0)
        self.limit: int | None = LARGEST_ZIP_TABLE if self.kind == "zip" else LARGEST_TAR_HEADER
        """None once all members are known."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def read(self, size: int = -1) -> bytes:
        if self.limit is None:
            return self.file.read(size)
        data = self.file.read(self.limit + 1 if size < 0 else min(size, self.limit + 1))
        if len(data) > self.limit:
            raise DataError(f"{self.name}: its table is over {self.limit:,} bytes; {MEANT}")
        if self.kind == "tar" and size > tarfile.BLOCKSIZE and LONGEST_NUMBER.search(data):
            raise DataError(f"{self.name}: a number of 64 digits in a header; {MEANT}")
        return data

    def close(self) -> None:
        self.file.close()
        super().close()


def _seekable(source: Source, max_bytes: int) -> IO[bytes]:
    """The archive itself, or a compressed tar as a nameless file of at most `max_bytes`."""
    if source.compression is None:
        return source.open()
    copy = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the archive
    try:
        with Counted(source) as stream:
            while piece := stream.read(CHUNK):
                if copy.tell() + len(piece) > max_bytes:
                    raise DataError(f"{source.name}: holds more than {max_bytes:,} bytes, which is "
                                    "max_archive_bytes")  # fmt: skip
                copy.write(piece)
    except BaseException:
        copy.close()
        raise
    return copy
