"""Records: ids are of the content alone, and every bad row is one sentence."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuneloom.data.records import canonical, loads, parse
from tuneloom.errors import DataError

CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def message(**fields: Any) -> dict[str, Any]:
    """A chat whose second message is `fields`."""
    return {"messages": [{"role": "user", "content": "q"}, fields]}


def test_each_payload_is_recognised() -> None:
    assert parse(CHAT).kind == "messages"
    assert parse({"prompt": "p", "completion": "c"}).kind == "prompt_completion"
    assert parse({"text": "t"}).kind == "text"


def test_the_id_is_of_the_content_whatever_the_order_and_the_envelope() -> None:
    plain = parse({"prompt": "p", "completion": "c"})
    assert plain.id == parse({"completion": "c", "prompt": "p", "id": 7, "meta": {"x": 1}}).id
    assert plain.id == parse({"prompt": "p", "completion": "c", "source": "forum"}).id
    assert plain.id != parse({"prompt": "p", "completion": "C"}).id
    assert plain.content == {"prompt": "p", "completion": "c"}
    assert canonical({"b": "é", "a": 1}) == '{"a":1,"b":"é"}'


def test_the_source_is_the_rows_own_or_the_files() -> None:
    assert parse({"text": "t", "source": "forum"}, source="a.jsonl").source == "forum"
    assert parse({"text": "t"}, source="a.jsonl").source == "a.jsonl"


def test_tool_calls_and_results_are_read() -> None:
    call = {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"x": 1}}}
    row = {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1", "tool_call_id": "1", "name": "f"},
            {"role": "assistant", "content": "a", "reasoning_content": "r", "train": False},
        ],
    }
    assert parse(row).content == row


BAD: dict[str, tuple[Any, str]] = {
    "not an object": (["x"], "expected a JSON object a row, got \\['x'\\]"),
    "no payload": ({"question": "x"}, "expected messages, prompt and completion, or text"),
    "two payloads": ({"text": "t", **CHAT}, "messages and text at once, which is ambiguous"),
    "half a payload": ({"prompt": "p"}, "needs the key 'completion'"),
    "unknown key": ({"text": "t", "txet": "u"}, "unknown key 'txet' beside text"),
    "messages no list": ({"messages": "hi"}, "messages: expected a list"),
    "no messages": ({"messages": []}, "messages: expected a list of at least one"),
    "message no object": ({"messages": ["hi"]}, r"messages\[0\]: expected an object"),
    "unknown role": (message(role="bot", content="a"), r"messages\[1\].role: expected one of"),
    "no role": (message(content="a"), r"messages\[1\].role: expected one of .*, got None"),
    "content no string": (message(role="user", content=3), "content: expected str, got 3"),
    "no content": (message(role="user"), "content: expected str, got None"),
    "empty answer": (message(role="assistant", content=" \n"), "empty assistant answer"),
    "train no bool": (
        message(role="assistant", content="a", train=1),
        "train: expected bool, got 1",
    ),
    "train on user": (message(role="user", content="a", train=True), "only assistant messages"),
    "weight": (message(role="assistant", content="a", weight=0), "unknown key.*set train"),
    "user calls": (
        message(role="user", content="a", tool_calls=[{"function": {"name": "f"}}]),
        "only an assistant calls tools",
    ),
    "call without function": (message(role="assistant", tool_calls=[{"name": "f"}]), "expected {"),
    "arguments no object": (
        message(role="assistant", tool_calls=[{"function": {"name": "f", "arguments": 3}}]),
        "arguments: expected an object, got 3",
    ),
    "tools no list": ({**CHAT, "tools": {"a": 1}}, "tools: expected a list"),
    "text no string": ({"text": 3}, "text: expected a string, got 3"),
    "empty text": ({"text": "  "}, "text: empty"),
    "empty completion": ({"prompt": "p", "completion": ""}, "completion: empty"),
    "source no string": ({"text": "t", "source": 3}, "source: expected a string"),
    "lone surrogate": ({"text": "a\ud800b"}, r"lone surrogate U\+D800"),
    "not a number": ({"text": "a", "meta": {"score": float("nan")}}, "cannot be written as JSON"),
    "reserved character": ({"text": "a\ufdd0b"}, r"noncharacter U\+FDD0"),
    "a set": ({"text": "a", "meta": {1, 2}}, "cannot be written as JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_one_sentence_that_starts_with_its_place(name: str) -> None:
    row, expected = BAD[name]
    with pytest.raises(DataError, match=expected) as caught:
        parse(row, where="rows.jsonl:7")
    assert str(caught.value).startswith("rows.jsonl:7: ")
    assert "\n" not in str(caught.value)


def test_a_format_that_is_asked_for_must_be_there() -> None:
    with pytest.raises(DataError, match="expected text, found the keys"):
        parse(CHAT, "text")


def test_absurd_nesting_is_refused_not_a_traceback() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(DataError, match="nested too deeply"):
        parse({"text": "t", "meta": deep})
    with pytest.raises(DataError, match="nested too deeply"):
        loads("[" * 100_000, "a:1")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": NaN}', "NaN is not JSON"),
        ('{"text": Infinity}', "Infinity is not JSON"),
        ('{"text": "a}', "broken JSON at column 10"),
        ("1" * 5000, "broken JSON"),
    ],
)
def test_what_is_not_json_is_refused(line: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        loads(line, "a.jsonl:3")


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(st.characters()) | st.integers(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["messages", "text", "prompt", "completion", "x"]), JSON))
def test_any_json_object_parses_or_is_a_data_error(row: dict[str, Any]) -> None:
    try:
        record = parse(row)
    except DataError:
        return
    assert json.loads(canonical(record.content)) == record.content
