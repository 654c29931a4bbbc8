"""Rows to be scored: questions with their right answers, and the labels where answers are few."""

import random
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tuneloom.data.payloads import CLASSIFIED, EXTRACTED, prompt_and_answer
from tuneloom.data.records import Record

MAX_LABELS = 100
ROWS_A_LABEL = 5
"""With fewer training rows than this a label, on average, answers are free text, no labels."""
EDGES = string.punctuation + string.whitespace
OPEN, CLOSE = "<think>", "</think>"
"""Around what a model thinks before it answers, as Qwen3 and DeepSeek-R1 write it."""


@dataclass(frozen=True)
class Row:
    """One record as a task sees it; `answer` is None where there is nothing to answer (text)."""

    record: Record
    question: str
    answer: str | None


def as_row(record: Record) -> Row:
    """Question and answer of a record; a chat that ends in no assistant's text has no answer."""
    content = record.content
    if "messages" in content:
        *before, last = content["messages"]
        if last["role"] != "assistant" or not last.get("content"):
            return Row(record, _joined(content["messages"]), None)
        spoken = said(last["content"])
        return Row(record, _joined(before), spoken if spoken.strip() else last["content"])
    if "completion" in content:
        return Row(record, str(content["prompt"]), str(content["completion"]))
    if record.kind in (CLASSIFIED, EXTRACTED):
        return Row(record, *prompt_and_answer(content))
    return Row(record, str(content.get("text", content.get("prompt", ""))), None)


def _joined(messages: Sequence[dict[str, object]]) -> str:
    """The text of some turns, one under the other."""
    return "\n".join(m["content"] for m in messages if isinstance(m.get("content"), str))  # type: ignore[misc]


def choose(count: int, *, limit: int, seed: int) -> list[int]:
    """Which rows of `count` are scored: all, or `limit` drawn by the seed, in their order."""
    if not limit or limit >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), limit))


def labels_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """The distinct answers of training rows, most frequent first; none where answers are many, or
    one has several lines.
    """
    counts = Counter(row.answer.strip() for row in rows if row.answer is not None)
    few = 2 <= len(counts) <= min(MAX_LABELS, len(rows) // ROWS_A_LABEL)
    few = few and not any("\n" in label for label in counts)
    return tuple(label for label, _ in counts.most_common()) if few else ()


def said(text: str) -> str:
    """What a text says after the thought that it begins with, if it begins with one."""
    if not text.lstrip().startswith(OPEN) or CLOSE not in text:
        return text
    return text.split(CLOSE, 1)[1]


def still_thinking(text: str) -> bool:
    """True for a text that begins with a thought and ends within it."""
    return text.lstrip().startswith(OPEN) and CLOSE not in text


def exact(text: str, answer: str) -> bool:
    """The answer letter for letter, white space at its ends aside."""
    return text.strip() == answer.strip()


def named_label(text: str, labels: Sequence[str]) -> str | None:
    """The label that a text's first line is: letter for letter, else whatever its case and
    surrounding punctuation, where only one label is meant (`C` is none of `C++` and `C#`).
    """
    first = text.strip().split("\n", 1)[0].strip()
    if first in labels:
        return first
    wanted = _plain(first)
    meant = [label for label in labels if _plain(label) == wanted]
    return meant[0] if len(meant) == 1 else None


def _plain(text: str) -> str:
    """Case and edge punctuation gone; where nothing is left, as for the label `?`, the text."""
    return text.strip(EDGES).casefold() or text.strip()
