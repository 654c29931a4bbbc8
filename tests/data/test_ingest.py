"""Ingest as a user sees it: files in, a dataset folder out, every row accounted for."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data import dirty
from tests.data.dirty import chat
from tuneloom.config import build
from tuneloom.data import recognisers
from tuneloom.data.ingest import ingest
from tuneloom.data.recipe import IngestConfig
from tuneloom.data.records import parse
from tuneloom.data.rows import open_rows
from tuneloom.data.store import draft_in
from tuneloom.errors import ConfigError, DataError

SPLITS = ("train", "validation", "test")


def run(tmp_path: Path, source: Any, root: str = "datasets", workers: int = 1, **data: Any) -> Path:
    mapping = {"data": {"name": "d", **data}, "source": source, "workers": workers}
    return ingest(build(IngestConfig, mapping | {"root": str(tmp_path / root)}))


def write(path: Path, lines: list[str | bytes | dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = [
        x if isinstance(x, bytes) else (x if isinstance(x, str) else json.dumps(x)).encode()
        for x in lines
    ]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return str(path)


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def rows(folder: Path, split: str) -> list[dict[str, Any]]:
    shards = manifest(folder)["splits"][split]["shards"]
    return [row for shard in shards for row in pq.read_table(folder / shard["file"]).to_pylist()]


def all_rows(folder: Path) -> list[dict[str, Any]]:
    return [row for split in SPLITS for row in rows(folder, split)]


def accounted(counts: dict[str, Any]) -> int:
    fates = ("rejected", "deduplicated", "quarantined")
    return int(counts["kept"] + sum(sum(counts[fate].values()) for fate in fates))


def test_good_rows_are_the_same_bytes_beside_bad_ones(tmp_path: Path) -> None:
    good = [chat(f"question {i}", f"answer {i}") for i in range(50)]
    mixed_in = [
        x for i, row in enumerate(good) for x in (row, dirty.SHAPES[i % len(dirty.SHAPES)][1])
    ]
    clean = run(tmp_path, write(tmp_path / "clean" / "raw.jsonl", good), root="clean_out")
    source = write(tmp_path / "dirty" / "raw.jsonl", mixed_in)
    mixed = run(tmp_path, source, max_rejected=1.0, max_row_bytes=dirty.MAX_ROW)
    contents = [[(r["id"], r["record"]) for r in all_rows(folder)] for folder in (clean, mixed)]
    assert contents[0] == contents[1]


def test_too_many_rejects_end_the_ingest_with_a_table_of_reasons(tmp_path: Path) -> None:
    lines = [chat(f"q{i}", "a") for i in range(97)] + ["{", "{", '{"text": ""}']
    with pytest.raises(DataError, match=r"3 of 100 rows were rejected, over 1.00%") as caught:
        run(tmp_path, write(tmp_path / "raw.jsonl", lines))
    assert caught.value.exit_code == 3
    assert "invalid_json" in str(caught.value)
    assert not list((tmp_path / "datasets").glob("*")), "a refused ingest must leave nothing behind"


def test_an_empty_file_is_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        run(tmp_path, write(tmp_path / "raw.jsonl", []))


def test_blank_lines_crlf_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "raw.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n   \n{"text": "two"}')
    folder = run(tmp_path, str(path))
    assert manifest(folder)["counts"]["in"] == 2
    assert sorted(json.loads(r["meta"])["line"] for r in all_rows(folder)) == [1, 4]


def test_training_reads_every_row_that_ingest_keeps(tmp_path: Path) -> None:
    lines = [chat(f"q{i}", f"a{i}") for i in range(40)]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    lines.append({"messages": [{"role": "user", "content": "x"}, answer]})
    folder = run(
        tmp_path,
        write(tmp_path / "raw.jsonl", lines),
        split={"train": 1.0, "validation": 0, "test": 0},
    )
    opened = open_rows(folder)
    assert len(opened) == 41
    for i in range(len(opened)):
        assert opened[i].id == parse(opened[i].content).id


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "x"]), "content": json_values}
)
raw_rows = st.one_of(
    st.fixed_dictionaries({"messages": st.lists(turns, max_size=4)}),
    st.fixed_dictionaries({"text": st.text(alphabet=st.characters(), max_size=30)}),
    st.fixed_dictionaries({"prompt": st.text(max_size=5), "completion": st.text(max_size=5)}),
    st.fixed_dictionaries({"instruction": json_values, "output": json_values}),
    json_values,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(raw_rows | st.binary(max_size=40), min_size=1, max_size=30))
def test_rows_in_are_kept_rejected_deduplicated_or_quarantined(
    tmp_path: Path, raw: list[Any]
) -> None:
    lines = [
        x.replace(b"\n", b" ") if isinstance(x, bytes) else json.dumps(x).encode() for x in raw
    ]
    lines.append(b'{"text": "a row that is kept"}')
    lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")  # of a file, and no part of its first line
    expected = sum(1 for line in lines if line.strip())
    lines[0] = b"\xef\xbb\xbf" + lines[0]
    source = write(tmp_path / "raw.jsonl", lines)
    folder = run(tmp_path, source, max_rejected=1.0, conflicts="quarantine")
    counts = manifest(folder)["counts"]
    assert counts["in"] == expected == accounted(counts)
    kept = all_rows(folder)
    assert len(kept) == counts["kept"] == len({row["id"] for row in kept})
    for row in kept:
        assert parse(json.loads(row["record"])).id == row["id"]


def fuzzed(count: int, seed: int) -> list[bytes]:
    """Rows with bytes flipped, cut, doubled and inserted."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        row = bytearray(
            json.dumps(chat(f"question {i} ünï", f"answer {i}"), ensure_ascii=False).encode()
        )
        for _ in range(rng.randrange(4)):
            at = rng.randrange(len(row))
            match rng.randrange(4):
                case 0:
                    row[at] = rng.randrange(256)
                case 1:
                    del row[at : at + rng.randrange(1, 20)]
                case 2:
                    row[at:at] = row[at : at + 9]
                case 3:
                    row[at:at] = rng.choice(
                        [b"\\ud800", b"\x00", b"NaN", b"[" * 50, b'"', b"\\u0000"]
                    )
            row = row or bytearray(b"{")
        made.append(bytes(row).replace(b"\n", b" "))
    return made


