"""Every kind of file gives the same rows, from a folder, a glob, compressed or not."""

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.dirty import jsonl
from tuneloom.config import build
from tuneloom.data.ingest import ingest
from tuneloom.data.recipe import IngestConfig
from tuneloom.errors import ConfigError, DataError

ROWS = [
    {"prompt": f"question {i}, with a comma", "completion": f'answer "{i}"\nsecond line'}
    for i in range(30)
]


def kept(tmp_path: Path, source: Any, **data: Any) -> list[str]:
    """The records of all splits, and the rejects' reasons when there are any."""
    mapping = {"data": {"name": "d", "max_rejected": 1.0, **data}, "source": source}
    folder = ingest(build(IngestConfig, mapping | {"root": str(tmp_path / "ds")}))
    rejects = [
        json.loads(x)["reason"] for x in (folder / "rejected.jsonl").read_text().splitlines()
    ]
    return (
        sorted(
            r for p in folder.glob("*-0*.parquet") for r in pq.read_table(p)["record"].to_pylist()
        )
        + rejects
    )


def write_csv(path: Path, delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_arrow(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, Any] = {
    "r.jsonl": lambda p: p.write_bytes(jsonl(ROWS)),
    "r.json": lambda p: p.write_text(json.dumps(ROWS)),
    "wrapped.json": lambda p: p.write_text(json.dumps({"version": 1, "data": ROWS})),
    "r.csv": lambda p: write_csv(p, ","),
    "semicolon.csv": lambda p: write_csv(p, ";"),
    "r.tsv": lambda p: write_csv(p, "\t"),
    "r.parquet": lambda p: pq.write_table(pa.Table.from_pylist(ROWS), p),
    "r.arrow": write_arrow,
    "r.jsonl.gz": lambda p: p.write_bytes(gzip.compress(jsonl(ROWS))),
    "r.jsonl.bz2": lambda p: p.write_bytes(bz2.compress(jsonl(ROWS))),
    "r.jsonl.xz": lambda p: p.write_bytes(lzma.compress(jsonl(ROWS))),
    "r.json.gz": lambda p: p.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_records(tmp_path: Path, name: str) -> None:
    reference = tmp_path / "reference.jsonl"
    reference.write_bytes(jsonl(ROWS))
    WRITERS[name](tmp_path / name)
    assert kept(tmp_path, str(tmp_path / name)) == kept(tmp_path, str(reference))


def test_zstandard_is_read_where_it_is_installed(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "r.jsonl.zst").write_bytes(zstandard.compress(jsonl(ROWS)))
    assert len(kept(tmp_path, str(tmp_path / "r.jsonl.zst"))) == 30


def test_folders_globs_and_lists_mean_the_same_files(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(jsonl(ROWS[:10]))
    (folder / "deep" / "b.jsonl").write_bytes(jsonl(ROWS[10:]))
    (folder / ".hidden.jsonl").write_bytes(b"{")
    (folder / "notes.pdf").write_bytes(b"%PDF")
    everything = kept(tmp_path, str(folder))
    assert len(everything) == 30
    assert kept(tmp_path, str(folder / "**" / "*.jsonl")) == everything
    assert kept(tmp_path, [str(folder / "deep" / "b.jsonl"), str(folder / "a.jsonl")]) == everything


def test_addresses_of_other_filesystems_are_read_through_fsspec(tmp_path: Path) -> None:
    with fsspec.open("memory://bucket/raw/a.jsonl", "wb") as file:
        file.write(jsonl(ROWS))
    assert len(kept(tmp_path, "memory://bucket/raw/*.jsonl")) == 30
    assert len(kept(tmp_path, "memory://bucket/raw")) == 30


def test_a_saved_hugging_face_dataset_is_a_folder_like_any_other(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "hf")
    assert len(kept(tmp_path, str(tmp_path / "hf"))) == 30


def test_text_files_are_read_by_paragraph(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("One line\nand its end.\n\n\nAnother paragraph.\n")
    assert kept(tmp_path, str(tmp_path / "book.txt")) == [
        '{"text":"Another paragraph."}', '{"text":"One line\\nand its end."}'
    ]  # fmt: skip


def test_a_csv_row_of_another_width_or_encoding_is_a_reject(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_bytes(b"prompt,completion\na,b\nonly one\nc,d\nx,caf\xe9\n")
    assert kept(tmp_path, str(tmp_path / "r.csv"))[2:] == ["invalid_csv", "invalid_utf8"]


def test_blank_lines_above_a_csv_header_are_no_header(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_bytes(b"\n  \r\nprompt;completion\na,b;c\n")
    (record,) = kept(tmp_path, str(tmp_path / "r.csv"))
    assert json.loads(record) == {"prompt": "a,b", "completion": "c"}


@pytest.mark.parametrize("name", ["bytes", "date", "zone"])
def test_a_table_that_python_cannot_hold_is_a_file_refused_by_name(
    tmp_path: Path, name: str
) -> None:
    binary = pa.array([b"caf\xe9"])
    column = {
        "bytes": pa.StringArray.from_buffers(1, *binary.buffers()[1:]),
        "date": pa.array([2**55], pa.timestamp("s")),
        "zone": pa.array([0], pa.timestamp("s", "Mars/Phobos")),
    }[name]
    (tmp_path / "raw").mkdir()
    pq.write_table(pa.table({"text": column}), tmp_path / "raw" / "bad.parquet")
    (tmp_path / "raw" / "good.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"bad\.parquet: cannot be read as parquet"):
        kept(tmp_path, str(tmp_path / "raw"))
    mapping = {"data": {"name": "d"}, "source": str(tmp_path / "raw"), "root": str(tmp_path / "d"),
               "max_refused_files": 1}  # fmt: skip
    manifest = json.loads((ingest(build(IngestConfig, mapping)) / "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["refused_files"]] == ["bad.parquet"]


def test_a_csv_whose_quote_is_never_closed_is_refused_by_row_and_line(tmp_path: Path) -> None:
    rows = [
        "prompt,completion",
        '"q one","answer\none"',
        'q two here,"answer two',
        "q3,a3",
        "q4,a4",
    ]
    (tmp_path / "r.csv").write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"r\.csv: row 2 \(line 4\) opens a quote that is never"):
        kept(tmp_path, str(tmp_path / "r.csv"))
    (tmp_path / "r.csv").write_text('"prompt,completion\na,b\n')
    with pytest.raises(DataError, match=r"r\.csv: row 0 \(line 1\) opens a quote that is never"):
        kept(tmp_path, str(tmp_path / "r.csv"))


def test_a_csv_quote_that_closes_in_another_row_is_a_reject_and_in_the_header_an_error(
    tmp_path: Path,
) -> None:
    (tmp_path / "r.csv").write_text('prompt,completion\nq1,"a1\nq2,"a2"\nq3,a3 of 5" pipe\n')
    assert kept(tmp_path, str(tmp_path / "r.csv")) == [
        '{"completion":"a3 of 5\\" pipe","prompt":"q3"}', "invalid_csv"
    ]  # fmt: skip
    (tmp_path / "r.csv").write_text('"prompt"s,completion\na,b\n')
    with pytest.raises(DataError, match=r"r\.csv: the header is not CSV"):
        kept(tmp_path, str(tmp_path / "r.csv"))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.rar").write_bytes(b"Rar!")
    with pytest.raises(DataError, match="is of no kind that is read here"):
        kept(tmp_path, str(tmp_path / "a.rar"))
    with pytest.raises(DataError, match="no file at"):
        kept(tmp_path, str(tmp_path / "nowhere" / "*.jsonl"))
    with pytest.raises(ConfigError, match="cannot be reached"):
        kept(tmp_path, "nosuchprotocol://bucket/raw.jsonl")
    (tmp_path / "b.json").write_text("[1, 2")
    with pytest.raises(DataError, match=r"b\.json: not JSON"):
        kept(tmp_path, str(tmp_path / "b.json"))


ALPACA = {"instruction": "Translate", "input": "hola", "output": "hello"}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}],
    "system": "Be.",
}
OPENAI = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


def test_common_chat_exports_need_no_mapping(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_bytes(jsonl([ALPACA, SHAREGPT, OPENAI]))
    assert kept(tmp_path, str(tmp_path / "r.jsonl")) == [
        '{"completion":"hello","prompt":"Translate\\n\\nhola"}',
        '{"messages":[{"content":"Be.","role":"system"},{"content":"hi","role":"user"},'
        '{"content":"ho","role":"assistant"}]}',
        '{"messages":[{"content":"hi","role":"user"},{"content":"ho","role":"assistant"}]}',
    ]


ANIMAL = {"prompt": "q", "completion": "a"}


@pytest.mark.parametrize(
    ("value", "records"),
    [
        ({"id": 7, **SHAREGPT}, 1),
        ({**ANIMAL, "tags": ["animal"]}, 1),
        ({**ANIMAL, "sources": [{"url": "x"}, {"url": "y"}]}, 1),
        ({"version": 1, "data": [ANIMAL, {**ANIMAL, "prompt": "p"}]}, 2),
        ({"conversations": [SHAREGPT, ALPACA]}, 2),
    ],
)
def test_one_json_object_is_a_record_or_holds_records(
    tmp_path: Path, value: dict[str, Any], records: int
) -> None:
    (tmp_path / "r.json").write_text(json.dumps(value))
    found = kept(tmp_path, str(tmp_path / "r.json"))
    assert len(found) == records
    assert all(record.startswith("{") for record in found), "a list's item became a reject"


def test_rows_in_an_object_are_rows_whatever_stands_between_them(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(
        json.dumps({"data": [ANIMAL, None, {**ANIMAL, "prompt": "p"}]})
    )
    assert len(kept(tmp_path, str(tmp_path / "r.json"))) == 3  # two records, one reject
    (tmp_path / "n.json").write_text(json.dumps({"text": "of these rows", "rows": [ANIMAL]}))
    found = kept(tmp_path / "n", str(tmp_path / "n.json"))
    assert len(found) == 1 and "of these rows" not in found[0]


def test_a_mapping_reads_any_other_export(tmp_path: Path) -> None:
    ticket = {
        "id": 7, "meta": {"tags": ["a", "b"], "lang": None},
        "thread": [{"by": "customer", "text": "It {broke}"}, {"by": "agent", "text": "Fixed"}],
    }  # fmt: skip
    record = {
        "messages": {
            "each": "thread",
            "make": {
                "role": {"choose": "{by}", "among": {"customer": "user", "agent": "assistant"}},
                "content": "{text}",
            },
        }
    }  # fmt: skip
    (tmp_path / "r.jsonl").write_bytes(
        jsonl([ticket, {**ticket, "thread": [{"by": "bot", "text": "x"}]}])
    )
    assert kept(tmp_path, str(tmp_path / "r.jsonl"), record=record) == [
        '{"messages":[{"content":"It {broke}","role":"user"},'
        '{"content":"Fixed","role":"assistant"}]}',
        "unknown_shape",
    ]
    flat = {"text": "{{ticket {id}: {thread.1.text} ({meta.tags}) {meta.lang?}|{nothing?}}}"}
    assert (
        kept(tmp_path, str(tmp_path / "r.jsonl"), record=flat)[0]
        == '{"text":"{ticket 7: Fixed (a, b) |}"}'
    )
    (tmp_path / "r.jsonl").write_bytes(jsonl([{"text": "x"}, {"text": None}, {}]))
    assert (
        kept(tmp_path, str(tmp_path / "r.jsonl"), record={"text": "{text}"})
        == ['{"text":"x"}'] + ["missing_field"] * 2
    )
    with pytest.raises(ConfigError, match=r"data\.record\.text: a brace without its pair"):
        kept(tmp_path, str(tmp_path / "r.jsonl"), record={"text": "{oops"})


@pytest.mark.parametrize("name", ["r.parquet", "r.arrow"])
def test_a_broken_columnar_file_is_a_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not what it says" * 100)
    with pytest.raises(DataError, match=f"{name}: cannot be read as"):
        kept(tmp_path, str(tmp_path / name))


def test_a_line_without_end_is_one_reject_and_the_next_row_is_kept(tmp_path: Path) -> None:
    with (tmp_path / "r.jsonl").open("wb") as file:
        file.write(b'{"text": "')
        for _ in range(90):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"text": "good"}\n')
    assert kept(tmp_path, str(tmp_path / "r.jsonl")) == ['{"text":"good"}', "too_long"]
