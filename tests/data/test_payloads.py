"""Preference, classification and extraction: one form, one rendering, and every fault by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tuneloom.config import build
from tuneloom.data.ingest import ingest
from tuneloom.data.payloads import prompt_and_answer
from tuneloom.data.recipe import IngestConfig
from tuneloom.data.records import canonical, parse
from tuneloom.data.render import Renderer
from tuneloom.data.rows import open_rows
from tuneloom.errors import DataError
from tuneloom.evals.tasks import as_row
from tuneloom.testing import Gang, metrics, small_config

PAIR = {"prompt": "q?", "chosen": "good", "rejected": "bad"}
LABELLED = {"input": "I love it", "label": "pos", "labels": ["pos", "neg"]}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "year": {"type": "integer"}},
    "required": ["city"],
}
EXTRACTED = {"input": "Kyoto in 1994", "schema": SCHEMA, "answer": {"year": 1994, "city": "Kyoto"}}


def made(tmp_path: Path, rows: list[dict[str, Any]], **data: Any) -> Path:
    """The dataset folder of these rows."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mapping = {"data": {"name": "d", "max_rejected": 1.0, **data}, "root": str(tmp_path / "sets")}
    return ingest(build(IngestConfig, mapping | {"source": str(tmp_path / "raw.jsonl")}))


def reasons(folder: Path) -> list[str]:
    lines = (folder / "rejected.jsonl").read_text().splitlines()
    return [json.loads(line)["reason"] for line in lines]


def kept(folder: Path) -> list[dict[str, Any]]:
    tables = [pq.read_table(shard) for shard in sorted(folder.glob("*-0*.parquet"))]
    return [json.loads(record) for t in tables for record in t["record"].to_pylist()]


def test_each_payload_has_one_form_whatever_the_order_of_labels_or_the_spelling_of_json() -> None:
    assert parse(PAIR).kind == "preference"
    turned = {**LABELLED, "labels": ["neg", "pos"]}
    assert parse(LABELLED).id == parse(turned).id
    assert parse(LABELLED).content["labels"] == ["neg", "pos"]
    spelt = {**EXTRACTED, "schema": json.dumps(SCHEMA, indent=2), "answer": ' {"city":"Kyoto",\n'
             '"year": 1994}'}  # fmt: skip
    assert parse(spelt).id == parse(EXTRACTED).id


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.one_of(
    st.builds(
        lambda texts, q: {"prompt": q, "chosen": texts[0], "rejected": texts[1]},
        st.lists(TEXT, min_size=2, max_size=2, unique=True), TEXT,
    ),
    st.lists(TEXT, min_size=2, max_size=5, unique=True).flatmap(
        lambda labels: st.builds(
            lambda text, label: {"input": text, "label": label, "labels": labels},
            TEXT, st.sampled_from(labels),
        )
    ),
    st.builds(
        lambda text, answer: {"input": text, "schema": {}, "answer": answer},
        TEXT, st.dictionaries(TEXT, VALUES, max_size=4),
    ),
)  # fmt: skip


@given(ROWS)
def test_reading_a_record_again_changes_neither_content_nor_id(row: dict[str, Any]) -> None:
    try:
        record = parse(row)
    except DataError as error:
        assert "noncharacter" in str(error)
        return
    again = parse(json.loads(canonical(record.content)))
    assert (again.id, again.content, again.kind) == (record.id, record.content, record.kind)


FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("same_answers", {**PAIR, "rejected": "good"}, "neither is better"),
    ("empty", {**PAIR, "chosen": " "}, "chosen: empty"),
    ("wrong_type", {**PAIR, "rejected": 3}, "rejected: expected text"),
    ("unknown_label", {**LABELLED, "label": "maybe"}, "is none of labels"),
    ("labels", {**LABELLED, "labels": ["pos"]}, "two or more"),
    ("labels", {**LABELLED, "labels": ["pos", "pos", "neg"]}, "each once"),
    ("wrong_type", {**LABELLED, "labels": "pos"}, "expected a list of texts"),
    ("empty", {**LABELLED, "input": ""}, "input: empty"),
    ("wrong_type", {**EXTRACTED, "answer": 3}, "expected a JSON object or list"),
    ("wrong_type", {**EXTRACTED, "schema": ["x"]}, "an object"),
    ("invalid_json", {**EXTRACTED, "answer": "{"}, "answer: no JSON"),
]


@pytest.mark.parametrize(("code", "row", "said"), FAULTS)
def test_a_fault_is_a_sentence_for_training_and_a_counted_reject_for_ingest(
    tmp_path: Path, code: str, row: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=rf"^rows:3: .*{said}"):
        parse(row, where="rows:3")
    assert reasons(made(tmp_path, [PAIR, row])) == [code]


def test_half_a_payload_and_two_at_once_are_refused_by_name() -> None:
    with pytest.raises(DataError, match="preference needs the key 'rejected'"):
        parse({"prompt": "q", "chosen": "a"})
    with pytest.raises(DataError, match="classification needs the key 'label'"):
        parse({"input": "q", "labels": ["a", "b"]})
    with pytest.raises(DataError, match="classification and extraction at once"):
        parse({**LABELLED, **EXTRACTED})


def nested(levels: int) -> dict[str, Any]:
    """A schema of so many definitions that each name the next twice."""
    steps = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(levels)}
    return {"$ref": "#/$defs/d0", "$defs": {**steps, f"d{levels}": {}}}


