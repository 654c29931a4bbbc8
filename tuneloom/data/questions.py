"""The question and the answer of a record, and the 64 bits that such texts are compared by."""

import hashlib
from collections.abc import Mapping
from typing import Any

from tuneloom.data.payloads import CLASSIFIED, COMPARED, EXTRACTED, as_json, payload_of


def hash64(text: str) -> int:
    """64 bits of sha256: what keys, questions and answers are compared by."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def asked_and_answered(content: Mapping[str, Any]) -> tuple[str, str]:
    """The input side of a record and its answer: rows that share one and not the other conflict."""
    if "messages" in content:
        turns = content["messages"]
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        last = answers[-1] if answers else len(turns)  # without an answer all of it is asked
        before = "\x1e".join(f"{turn['role']}\x1f{turn.get('content')}" for turn in turns[:last])
        answered = (f"{t.get('content')}{t.get('tool_calls') or ''}" for t in turns[last:][:1])
        return before, "".join(answered)
    if "completion" in content:
        return content["prompt"], content["completion"]
    kind = payload_of(content)
    if kind == COMPARED:
        return content["prompt"], content["chosen"]
    if kind == CLASSIFIED:
        return content["input"], content["label"]
    if kind == EXTRACTED:
        return content["input"], as_json(content["answer"])
    return content["text"], ""


def contested(content: Mapping[str, Any]) -> tuple[str, str]:
    """What two rows must agree on, and what each says of it.

    One input may have a label in two tasks, and one prompt many pairs: only the same label set, the
    same schema, or the same pair turned round make a conflict.
    """
    asked, answer = asked_and_answered(content)
    kind = payload_of(content)
    if kind == COMPARED:
        pair = "\x1f".join(sorted((content["chosen"], content["rejected"])))
        return f"{asked}\x1e{pair}", answer
    if kind is not None:
        return f"{asked}\x1e{as_json(content.get('labels') or content.get('schema'))}", answer
    return asked, answer
