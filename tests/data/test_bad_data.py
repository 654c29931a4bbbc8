"""What a data owner's disk can hold: one sentence and an exit code, or a row that is rejected."""

import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneloom.cli import main
from tuneloom.data.store import read_manifest

GOOD = b'{"prompt": "q1", "completion": "a1"}\n{"prompt": "q2", "completion": "a2"}\n'
Capture = pytest.CaptureFixture[str]


def ingest(tmp_path: Path, source: object, *more: str) -> int:
    root = [] if any(a.startswith("root=") for a in more) else [f"root={tmp_path}/sets"]
    return main(["ingest", "data.name=d", f"source={source}", *root, *more])


def said(capsys: Capture, code: int, expected: int = 3) -> str:
    text = capsys.readouterr().err
    assert code == expected and "Traceback" not in text, text
    return text


def test_a_json_file_is_held_to_the_rules_of_jsonl(tmp_path: Path) -> None:
    rows = (
        b'[{"text": "one", "text": "two"}, {"text": "a", "deep": [{"n": NaN}]}, {"text": "b"},'
        b' {"text": "c", "meta": {"k": 1, "k": 2}}]'
    )
    (tmp_path / "a.json").write_bytes(rows)
    assert ingest(tmp_path, tmp_path / "a.json", "data.max_rejected=1") == 0
    counts = read_manifest(tmp_path / "sets" / "d")["counts"]
    assert counts["rejected"] == {"duplicate_key": 2, "not_finite": 1} and counts["kept"] == 1


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "jsonl"])
def test_a_row_over_the_limit_is_rejected_from_every_kind_of_file(
    tmp_path: Path, kind: str
) -> None:
    rows = [{"prompt": "q" * length, "completion": "a"} for length in (5, 3000)]
    file = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif kind == "csv":
        file.write_text("prompt,completion\n" + "".join(f"{r['prompt']},a\n" for r in rows))
    else:
        file.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    assert ingest(tmp_path, file, "data.max_row_bytes=2000", "data.max_rejected=0.5") == 0
    counts = read_manifest(tmp_path / "sets" / "d")["counts"]
    assert counts["rejected"] == {"too_long": 1} and counts["kept"] == 1


