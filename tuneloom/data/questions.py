"""The question and the answer of a record, and the 64 bits that such texts are compared by."""

import hashlib
from collections.abc import Mapping
from typing import Any


def hash64(text: str) -> int:
    """64 bits of sha256: what keys, questions and answers are compared by."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def asked_and_answered(content: Mapping[str, Any]) -> tuple[str, str]:
    """The input side of a record and its answer: rows that share one and not the other conflict."""
    if "messages" in content:
        turns = content["messages"]
        last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
        before = "\x1e".join(f"{turn['role']}\x1f{turn.get('content')}" for turn in turns[:last])
        return before, f"{turns[last].get('content')}{turns[last].get('tool_calls') or ''}"
    if "completion" in content:
        return content["prompt"], content["completion"]
    return content["text"], ""
