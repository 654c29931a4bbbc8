"""Rows and files made to end an ingest: each is a counted reject or one sentence."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tuneloom.config import build
from tuneloom.data.prepare import Preparer
from tuneloom.data.readers import Block, read_blocks
from tuneloom.data.recipe import Recipe
from tuneloom.data.records import canonical
from tuneloom.data.sources import find_sources
from tuneloom.errors import ConfigError, DataError

DEEP = "nested too deeply; at most 64 levels are read"
VALUES = [
    "[]", "{}", "null", "true", "3", "1.5", '"x"', '[["a"]]', '{"a": {"b": 1}}', "1e400", "9" * 23,
    '"http://x.example/y"', '"#"', '"http://[::1"', '"\\u0000"',
    *("[" * n + "]" * n for n in (60, 70, 500, 990, 1020, 10_000)),
    *('{"a":' * n + "1" + "}" * n for n in (60, 100, 990, 1020, 10_000)),
]  # fmt: skip
ROWS = [
    '{"messages": %s}', '{"messages": [{"role": %s, "content": "a"}]}',
    '{"messages": [{"role": "assistant", "content": %s}]}',
    '{"messages": [{"role": "assistant", "content": "a", "tool_calls": %s}]}',
    '{"messages": [{"role": "assistant", "content": "a"}], "tools": [%s]}',
    '{"conversations": [{"from": %s, "value": "a"}]}', '{"instruction": %s, "output": "a"}',
    '{"prompt": "a", "completion": %s}', '{"text": "a", "meta": %s}',
    '{"text": "a", "meta": {"synthetic": {"teacher": %s}}}',
    '{"input": "q", "label": "a", "labels": ["a", %s]}',
    '{"input": "q", "schema": %s, "answer": {}}',
    '{"input": "q", "schema": {"$ref": %s}, "answer": {}}',
    '{"input": "q", "schema": {"$schema": %s}, "answer": {}}',
    '{"input": "q", "schema": {"properties": %s}, "answer": {"a": 1}}',
    '{"prompt": "a", "chosen": %s, "rejected": "b"}', "%s",
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_whatever_stands_in_a_field_is_a_row_or_a_reject(row: str) -> None:
    prepare = Preparer(Recipe(name="d"))
    for value in VALUES:
        done = prepare(Block(0, "s", 1, row.replace("%s", value).encode()))
        assert done.rows_in == 1 == len(done.table) + len(done.rejects)


HALF = "half \ud800 a pair"


@pytest.mark.parametrize(
    ("row", "recipe"),
    [
        ({"text": "a", "cat": HALF}, {"label": "{cat}"}),
        ({"text": "a", "cat": HALF}, {"key": "{cat}"}),
        ({"text": "a", "cat": HALF}, {"subject": "{cat}"}),
        ({"text": "a", "cat": [HALF]}, {"label": "{cat}", "key": "{cat}"}),
        ({"text": "a", "meta": {"synthetic": {"teacher": HALF}}}, {}),
    ],
)
def test_half_a_surrogate_pair_beside_the_content_is_a_reject(
    row: dict[str, Any], recipe: dict[str, str]
) -> None:
    done = Preparer(build(Recipe, {"name": "d", **recipe}))(Block(0, "s", 1, dumped(row)))
    assert [reject["reason"] for reject in done.rejects] == ["lone_surrogate"]


def dumped(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode()


def test_half_a_surrogate_pair_in_a_secret_can_get_a_pseudonym(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("0123456789abcdef")
    privacy = {"default": "pseudonym", "key_file": str(tmp_path / "key")}
    prepare = Preparer(build(Recipe, {"name": "d", "privacy": privacy}))
    done = prepare(Block(0, "s", 1, dumped({"text": f"password='{HALF.replace(' ', '')}'"})))
    assert done.found == {"secret": 1} and len(done.table) == 1


def test_what_is_said_of_a_rejected_row_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"additionalProperties": {"type": "string"}}')
    prepare = Preparer(build(Recipe, {"name": "d", "json_schema": str(tmp_path / "schema.json")}))
    (reject,) = prepare(Block(0, "s", 1, dumped({"text": "a", HALF: 1}))).rejects
    assert reject["reason"] == "schema" and canonical(reject).encode()


LARGE = b'{"input": "q", "schema": {"properties": {"n": %s}}, "answer": {"n": 1%s}}'


def test_a_number_too_large_for_multiple_of_is_a_reject(tmp_path: Path) -> None:
    row = LARGE % (b'{"multipleOf": 0.1}', b"0" * 400)
    (reject,) = Preparer(Recipe(name="d"))(Block(0, "s", 1, row)).rejects
    assert reject["reason"] == "schema"
    assert reject["why"] == "answer: holds a number too large to check"
    (tmp_path / "schema.json").write_text('{"properties": {"n": {"multipleOf": 0.1}}}')
    prepare = Preparer(build(Recipe, {"name": "d", "json_schema": str(tmp_path / "schema.json")}))
    rows = b'{"text": "a", "n": 1%s}\n{"text": "b", "n": 1}' % (b"0" * 400)
    done = prepare(Block(0, "s", 1, rows))
    assert [reject["why"] for reject in done.rejects] == ["row: holds a number too large to check"]
    assert len(done.table) == 1


DRAFT4 = '{"$schema": "http://json-schema.org/draft-04/schema#", "$ref": 5}'


def test_a_reference_that_is_no_text_is_no_schema(tmp_path: Path) -> None:
    row = f'{{"input": "q", "schema": {DRAFT4}, "answer": {{}}}}'
    (reject,) = Preparer(Recipe(name="d"))(Block(0, "s", 1, row.encode())).rejects
    assert (reject["reason"], reject["why"]) == ("no_schema", "schema: $ref: expected text")
    (tmp_path / "schema.json").write_text(DRAFT4)
    prepare = Preparer(build(Recipe, {"name": "d", "json_schema": str(tmp_path / "schema.json")}))
    with pytest.raises(ConfigError, match=r"^data.json_schema: \S+ \$ref: expected text"):
        prepare(Block(0, "s", 1, b'{"text": "a"}'))


@pytest.mark.parametrize("levels", [63, 64, 900, 1_000, 1_020, 2_000, 10_000])
def test_the_levels_of_nesting_that_are_read_do_not_depend_on_the_stack(levels: int) -> None:
    raw = b'{"text": "a", "meta": ' + b"[" * levels + b"]" * levels + b"}"
    done = Preparer(Recipe(name="d"))(Block(0, "s", 1, raw))
    assert [reject["why"] for reject in done.rejects] == ([DEEP] if levels > 63 else [])


@pytest.mark.parametrize("space", ["", " ", "  ", "\t", " \t ", "\r", "   \r  "])
def test_a_key_that_stands_twice_is_seen_whatever_stands_before_its_colon(space: str) -> None:
    for first, second in ((space, ""), ("", space), (space, space)):
        raw = f'{{"prompt"{first}:"A","prompt"{second}:"B","completion":"c"}}'
        done = Preparer(Recipe(name="d"))(Block(0, "s", 1, raw.encode()))
        assert [reject["why"] for reject in done.rejects] == ["the key 'prompt' stands twice"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"prompt": "a", "prompt": "b", "completion": "c"}]', "the key 'prompt' stands twice"),
        ('[{"text": "a", "score": NaN}]', "NaN is no JSON number"),
        ('[{"text": ' + "[" * 80 + "]" * 80 + "}]", DEEP),
    ],
)
def test_json_files_are_read_as_strictly_as_lines(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "r.json").write_text(text)
    (block,) = read_blocks(find_sources([str(tmp_path)]), [], max_archive_bytes=1)
    done = Preparer(Recipe(name="d"))(block)
    assert [reject["why"] for reject in done.rejects] == [said]


def test_a_pipe_is_named_and_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a"}))
    os.mkfifo(tmp_path / "p.jsonl")
    with pytest.raises(DataError, match=r"^p.jsonl: cannot be read as lines \(no regular file\)"):
        list(read_blocks(find_sources([str(tmp_path)]), [], max_archive_bytes=1))