def test_a_hundred_thousand_fuzzed_rows_raise_nothing_and_add_up(tmp_path: Path) -> None:
    lines = fuzzed(100_000, seed=1)
    folder = run(tmp_path, write(tmp_path / "raw.jsonl", lines), max_rejected=1.0)
    counts = manifest(folder)["counts"]
    assert counts["in"] == sum(1 for line in lines if line.strip()) == accounted(counts)
    assert sum(counts["rejected"].values()) > 10_000
    assert counts["kept"] > 10_000


def test_the_link_points_at_the_newest_version(tmp_path: Path) -> None:
    source = write(tmp_path / "raw.jsonl", [chat("a", "b")])
    first = run(tmp_path, source)
    write(tmp_path / "raw.jsonl", [chat("a", "c")])
    second = run(tmp_path, source)
    link = tmp_path / "datasets" / "d"
    assert first != second
    assert link.resolve() == second.resolve()
    assert os.readlink(link) == second.name, "relative, so the folder can be moved"


def test_ingests_of_one_dataset_at_once_leave_it_whole(tmp_path: Path) -> None:
    source = write(tmp_path / "raw.jsonl", [{"text": f"row {i}"} for i in range(50)])
    words = ["-m", "tuneloom", "ingest", "data.name=d", f"source={source}", f"root={tmp_path}/ds"]
    at_once = [subprocess.Popen([sys.executable, *words]) for _ in range(4)]
    assert [process.wait(timeout=120) for process in at_once] == [0] * 4
    link, folder = sorted((tmp_path / "ds").glob("[!.]*"))
    assert link.resolve() == folder and len(open_rows(link)) == 49
    assert [path.name for path in (tmp_path / "ds").glob(".*")] == [".lock"]


