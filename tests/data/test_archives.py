"""Archives: their files are rows like any others, and a hostile one is a sentence and no more."""

import gzip
import io
import random
import struct
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.data.dirty import jsonl
from tuneloom.config import build
from tuneloom.data.ingest import ingest
from tuneloom.data.readers import read_blocks
from tuneloom.data.recipe import IngestConfig
from tuneloom.data.rows import open_rows
from tuneloom.data.sources import find_sources
from tuneloom.data.store import read_manifest
from tuneloom.errors import DataError

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(30)]
CAP = 1 << 20


FILES = {
    "a.jsonl": jsonl(ROWS[:10]),
    "deep/b.jsonl.gz": gzip.compress(jsonl(ROWS[10:20]), mtime=0),
    "deep/c.csv": b"prompt,completion\n" + b"".join(
        f"question {i},answer {i}\n".encode() for i in range(20, 30)
    ),
    "deep/notes.pdf": b"%PDF", "__MACOSX/._a.jsonl": b"\0\5\26\7",
}  # fmt: skip


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("deep")
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred(files: dict[str, bytes], mode: str = "w:") -> bytes:
    members = [(tarfile.TarInfo(name), data) for name, data in files.items()]
    return tar_of([(tarfile.TarInfo("./"), None), *members], mode)


def tar_of(members: list[tuple[tarfile.TarInfo, bytes | None]], mode: str = "w:") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for info, data in members:
            info.size = len(data or b"")
            if info.name == "./":
                info.type = tarfile.DIRTYPE
            archive.addfile(info, None if data is None else io.BytesIO(data))
    return buffer.getvalue()


GOOD: dict[str, Callable[[], bytes]] = {
    "r.zip": lambda: zipped(FILES), "r.tar": lambda: tarred(FILES),
    "r.tar.gz": lambda: tarred(FILES, "w:gz"), "r.TGZ": lambda: tarred(FILES, "w:gz"),
    "r.tar.bz2": lambda: tarred(FILES, "w:bz2"), "r.txz": lambda: tarred(FILES, "w:xz"),
}  # fmt: skip


def made(tmp_path: Path, source: str, **more: Any) -> dict[str, Any]:
    """The manifest of a dataset made from one address."""
    mapping = {"data": {"name": "d"}, "source": source, "root": str(tmp_path / "sets"), **more}
    return read_manifest(ingest(build(IngestConfig, mapping)))


@pytest.mark.parametrize("name", GOOD)
def test_the_files_of_an_archive_give_the_rows_that_the_files_give(
    tmp_path: Path, name: str
) -> None:
    for file, data in FILES.items():
        path = tmp_path / "raw" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / name).write_bytes(GOOD[name]())
    unpacked = made(tmp_path, str(tmp_path / "raw"))
    packed = made(tmp_path, str(tmp_path / name))
    assert packed["counts"] == unpacked["counts"] and packed["counts"]["kept"] == 30
    named = [
        [(s["name"].removeprefix(f"{name}/"), s["sha256"], s["rows"]) for s in m["created_from"]]
        for m in (packed, unpacked)
    ]
    assert named[0] == named[1] and len(named[0]) == 3
    assert ids(tmp_path, packed) == ids(tmp_path, unpacked)


def ids(tmp_path: Path, manifest: dict[str, Any]) -> set[str]:
    """The record ids of a training split."""
    rows = open_rows(tmp_path / "sets" / f"d@{manifest['id']}")
    return {rows[i].id for i in range(len(rows))}


def test_a_zstandard_tar_and_an_archive_on_another_filesystem_are_read(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "r.tar.zst").write_bytes(zstandard.compress(tarred(FILES)))
    assert made(tmp_path, str(tmp_path / "r.tar.zst"))["counts"]["kept"] == 30
    with fsspec.open("memory://archives/r.zip", "wb") as file:
        file.write(zipped(FILES))
    assert made(tmp_path, "memory://archives")["counts"]["kept"] == 30


