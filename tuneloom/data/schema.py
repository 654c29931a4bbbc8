"""Is this content a record a model can learn from? Each fault has a code to be counted by."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tuneloom.data.payloads import payload_of
from tuneloom.data.records import ROLES

PLAIN = {"role", "content"}


class Reject(ValueError):
    """A row that cannot become a record: a code to count by, and a sentence for a person."""

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(code, sentence)
        self.code, self.sentence = code, sentence


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, or Reject: JSON readers differ in which of two equal keys they keep."""
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise Reject("duplicate_key", f"the key {twice[:40]!r} stands twice")
    return made


def check(content: Mapping[str, Any]) -> None:
    """Raise Reject unless content is one of the payloads, with something to learn in it.

    Pairs, labels and schemas are for `payloads.normal` to look into.
    """
    if "messages" in content:
        _check_messages(content["messages"])
    elif "completion" in content:
        _check_text(content.get("prompt"), "prompt")
        _check_text(content["completion"], "completion")
    elif "text" in content:
        _check_text(content["text"], "text")
    elif payload_of(content) is None:
        raise Reject("unknown_shape", f"a record with the fields {sorted(content)}")


def is_plain(content: Mapping[str, Any]) -> bool:
    """True for a record of nothing but roles and texts, about which `check` has said all."""
    if content.keys() == {"messages"}:
        return all(message.keys() == PLAIN for message in content["messages"])
    return content.keys() in ({"prompt", "completion"}, {"text"})


def _check_messages(messages: Any) -> None:
    """A non-empty list of turns, at least one of them an answer."""
    if not isinstance(messages, list):
        raise Reject("wrong_type", f"messages: expected a list, got {type(messages).__name__}")
    answers = 0
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise Reject("wrong_type", f"messages.{index}: expected an object")
        if not isinstance(message.get("role"), str) or message["role"] not in ROLES:
            raise Reject(
                "unknown_role", f"messages.{index}.role: {str(message.get('role'))[:40]!r}"
            )
        content = message.get("content")
        if (type(content) is not str or not content.strip()) and not message.get("tool_calls"):
            _check_text(content, f"messages.{index}.content")
        answers += message["role"] == "assistant"
    if not answers:
        raise Reject("no_answer", "messages: no turn of the assistant, nothing to learn")


def _check_text(value: Any, where: str) -> None:
    """Text with something in it."""
    if not isinstance(value, str):
        got = "null" if value is None else type(value).__name__
        raise Reject("wrong_type", f"{where}: expected text, got {got}")
    if not value or value.isspace():
        raise Reject("empty", f"{where}: empty")