def test_rows_of_one_key_share_a_split_and_labels_are_balanced(tmp_path: Path) -> None:
    lines = [
        {"text": f"row {i}", "who": f"user{i // 4}", "kind": f"k{i // 4 % 5}"} for i in range(4000)
    ]
    split = {"train": 0.8, "validation": 0.1, "test": 0.1}
    folder = run(
        tmp_path, write(tmp_path / "raw.jsonl", lines), key="{who}", label="{kind}", split=split
    )
    sides: dict[str, set[str]] = {}
    for name in SPLITS:
        for row in rows(folder, name):
            sides.setdefault(json.loads(row["meta"])["key"], set()).add(name)
    assert len(sides) == 1000
    assert all(len(side) == 1 for side in sides.values())
    for by_split in manifest(folder)["labels"].values():
        assert by_split == {"train": 640, "validation": 80, "test": 80}


def test_without_labels_a_row_keeps_its_split_when_others_come(tmp_path: Path) -> None:
    few = run(
        tmp_path, write(tmp_path / "a.jsonl", [{"text": f"t{i}"} for i in range(500)]), root="a"
    )
    many = run(
        tmp_path, write(tmp_path / "b.jsonl", [{"text": f"t{i}"} for i in range(900)]), root="b"
    )
    place = {r["id"]: s for s in SPLITS for r in rows(many, s)}
    assert all(place[r["id"]] == s for s in SPLITS for r in rows(few, s))


def test_within_keeps_only_the_keys_of_the_other_datasets_split(tmp_path: Path) -> None:
    lines = [{"name": f"n{i}", "about": f"about {i}", "kind": f"k{i % 3}"} for i in range(600)]
    source = write(tmp_path / "raw.jsonl", lines)
    answers = {"prompt": "{name}", "completion": "{kind}"}
    task = run(tmp_path, source, root="task", record=answers, key="{name}", label="{kind}")
    text = run(tmp_path, source, root="text", record={"text": "{about}"}, key="{name}",
               within={"dataset": str(task), "split": "train"}, split={"seed": 1})  # fmt: skip
    train = {json.loads(r["meta"])["key"] for r in rows(task, "train")}
    assert {json.loads(r["meta"])["key"] for r in all_rows(text)} == train
    counts = manifest(text)["counts"]
    assert counts["quarantined"] == {"held_out": 600 - len(train)}
    assert manifest(text)["created_from"][0] == {"dataset": task.name, "split": "train"}


def test_conflicting_answers_are_set_aside_together(tmp_path: Path) -> None:
    lines = [chat("same?", "yes"), chat("same?", "no"), chat("other?", "yes")]
    source = write(tmp_path / "raw.jsonl", lines)
    folder = run(tmp_path, source, conflicts="quarantine")
    assert manifest(folder)["counts"]["quarantined"] == {"label_conflict": 2}
    aside = pq.read_table(folder / "set_aside.parquet").to_pylist()
    assert sorted(json.loads(a["record"])["messages"][1]["content"] for a in aside) == ["no", "yes"]
    listed = run(tmp_path, source, root="listed")
    assert manifest(listed)["label_conflicts"] == 2
    assert manifest(listed)["counts"]["kept"] == 3


def test_of_equal_rows_the_most_trusted_source_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "raw" / "a_crowd.jsonl", [chat("q", "a")])
    write(tmp_path / "raw" / "b_expert.jsonl", [chat("q", "a")])
    provenance = [{"match": "b_*", "trust": 90}, {"match": "*", "trust": 10}]
    folder = run(tmp_path, str(tmp_path / "raw"), provenance=provenance)
    assert [row["source"] for row in all_rows(folder)] == ["b_expert.jsonl"]
    aside = pq.read_table(folder / "set_aside.parquet").to_pylist()
    assert [(a["source"], a["reason"]) for a in aside] == [("a_crowd.jsonl", "exact")]