def entry(name: str, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def linked(name: str, target: str, kind: bytes) -> bytes:
    return tar_of([(entry(name, type=kind, linkname=target), None)])


def zip_entry(name: str, *, mode: int = 0, data: bytes = b"{}", flags: int = 0) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        info = zipfile.ZipInfo("placeholder")
        info.filename, info.external_attr = name, mode << 16
        info.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(info, data)
    packed = bytearray(buffer.getvalue())
    packed[packed.rfind(b"PK\1\2") + 8] |= flags
    return bytes(packed)


def overlapping() -> bytes:
    """Two entries of the table that point at one member's bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jsonl", jsonl(ROWS))
        archive.filelist.append(archive.filelist[0])
        archive._didModify = True  # type: ignore[attr-defined]
    packed = buffer.getvalue()
    at = packed.rfind(b"PK\1\2")
    return packed[:at] + packed[at:].replace(b"a.jsonl", b"b.jsonl")


def damaged() -> bytes:
    """A tar whose second header is damaged, which tarfile takes for the end."""
    packed = bytearray(tarred({"a.jsonl": b"{}", "b.jsonl": b"{}"}))
    at = packed.index(b"b.jsonl")
    packed[at + 100] ^= 0xFF
    return bytes(packed)


def pax(text: bytes) -> bytes:
    """A member with this extended header."""
    header = entry("x", type=tarfile.XHDTYPE)
    return tar_of([(header, text), (entry("a.jsonl"), b"{}")])


def sparse() -> bytes:
    """512 bytes that say they are a terabyte."""
    info = entry("a.jsonl", type=tarfile.GNUTYPE_SPARSE)
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    head[483:495] = struct.pack(">Q", 1 << 40).rjust(12, b"\0")
    head[483] = 0o200
    head[148:156] = b"        "
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + bytes(1024)


BOMB = b"0" * (1 << 28)
ATTACKS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "tar dots": ("tar", lambda: tarred({"a/../../x.jsonl": b"{}"}), "leads out of it"),
    "tar absolute": ("tar", lambda: tar_of([(entry("/tmp/x.jsonl"), b"{}")]), "leads out"),
    "tar symlink": ("tar", lambda: linked("a.jsonl", "/etc/passwd", tarfile.SYMTYPE), "a link"),
    "tar hardlink": ("tar", lambda: linked("a.jsonl", "../x", tarfile.LNKTYPE), "a link"),
    "tar device": ("tar", lambda: linked("a.jsonl", "", tarfile.CHRTYPE), "is no file"),
    "tar pipe": ("tar", lambda: linked("a.jsonl", "", tarfile.FIFOTYPE), "is no file"),
    "tar twice": ("tar", lambda: tar_of([(entry("a.jsonl"), b"{}")] * 2), "twice"),
    "tar sparse": ("tar", sparse, "is sparse"),
    "tar damaged": ("tar", damaged, "damaged or cut off at byte"),
    "tar cut": ("tar", lambda: tarred({"a.jsonl": b"{}" * 9999})[:2000], "cut off"),
    "tar no end": ("tar", lambda: tarred({"a.jsonl": b"{}"})[:1536], "damaged or cut off"),
    "tar header": ("tar", lambda: pax(b"9" * 9000), "its table is over 8,192 bytes"),
    "tar digits": ("tar", lambda: pax(b"9" * 4000), "a number of 64 digits"),
    "tar negative": ("tar", lambda: pax(b"14 size=-512\n\n"), "cannot be read|follow|damaged"),
    "tar large": ("tar.gz", lambda: gzip.compress(random.Random(0).randbytes(2 * CAP)), "max_"),
    "tar total": ("tar", lambda: tarred({f"{i}": bytes(CAP // 4) for i in range(5)}), "max_"),
    "tar nested": ("tar", lambda: tarred({"a.zip": b"PK"}), "an archive in an archive"),
    "tar empty": ("tar", lambda: tarred({}), "holds no file of a kind"),
    "tar nothing": ("tar", lambda: b"", "cannot be read as tar"),
    "tar newline": ("tar", lambda: tarred({"a\n.jsonl": b"{}"}), "no name for a file"),
    "zip dots": ("zip", lambda: zip_entry("../x.jsonl"), "leads out of it"),
    "zip folder": ("zip", lambda: zip_entry("../x/"), "leads out of it"),
    "zip absolute": ("zip", lambda: zip_entry("/x.jsonl"), "leads out of it"),
    "zip drive": ("zip", lambda: zip_entry("C:x.jsonl"), "no name for a file"),
    "zip backslash": ("zip", lambda: zip_entry("..\\x.jsonl"), "no name for a file"),
    "zip symlink": ("zip", lambda: zip_entry("a.jsonl", mode=0o120777), "a link"),
    "zip device": ("zip", lambda: zip_entry("a.jsonl", mode=0o020666), "is no file"),
    "zip secret": ("zip", lambda: zip_entry("a.jsonl", flags=1), "is encrypted"),
    "zip bomb": ("zip", lambda: zip_entry("a.jsonl", data=BOMB[: 1 << 26]), "more than 200 times"),
    "zip overlap": ("zip", overlapping, "overlap"),
    "zip many": ("zip", lambda: zipped({f"{i}.txt": b"" for i in range(10_001)}), "than 10,000"),
    "zip nothing": ("zip", lambda: b"PK\3\4", "cannot be read as zip"),
}  # fmt: skip


def read_all(path: Path) -> int:
    """Rows of an archive by the way that ingest reads them, within CAP."""
    blocks = read_blocks(find_sources([str(path)]), [], max_archive_bytes=CAP)
    return sum(len(b.rows) if b.rows is not None else b.lines.count(b"\n") for b in blocks)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_archive_is_refused_in_one_sentence_that_names_it(
    tmp_path: Path, name: str
) -> None:
    kind, attack, said = ATTACKS[name]
    (tmp_path / f"r.{kind}").write_bytes(attack())
    with pytest.raises(DataError, match=f"(?s)^r.{kind}.*({said})") as caught:
        read_all(tmp_path / f"r.{kind}")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 3


def test_ingest_of_a_hostile_archive_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "r.tar.gz").write_bytes(gzip.compress(tarred(FILES)))
    with pytest.raises(DataError, match="max_archive_bytes"):
        made(tmp_path, str(tmp_path / "r.tar.gz"), max_archive_bytes=4096)
    (tmp_path / "bomb.tar.gz").write_bytes(gzip.compress(BOMB, 9))
    with pytest.raises(DataError, match="grows more than 200 times"):
        made(tmp_path, str(tmp_path / "bomb.tar.gz"))
    assert not list((tmp_path / "sets").iterdir())


class Watched(io.BytesIO):
    """A temporary file whose largest size is kept."""

    peak = 0

    def write(self, data: Any) -> int:
        written = super().write(data)
        Watched.peak = max(Watched.peak, self.tell())
        return written


NAMES = ["a.jsonl", "b/c.csv", "../e.jsonl", "/tmp/e.jsonl", "a/./b.jsonl", "..", ".", "",
         "x/../y", "CON", "a\0b.jsonl", "C:\\e.jsonl", "é.jsonl", "\udcff.jsonl", "n" * 300,
         "a.tar", "d/"]  # fmt: skip


def generated(seed: int) -> tuple[str, bytes]:
    """An archive of hostile members, or an honest one with some of its bytes changed."""
    draw = random.Random(seed)
    kind = draw.choice(["zip", "tar", "tar.gz"])
    files = {draw.choice(NAMES): draw.randbytes(draw.choice([0, 3, 700])) for _ in range(3)}
    files |= {"k.jsonl": draw.choice([jsonl(ROWS), b"0" * draw.choice([10, 5 * CAP // 4])])}
    if kind == "zip":
        packed = zip_entry(
            draw.choice(NAMES).replace("\udcff", "\x80"), mode=draw.choice([0, 0o120777, 0o060666])
        )
        packed = draw.choice([packed, zipped(FILES)])
    else:
        types = [tarfile.REGTYPE] * 5 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.GNUTYPE_SPARSE,
                 tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.CHRTYPE, b"\xff"]  # fmt: skip
        packed = tar_of([
            (entry(n, type=draw.choice(types), linkname=draw.choice(NAMES)), d)
            for n, d in files.items()
        ])  # fmt: skip
    changed = bytearray(packed)
    for _ in range(draw.choice([0, 1, 1, 2, 8])):
        changed[draw.randrange(len(changed))] = draw.choice([0, 1, 0x2F, 0x80, 0xFF])
    cut = bytes(changed[: draw.choice([len(changed)] * 4 + [draw.randrange(len(changed))])])
    return kind, gzip.compress(cut, 1) if kind == "tar.gz" else cut


def test_five_thousand_hostile_archives_write_no_file_and_stay_under_the_cap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", Watched)
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    opened = list(written_by(range(5_000), tmp_path))
    fates = Counter(opened)
    assert [path.name for path in tmp_path.rglob("*")] == ["inside"]
    assert not Path("/tmp/e.jsonl").exists()
    assert 0 < Watched.peak <= CAP
    assert fates["refused"] > 3_000 and fates["read"] > 300, fates


def written_by(seeds: range, folder: Path) -> Iterator[str]:
    """What became of each generated archive; anything but rows or a DataError fails the test."""
    for seed in seeds:
        kind, packed = generated(seed)
        path = folder / f"r.{kind}"
        path.write_bytes(packed)
        try:
            read_all(path)
            yield "read"
        except DataError as error:
            assert str(error).startswith(("r.", "source:")), (seed, error)
            yield "refused"
        path.unlink()
