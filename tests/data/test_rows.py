"""Rows: random access to raw JSONL and dataset folders, and one sentence for every bad file."""

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneloom.data.records import canonical, content_id
from tuneloom.data.rows import _columns, open_rows
from tuneloom.errors import DataError


def write_dataset(folder: Path, contents: list[dict[str, Any]], shard_rows: int = 3) -> Path:
    """A dataset folder as `tuneloom ingest` lays it out, with one split, train."""
    folder.mkdir(parents=True)
    shards = []
    for number, start in enumerate(range(0, len(contents), shard_rows)):
        part = contents[start : start + shard_rows]
        table = pa.table(
            {
                "id": [content_id(c) for c in part],
                "record": [canonical(c) for c in part],
                "source": [f"source-{(start + i) % 2}" for i in range(len(part))],
                "meta": ["{}"] * len(part),
            }
        )
        file = folder / f"train-{number:05d}.parquet"
        pq.write_table(table, file)
        sha = hashlib.sha256(file.read_bytes()).hexdigest()
        shards.append({"file": file.name, "rows": len(part), "sha256": sha})
    split = {"rows": len(contents), "shards": shards}
    manifest = {"name": "n", "id": "i", "splits": {"train": split}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


TEXTS = [{"text": f"row {i}"} for i in range(10)]


def test_a_row_of_one_byte_is_a_bad_row_and_not_a_blank_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\r\n{"text": "a"}\r\n\n7\n')
    rows = open_rows(file)
    assert len(rows) == 2 and rows[0].content == {"text": "a"}
    with pytest.raises(DataError, match=r"rows\.jsonl:4: expected a JSON object a row, got 7"):
        rows[1]


@pytest.mark.parametrize("place", ["name", "split", "file"])
def test_a_manifest_names_nothing_outside_its_folder(tmp_path: Path, place: str) -> None:
    folder = write_dataset(tmp_path / "d", TEXTS, shard_rows=10)
    manifest = json.loads((folder / "manifest.json").read_text())
    if place == "name":
        manifest["name"] = "../other"
    elif place == "split":
        manifest["splits"]["../other@id/train"] = manifest["splits"]["train"]
    else:
        manifest["splits"]["train"]["shards"][0]["file"] = "/etc/passwd"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="not a dataset manifest"):
        open_rows(folder)


def test_a_shards_text_may_pass_2_gib(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", TEXTS, shard_rows=10)
    columns = _columns(folder / "train-00000.parquet")
    assert {column.type for column in columns.values()} == {pa.large_string()}
    assert open_rows(folder)[7].content == TEXTS[7]


def test_raw_jsonl_is_read_at_random(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in TEXTS))
    rows = open_rows(file)
    assert len(rows) == 10
    assert [rows[i].content for i in (9, 0, 5)] == [TEXTS[9], TEXTS[0], TEXTS[5]]
    assert (rows.source(3), rows.where(3)) == ("rows.jsonl", f"{file}:4")


def test_blank_lines_crlf_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n\n{"text": "b"}\r\n{"text": "c"}\n\n')
    rows = open_rows(file)
    assert [rows[i].content["text"] for i in range(len(rows))] == ["a", "b", "c"]
    assert rows.where(1) == f"{file}:4"


def test_lines_may_cross_the_chunks_of_the_scan(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    contents = [{"text": "x" * (400_000 + i)} for i in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in contents))
    rows = open_rows(file)
    assert [len(rows[i].content["text"]) for i in range(8)] == [400_000 + i for i in range(8)]


def test_the_digest_follows_the_content_and_not_the_path(tmp_path: Path) -> None:
    for name, text in {"a": "one", "b": "one", "c": "two"}.items():
        (tmp_path / name).write_text(json.dumps({"text": text}))
    a, b, c = (open_rows(tmp_path / name).digest for name in "abc")
    assert a == b != c


def test_a_large_file_is_not_held_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    line = json.dumps({"text": "x" * 10_000}) + "\n"
    file.write_text(line * 5_000)
    tracemalloc.start()
    rows = open_rows(file)
    assert rows[4_999].content["text"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 2**20 < file.stat().st_size / 9


BAD_FILES = {
    "empty": (b"", "the file is empty"),
    "blank": (b"\n\n\n", "only blank lines"),
    "broken": (b'{"text": "a"}\n{"text": \n', "rows.jsonl:2: broken JSON at column 10"),
    "latin-1": (b'{"text": "caf\xe9"}\n', r"rows.jsonl:1: invalid UTF-8 at byte 13 .*0xe9"),
    "unknown role": (
        b'\n{"messages": [{"role": "bot", "content": "x"}]}',
        r"rows.jsonl:2: messages\[0\].role: expected one of",
    ),
    "10 MB row": (
        b'{"text": "a"}\n{"text": "' + b"x" * 10_000_000 + b'"}\n',
        "rows.jsonl:2: the row has 10,000,012 bytes, at most 4,194,304",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_sentence_with_its_line(name: str, tmp_path: Path) -> None:
    content, expected = BAD_FILES[name]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=expected):
        rows = open_rows(file)
        [rows[i] for i in range(len(rows))]


def test_a_missing_path_names_the_version_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file or folder; set data.path"):
        open_rows(tmp_path / "nothing")
    write_dataset(tmp_path / "debian@abc", TEXTS)
    with pytest.raises(DataError, match=r"did you mean '.*debian@abc'"):
        open_rows(tmp_path / "debian")


def test_a_table_is_sent_to_ingest(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(DataError, match="run tuneloom ingest"):
        open_rows(tmp_path / "rows.csv")


def test_a_dataset_folder_and_its_link_give_the_same_rows(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "debian@abc", TEXTS)
    (tmp_path / "debian").symlink_to("debian@abc")
    rows, linked = open_rows(folder), open_rows(tmp_path / "debian")
    assert len(rows) == len(linked) == 10 and rows.digest == linked.digest
    assert [rows[i].content for i in range(10)] == TEXTS
    assert rows[7].id == content_id(TEXTS[7])
    assert rows.source(4) == rows[4].source == "source-0"
    assert rows.where(4) == f"{folder}/train-00001.parquet:1"
    with pytest.raises(IndexError):
        rows[10]


def test_a_damaged_shard_is_found_before_a_row_is_read(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", TEXTS)
    shard = folder / "train-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"train-00001.parquet: damaged"):
        open_rows(folder)
    with pytest.raises(DataError, match=r"train-00001.parquet: not a readable shard"):
        open_rows(folder, verify=False)[4]
    shard.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        open_rows(folder)


def test_a_folder_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest.json"):
        open_rows(tmp_path)
    (tmp_path / "manifest.json").write_text('{"splits": {"train": {}}}')
    with pytest.raises(DataError, match="not a dataset manifest"):
        open_rows(tmp_path)
    folder = write_dataset(tmp_path / "d", TEXTS)
    with pytest.raises(DataError, match=r"no split 'test'; it has \['train'\]"):
        open_rows(folder, split="test")