@pytest.mark.parametrize(
    ("schema", "answer", "code"),
    [
        (SCHEMA, {"year": 1994}, "schema"),
        (SCHEMA, {"city": "Kyoto", "year": "1994"}, "schema"),
        ({"type": "nonsense"}, {}, "no_schema"),
        ({"$ref": "https://example.com/schema"}, {}, "no_schema"),
        ({"$ref": "#"}, {}, "no_schema"),
        ({"properties": {"a": {"pattern": "(a+)+$"}}}, {"a": "a" * 40 + "!"}, "no_schema"),
        (nested(25), {}, "no_schema"),
    ],
)
def test_an_answer_that_breaks_its_schema_or_a_schema_that_breaks_ingest_is_a_reject(
    tmp_path: Path, schema: dict[str, Any], answer: dict[str, Any], code: str
) -> None:
    row = {"input": "x", "schema": schema, "answer": answer}
    assert reasons(made(tmp_path, [EXTRACTED, row])) == [code]


def test_the_schema_of_many_rows_is_followed_afresh_for_each(tmp_path: Path) -> None:
    schema = nested(8)  # 511 references an answer, 51,100 in all
    rows = [{"input": f"x{i}", "schema": schema, "answer": {"n": i}} for i in range(100)]
    assert len(kept(made(tmp_path, rows))) == 100


def test_labels_split_alike_conflict_by_task_and_may_be_named_none(tmp_path: Path) -> None:
    labels = ["none", "spam"]
    rows = [{"input": f"mail number {i}", "label": labels[i % 2], "labels": labels}
            for i in range(200)]  # fmt: skip
    topic = {"input": "mail number 0", "label": "work", "labels": ["work", "home"]}
    other = {**rows[0], "label": "spam"}
    folder = made(tmp_path, [*rows, topic, other, rows[1]])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["counts"]["deduplicated"] == {"exact": 1}
    assert manifest["counts"]["quarantined"] == {}
    assert manifest["label_conflicts"] == 2  # mail 0 as none and as spam; its topic is no conflict
    assert manifest["labels"]["none"]["train"] == pytest.approx(90, abs=2)
    assert set(manifest["labels"]) == {"none", "spam", "work"}


def test_a_pair_turned_round_is_a_conflict_and_another_pair_of_the_prompt_is_none(
    tmp_path: Path,
) -> None:
    third = {**PAIR, "chosen": "better"}
    manifest = json.loads((made(tmp_path, [PAIR, third]) / "manifest.json").read_text())
    assert manifest["label_conflicts"] == 0
    turned = {**PAIR, "chosen": "bad", "rejected": "good"}
    manifest = json.loads((made(tmp_path, [PAIR, third, turned]) / "manifest.json").read_text())
    assert manifest["label_conflicts"] == 2


def test_personal_data_is_masked_on_both_sides_of_an_extraction(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"mail": {"type": "string"}}}
    row = {"input": "write to ann@example.com", "schema": schema,
           "answer": {"mail": "ann@example.com"}}  # fmt: skip
    (content,) = kept(made(tmp_path, [row]))
    assert "ann@example.com" not in json.dumps(content)
    assert content["answer"]["mail"] in content["input"]
    closed = {**row, "schema": {"properties": {"mail": {"enum": ["a", "ann@example.com"]}}}}
    assert reasons(made(tmp_path / "b", [closed, row])) == []
    fixed = {**row, "schema": {"properties": {"mail": {"maxLength": 3}}}}
    assert reasons(made(tmp_path / "c", [fixed, row])) == ["schema"]


@pytest.mark.parametrize("row", [LABELLED, EXTRACTED])
def test_labels_and_extractions_train_as_the_prompt_and_answer_that_are_scored(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast], row: dict[str, Any]
) -> None:
    renderer = Renderer(make_tokenizer())
    record = parse(row)
    prompt, answer = prompt_and_answer(record.content)
    pair = parse({"prompt": prompt, "completion": answer})
    ours, theirs = renderer.render(record), renderer.render(pair)
    assert ours.ids.tolist() == theirs.ids.tolist()
    assert ours.target.tolist() == theirs.target.tolist()
    assert renderer.prompt_ids(record) == ours.ids[~ours.target].tolist()
    assert renderer.tokenizer.decode(ours.ids[ours.target], skip_special_tokens=True) == answer
    assert (as_row(record).question, as_row(record).answer) == (prompt, answer)


def test_preference_rows_are_a_dataset_and_are_refused_by_training_by_name(
    tmp_path: Path, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    rows = [{**PAIR, "prompt": f"question {i}?"} for i in range(40)]
    folder = made(tmp_path, [*rows, rows[0]])
    assert len(kept(folder)) == 40
    assert "rejected" in (folder / "report.html").read_text()
    record = open_rows(folder)[0]
    for objective in ("sft", "pretrain"):
        with pytest.raises(DataError, match=f"objective that compares.*objective={objective}"):
            Renderer(make_tokenizer(), objective).render(record)


def test_a_real_run_learns_labels_as_it_learns_the_pairs_they_stand_for(
    lab: Path, tmp_path: Path, one: Gang
) -> None:
    labels = ["rain", "sun"]
    rows = [parse({"input": f"day {i}", "label": labels[i % 2], "labels": labels}).content
            for i in range(48)]  # fmt: skip
    pairs = [dict(zip(("prompt", "completion"), prompt_and_answer(r), strict=True)) for r in rows]
    for name, content in (("labels", rows), ("pairs", pairs)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
        one.fit(small_config(lab, f"payload-{name}", data__path=str(path)))
    assert metrics(lab, "payload-labels") == metrics(lab, "payload-pairs")
    (tmp_path / "preference.jsonl").write_text(json.dumps(PAIR) + "\n")
    with pytest.raises(DataError, match=r"preference\.jsonl:1: .*objective=sft"):
        one.fit(small_config(lab, "pairs", data__path=str(tmp_path / "preference.jsonl")))
