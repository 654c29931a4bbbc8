"""Preference pairs, classification and extraction: their shape, and the prompt they train as.

A classification row names its label set and an extraction row its JSON schema, so that a row says
by itself what a right answer is. Both train as a prompt with its completion, rendered here alone;
preference pairs wait for an objective that compares answers.
"""

import json
from collections.abc import Mapping
from typing import Any

Content = dict[str, Any]
DEEPEST = 64
"""Levels of JSON nesting; tool schemas reach about 10, Python's recursion limit is 1,000."""
COMPARED, CLASSIFIED, EXTRACTED = "preference", "classification", "extraction"


class Fault(ValueError):
    """What is wrong with a payload: a code to count by, and a sentence without the place."""

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(code, sentence)
        self.code, self.sentence = code, sentence


def payload_of(content: Mapping[str, Any]) -> str | None:
    """Which of the three a checked content is; None for chats, completions and text."""
    if "chosen" in content:
        return COMPARED
    if "labels" in content:
        return CLASSIFIED
    return EXTRACTED if "schema" in content else None


def normal(kind: str, content: Mapping[str, Any]) -> Content:
    """The one form of equal payloads, labels in order and JSON read; raises Fault."""
    return {COMPARED: _preference, CLASSIFIED: _classification, EXTRACTED: _extraction}[kind](
        content
    )


def prompt_and_answer(content: Mapping[str, Any]) -> tuple[str, str]:
    """The prompt and the completion that a classification or extraction row trains as.

    The prompt ends with a line's end, where every tokenizer ends a token of its own accord.
    """
    if payload_of(content) == CLASSIFIED:
        return f"{content['input']}\n\nLabels: {', '.join(content['labels'])}\nLabel:\n", str(
            content["label"]
        )
    schema, answer = as_json(content["schema"]), as_json(content["answer"])
    return f"{content['input']}\n\nJSON schema: {schema}\nJSON:\n", answer


def as_json(value: Any) -> str:
    """JSON as it is shown to the model: keys in order, real Unicode, one space after a mark."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def shown(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All that a record says, named, for a person to read: of a turn its text, its reasoning, its
    calls and whether it is trained on, then tools and the other keys.
    """
    said: list[tuple[str, Any]] = []
    for turn in content.get("messages", []):
        more = {k: v for k, v in turn.items() if k not in ("role", "content") and v is not None}
        if turn.get("content") or not more:
            said.append((turn["role"], turn.get("content") or ""))
        said += [(f"{turn['role']} {name}", value) for name, value in more.items()]
    said += [(name, value) for name, value in content.items() if name != "messages"]
    return [(name, v if isinstance(v, str) else as_json(v)) for name, v in said]


def _preference(content: Mapping[str, Any]) -> Content:
    fields = {name: _text(content, name) for name in ("prompt", "chosen", "rejected")}
    if fields["chosen"] == fields["rejected"]:
        raise Fault("same_answers", "chosen and rejected are the same, so neither is better")
    return fields


def _classification(content: Mapping[str, Any]) -> Content:
    text, label, labels = _text(content, "input"), _text(content, "label"), content.get("labels")
    if not isinstance(labels, list) or not all(isinstance(x, str) and x.strip() for x in labels):
        raise Fault("wrong_type", "labels: expected a list of texts, all labels of the task")
    if len(set(labels)) < max(2, len(labels)):
        raise Fault("labels", "labels: expected two or more, each once")
    if label not in labels:
        raise Fault("unknown_label", "label: is none of labels")
    return {"input": text, "label": label, "labels": sorted(labels)}


def _extraction(content: Mapping[str, Any]) -> Content:
    schema, answer = _read(content, "schema"), _read(content, "answer")
    if not isinstance(schema, dict):
        raise Fault("wrong_type", "schema: expected a JSON schema, an object")
    if not isinstance(answer, dict | list):
        raise Fault("wrong_type", "answer: expected a JSON object or list")
    return {"input": _text(content, "input"), "schema": schema, "answer": answer}


def _text(content: Mapping[str, Any], name: str) -> str:
    value = content.get(name)
    if not isinstance(value, str):
        got = "null" if value is None else type(value).__name__
        raise Fault("wrong_type", f"{name}: expected text, got {got}")
    if not value.strip():
        raise Fault("empty", f"{name}: empty")
    return value


def _read(content: Mapping[str, Any], name: str) -> Any:
    """A JSON value; text is read as JSON, which is all that a CSV or a template can hold."""
    value = content.get(name)
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        raise Fault("invalid_json", f"{name}: no JSON") from None
    if deeper(found, DEEPEST):
        raise Fault("invalid_json", f"{name}: nested more than {DEEPEST} levels deep")
    return found


def deeper(value: Any, levels: int) -> bool:
    """True where objects and lists stand in each other more than `levels` times."""
    if not isinstance(value, dict | list | tuple):
        return False
    inside = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(deeper(inner, levels - 1) for inner in inside)