def test_a_column_that_stands_twice_is_refused_in_parquet_as_in_csv(
    tmp_path: Path, capsys: Capture
) -> None:
    table = pa.table([pa.array(["one"]), pa.array(["two"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert "stands twice" in said(capsys, ingest(tmp_path, tmp_path / "a.parquet"))


def test_a_file_whose_name_is_not_utf8_is_named(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "raw").mkdir()
    with open(os.fsencode(tmp_path / "raw") + b"/a\xff.jsonl", "wb") as file:
        file.write(GOOD)
    assert "not UTF-8; rename" in said(capsys, ingest(tmp_path, tmp_path / "raw"))


def test_a_csv_header_that_is_not_utf8_is_refused(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "a.csv").write_bytes(b"prompt,completion,caf\xe9\nq,a,c\n")
    assert "save the file as UTF-8" in said(capsys, ingest(tmp_path, tmp_path / "a.csv"))


def test_an_empty_source_is_not_the_whole_folder(tmp_path: Path, capsys: Capture) -> None:
    assert "source: empty" in said(capsys, ingest(tmp_path, "''"), 2)


@pytest.mark.parametrize("root", ["raw.jsonl", "raw.jsonl/below", "/proc/none"])
def test_a_root_that_cannot_be_written_is_named(tmp_path: Path, capsys: Capture, root: str) -> None:
    (tmp_path / "raw.jsonl").write_bytes(GOOD)
    code = ingest(tmp_path, tmp_path / "raw.jsonl", f"root={tmp_path / root}")
    assert "cannot be written" in said(capsys, code, 2)


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path, capsys: Capture) -> None:
    """Every write to a file beyond the limit fails as on a full disk, for real, by the kernel."""
    import resource
    import signal

    (tmp_path / "raw.jsonl").write_bytes(
        b"".join(json.dumps({"text": os.urandom(90).hex()}).encode() + b"\n" for _ in range(999))
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        code = ingest(tmp_path, tmp_path / "raw.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert "cannot be written" in said(capsys, code, 4)
    assert list((tmp_path / "sets").iterdir()) == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a.txt"])
def test_utf16_is_named(tmp_path: Path, capsys: Capture, name: str) -> None:
    (tmp_path / name).write_bytes("\ufefftext\nrow\n".encode("utf-16"))
    assert f"{name}: is UTF-16; save the file as UTF-8" in said(
        capsys, ingest(tmp_path, tmp_path / name)
    )


def test_an_ingest_that_leaves_no_row_says_where_all_went(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "raw.jsonl").write_bytes(
        b"".join(json.dumps({"text": f"{i} " + "x " * 400}).encode() + b"\n" for i in range(3))
    )
    error = said(capsys, ingest(tmp_path, tmp_path / "raw.jsonl"))
    assert re.search(r"no row is left to train on.*\n  rows in +3\n  quarantined: .+ 3\n", error)
    assert list((tmp_path / "sets").glob("[!.]*")) == []


def test_a_folder_in_place_of_the_link_is_refused_before_anything_is_published(
    tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "raw.jsonl").write_bytes(GOOD)
    (tmp_path / "sets" / "d").mkdir(parents=True)
    assert "a folder stands where" in said(capsys, ingest(tmp_path, tmp_path / "raw.jsonl"))
    assert [path.name for path in (tmp_path / "sets").glob("[!.]*")] == ["d"]


def test_the_same_ingest_again_leaves_a_version_that_is_read_alone_and_replaces_a_damaged_one(
    tmp_path: Path,
) -> None:
    (tmp_path / "raw.jsonl").write_bytes(GOOD)
    assert ingest(tmp_path, tmp_path / "raw.jsonl") == 0
    (folder,) = (tmp_path / "sets").glob("d@*")
    shard, made = next(folder.glob("*.parquet")), folder.stat().st_ino
    content = shard.read_bytes()
    assert ingest(tmp_path, tmp_path / "raw.jsonl") == 0
    assert folder.stat().st_ino == made
    shard.write_bytes(content[:-1] + b"x")
    assert ingest(tmp_path, tmp_path / "raw.jsonl") == 0
    assert folder.stat().st_ino != made and shard.read_bytes() == content
    assert len(list((tmp_path / "sets").glob("[!.]*"))) == 2  # it and the link


@pytest.mark.parametrize("text", [b'{"title": "caf\xe9"}', b'{"not":' * 3000 + b"{}" + b"}" * 3000])
def test_a_schema_that_cannot_be_read_is_named(
    tmp_path: Path, capsys: Capture, text: bytes
) -> None:
    (tmp_path / "raw.jsonl").write_bytes(GOOD)
    (tmp_path / "schema.json").write_bytes(text)
    more = f"data.json_schema={tmp_path}/schema.json"
    assert "no JSON Schema" in said(capsys, ingest(tmp_path, tmp_path / "raw.jsonl", more), 2)


def test_mix_refuses_a_damaged_a_cut_and_a_missing_shard_and_a_broken_manifest(
    tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "raw.jsonl").write_bytes(GOOD)
    split = "data.split={train: 1.0, validation: 0.0, test: 0.0}"
    assert ingest(tmp_path, tmp_path / "raw.jsonl", split) == 0
    folder = (tmp_path / "sets" / "d").resolve()
    shard, mix = folder / "train-00000.parquet", [
        "mix", "name=m", f"root={tmp_path}/sets", f"parts=[{{dataset: {tmp_path}/sets/d}}]"
    ]  # fmt: skip
    whole = shard.read_bytes()
    flipped = bytearray(whole)
    flipped[60] ^= 1
    for data in (bytes(flipped), whole[:-20]):
        shard.write_bytes(data)
        assert "damaged" in said(capsys, main(mix))
    shard.unlink()
    assert "cannot be read" in said(capsys, main(mix))
    (folder / "manifest.json").write_text("{")
    assert "not a dataset manifest" in said(capsys, main(mix))


@pytest.mark.parametrize("verb", ["lineage", "erase"])
def test_an_id_of_digits_alone_is_an_id(tmp_path: Path, capsys: Capture, verb: str) -> None:
    where = [f"datasets={tmp_path}/sets", f"runs={tmp_path}/runs"]
    assert "no dataset holds '12345678'" in said(capsys, main([verb, "row=12345678", *where]))
    assert "no dataset holds '00000042'" in said(capsys, main([verb, "subject=00000042", *where]))


@pytest.mark.parametrize("verb", ["lineage", "erase"])
def test_a_dataset_that_cannot_be_read_is_named_before_a_row_is_said_to_be_nowhere(
    tmp_path: Path, capsys: Capture, verb: str
) -> None:
    (tmp_path / "raw.jsonl").write_bytes(GOOD)
    assert ingest(tmp_path, tmp_path / "raw.jsonl") == 0
    call = [verb, "row=abcdef12", f"datasets={tmp_path}/sets", f"runs={tmp_path}/runs"]
    folder = (tmp_path / "sets" / "d").resolve()
    for shard in folder.glob("t*-00000.parquet"):
        shard.write_bytes(shard.read_bytes()[:-20])
    assert "cannot be read" in said(capsys, main(call))
    for text in ("{}", "[1]", "{"):
        (folder / "manifest.json").write_text(text)
        assert "manifest.json" in said(capsys, main(call))


DECISIONS = [
    b"{", b"[", b"[1]", b'{"id": 1}', b'"x"', b"\xff\xfe", b'[{"fields": 1}]',
    b'[{"annotations": 3}]', b"[" * 20_000, b'{"id": 5, "decision": "approve", "by": "b"}',
]  # fmt: skip


@pytest.mark.parametrize("text", DECISIONS, ids=lambda text: text[:12].decode("latin1"))
def test_a_file_that_holds_no_decisions_is_named(
    tmp_path: Path, capsys: Capture, text: bytes
) -> None:
    (tmp_path / "file").write_bytes(text)
    golden = ["golden", "name=g", f"root={tmp_path}", "action=decide", "by=anna"]
    said(capsys, main([*golden, f"decisions={tmp_path}/file"]))
    assert "cannot be read" in said(capsys, main([*golden, f"decisions={tmp_path}/none"]))


def test_a_golden_set_stays_in_its_folder_and_a_cut_log_is_refused(
    tmp_path: Path, capsys: Capture
) -> None:
    golden = ["golden", f"root={tmp_path}/golden"]
    assert "name: expected" in said(capsys, main([*golden, "name=../../g"]), 2)
    (tmp_path / "raw.jsonl").write_bytes(GOOD)
    propose = ["name=g", "action=propose", f"source={tmp_path}/raw.jsonl", "by=anna"]
    assert main([*golden, *propose]) == 0
    log = tmp_path / "golden" / "g" / "events.jsonl"
    log.write_bytes(log.read_bytes()[:-9])
    assert "edited or cut off" in said(capsys, main([*golden, "name=g"]))
