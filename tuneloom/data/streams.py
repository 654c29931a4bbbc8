"""A raw file as a stream of plain bytes, hashed as it passes, refusing to grow like a bomb."""

import codecs
import hashlib
import io
import tarfile
import zipfile
import zlib
from typing import Any

import fsspec

from tuneloom.data.sources import Source
from tuneloom.errors import ConfigError, DataError

BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError)
"""What the readers of zip and tar raise; RuntimeError for what they do not implement, too."""
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
FRAME_PIECE = 1 << 10
"""Bytes given to zstandard at once; four may stand for 128 KiB, so all of it for 32 MiB."""
TEXT_KINDS = ("lines", "csv", "json", "text")
MAX_EXPANSION = 200
"""Times that a compressed file may grow; text stays below 20, a bomb is near deflate's 1,000."""


class Counted(io.RawIOBase):
    """A source's bytes, uncompressed; its digest is of the file as it lies there."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.raw = source.open()
        self.sha, self.read_raw, self.given = hashlib.sha256(), 0, 0
        self.plain: Any = self._uncompressed() if source.compression else None

    def _uncompressed(self) -> Any:
        """The file's bytes through what uncompresses them."""
        kind = self.source.compression
        try:
            if kind == "zstd":
                return io.BufferedReader(_Frames(_Hashing(self)))
            return fsspec.compression.compr[kind](_Hashing(self), mode="rb")
        except (ImportError, KeyError):
            raise ConfigError(
                f"source: {self.source.name} needs {kind}; pip install 'tuneloom[data]'"
            ) from None

    def __enter__(self) -> "Counted":
        return self

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; raises DataError for a bomb or a broken stream."""
        if self.plain is None:
            data = self.take(size)
        else:
            try:
                data = self.plain.read(size)
            except Exception as error:  # zlib, lzma, bz2 and zstandard have an error class each
                raise DataError(f"{self.source.name}: cannot be uncompressed ({error})") from error
        if not self.given and data[:2] in UTF16 and self.source.kind in TEXT_KINDS:
            raise DataError(f"{self.source.name}: is UTF-16; save the file as UTF-8")
        self.given += len(data)
        if self.given > MAX_EXPANSION * max(self.read_raw, 1 << 20):
            raise DataError(
                f"{self.source.name}: grows more than {MAX_EXPANSION} times when uncompressed, "
                "as a bomb does; unpack it yourself if it is meant"
            )
        return bytes(data)

    def take(self, size: int) -> bytes:
        """The file's own bytes, counted and hashed."""
        try:
            data = bytes(self.raw.read(size))
        except BROKEN as error:
            raise DataError(f"{self.source.name}: cannot be read ({error})") from None
        self.sha.update(data)
        self.read_raw += len(data)
        return data

    def finish(self) -> tuple[str, int]:
        """sha256 and size of the whole file, read to its end."""
        while self.take(1 << 20):
            pass
        return self.sha.hexdigest(), self.read_raw

    def __exit__(self, *_: object) -> None:
        self.raw.close()


class _Hashing(io.RawIOBase):
    """What a decompressor reads from."""

    def __init__(self, counted: Counted) -> None:
        self.counted = counted

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self.counted.take(size)


class _Frames(io.RawIOBase):
    """Zstandard, frame after frame; its own reader takes a frame that is cut off for the end."""

    def __init__(self, packed: _Hashing) -> None:
        import zstandard

        self.packed = packed
        self.context = zstandard.ZstdDecompressor()
        self.frame: Any = None
        """The one that is open; None between two."""
        self.left, self.ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            piece = self.left or self.packed.read(FRAME_PIECE)
            if not piece and self.frame:
                raise EOFError("ends inside a frame")
            if not piece:
                return 0
            self.frame = self.frame or self.context.decompressobj()
            self.ready = memoryview(self.frame.decompress(piece))
            self.left = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size