def test_of_equal_rows_the_one_that_allows_the_use_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "raw" / "a.jsonl", [chat("q", "a")])
    write(tmp_path / "raw" / "b.jsonl", [chat("q", "a")])
    provenance = [{"match": "a*", "trust": 90, "licence": "CC-BY-NC-4.0"},
                  {"match": "b*", "trust": 10, "licence": "MIT"}]  # fmt: skip
    folder = run(tmp_path, str(tmp_path / "raw"), provenance=provenance, use="commercial",
                 licence_action="drop")  # fmt: skip
    assert [row["source"] for row in all_rows(folder)] == ["b.jsonl"]


def test_an_empty_label_is_no_class(tmp_path: Path) -> None:
    lines: list[Any] = [chat("q", "a") | {"topic": "red"}, chat("r", "b")]
    source = write(tmp_path / "raw.jsonl", lines)
    assert list(manifest(run(tmp_path, source, label="{topic?}"))["labels"]) == ["red"]


def test_what_a_killed_ingest_left_is_removed_by_the_next_and_what_lives_is_not(
    tmp_path: Path,
) -> None:
    root = tmp_path / "datasets"
    code = (
        "import os, pathlib, sys; from tuneloom.data.store import draft_in\n"
        "with draft_in(pathlib.Path(sys.argv[1])) as d: (d / 'texts').write_text('x'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(root)]).returncode == 9
    assert list(root.glob(".draft-*/texts"))
    with draft_in(root) as living:
        run(tmp_path, write(tmp_path / "raw.jsonl", [chat("q", "a")]))
        assert [path for path in root.glob(".draft-*") if path.is_dir()] == [living]
    assert not list(root.glob(".draft-*"))


def test_weak_rows_are_set_aside_with_the_reason(tmp_path: Path) -> None:
    lines = [chat("q1", "N/A"), chat("q2", "x"), chat("q3", "spam " * 500),
             chat("q4", "Привет, как дела"),
             chat("q5", "A good answer.")]  # fmt: skip
    quality = {"min_answer_characters": 2, "scripts": ["latin"]}
    folder = run(tmp_path, write(tmp_path / "raw.jsonl", lines), quality=quality)
    expected = {"placeholder": 1, "short": 1, "repetition": 1, "script": 1}
    assert manifest(folder)["counts"]["quarantined"] == expected
    assert manifest(folder)["counts"]["kept"] == 1


def test_sources_that_do_not_allow_the_use_are_listed_dropped_or_refused(tmp_path: Path) -> None:
    write(tmp_path / "raw" / "free.jsonl", [chat("a", "b"), chat("c", "d")])
    write(tmp_path / "raw" / "nc.jsonl", [chat("e", "f")])
    write(tmp_path / "raw" / "old.jsonl", [chat("g", "h")])
    provenance = [
        {"match": "free*", "licence": "CC-BY-4.0"},
        {"match": "nc*", "licence": "CC-BY-NC-4.0"},
        {"match": "old*", "licence": "MIT", "consent": "consent", "consent_until": "2025-01-31"},
    ]
    options = {"provenance": provenance, "as_of": "2025-06-01"}
    listed = manifest(run(tmp_path, str(tmp_path / "raw"), **options))["licence"]
    assert listed["effective"] == "CC-BY-4.0 AND CC-BY-NC-4.0 AND MIT"
    assert [b["source"] for b in listed["blockers"]] == ["nc.jsonl", "old.jsonl"]
    assert listed["rows_to_drop"] == 2
    dropped = manifest(run(tmp_path, str(tmp_path / "raw"), licence_action="drop", **options))
    assert dropped["counts"]["quarantined"] == {"licence": 2}
    assert dropped["licence"]["effective"] == "CC-BY-4.0"
    assert dropped["licence"]["blockers"] == []
    with pytest.raises(DataError, match="2 rows do not allow commercial use"):
        run(tmp_path, str(tmp_path / "raw"), licence_action="fail", **options)
    research = manifest(run(tmp_path, str(tmp_path / "raw"), use="research", **options))["licence"]
    assert [b["source"] for b in research["blockers"]] == ["old.jsonl"]


def test_a_name_that_is_no_folder_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.name"):
        run(tmp_path, write(tmp_path / "raw.jsonl", [chat("a", "b")]), name="../../etc")


def test_a_zstandard_file_that_is_cut_inside_a_frame_is_refused_and_whole_frames_are_all_read(
    tmp_path: Path,
) -> None:
    zstandard = pytest.importorskip("zstandard")
    frames = [
        zstandard.compress(b"".join(b'{"text": "%d %d"}\n' % (i, j) for j in range(20_000)))
        for i in range(3)
    ]
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"note"
    path = tmp_path / "r.jsonl.zst"
    path.write_bytes(frames[0] + skipped + frames[1] + frames[2])
    assert manifest(run(tmp_path, str(path)))["counts"]["in"] == 60_000
    for cut in (frames[0][: len(frames[0]) // 2], frames[0] + frames[1] + frames[2][:12]):
        path.write_bytes(cut)
        with pytest.raises(DataError, match=r"r\.jsonl\.zst: cannot be uncompressed \(ends inside"):
            run(tmp_path, str(path))
    path.write_bytes(zstandard.compress(b" " * (300 << 20), 1))
    with pytest.raises(DataError, match="as a bomb does"):
        run(tmp_path, str(path))


def test_a_damaged_gzip_is_a_sentence_and_a_bomb_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(
        "".join(json.dumps({"text": f"{i}"}) + "\n" for i in range(9999)).encode()
    )
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-2000])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz: cannot be uncompressed"):
        run(tmp_path, str(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b" " * (300 << 20), 1))
    with pytest.raises(DataError, match="as a bomb does"):
        run(tmp_path, str(tmp_path / "bomb.jsonl.gz"))


def test_rows_that_break_the_owners_schema_are_rejected(tmp_path: Path) -> None:
    schema = {
        "type": "object",
        "required": ["who"],
        "properties": {"age": {"type": "integer", "minimum": 0}},
    }
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    lines = [
        {"text": "a", "who": "x", "age": 3},
        {"text": "b"},
        {"text": "c", "who": "y", "age": -987654},
    ]
    source = write(tmp_path / "raw.jsonl", lines)
    options = {"json_schema": str(tmp_path / "schema.json"), "max_rejected": 1.0}
    folder = run(tmp_path, source, **options)
    rejected = [json.loads(x) for x in (folder / "rejected.jsonl").read_text().splitlines()]
    assert [(r["line"], r["reason"], r["why"]) for r in rejected] == [
        (2, "schema", "row: breaks 'required' of the schema"),
        (3, "schema", "age: breaks 'minimum' of the schema"),
    ]
    (tmp_path / "schema.json").write_text('{"type": 7}')
    with pytest.raises(ConfigError, match=r"data\.json_schema: .* is no JSON Schema"):
        run(tmp_path, source, **options)
    (tmp_path / "schema.json").write_text('{"$ref": "https://example.com/schema.json"}')
    with pytest.raises(ConfigError, match=r"refers to https://example\.com/schema\.json"):
        run(tmp_path, source, **options)


def test_patterns_of_the_tenants_schema_are_searched_for_in_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recognisers, "PATIENCE_SECONDS", 0.5)
    source = write(tmp_path / "raw.jsonl", [{"text": "x 1"}, {"text": "y" + "a" * 60}])
    options = {"json_schema": str(tmp_path / "schema.json"), "max_rejected": 1.0}

    def schema(pattern: str) -> None:
        kept = {"properties": {"text": {"pattern": pattern}}}
        (tmp_path / "schema.json").write_text(json.dumps(kept))

    schema(r"\d")
    folder = run(tmp_path, source, **options)
    [rejected] = map(json.loads, (folder / "rejected.jsonl").read_text().splitlines())
    assert rejected["why"] == "text: breaks 'pattern' of the schema"
    schema("(a|aa)+b")
    with pytest.raises(ConfigError, match=r"data\.json_schema: '\(a\|aa\)\+b' took over"):
        run(tmp_path, source, **options)
