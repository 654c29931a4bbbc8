"""Rows that a test would recognise: the same record, the same question, a shared run of words, or a
near-duplicate of a row in a validation, golden or evaluation set.

A run of 13 words is the measure of GPT-3's appendix C (arXiv 2005.14165). What stands in more than
a hundredth of a set's rows, and in three at least, is boilerplate of that set; runs that begin or
end with half their length of it are not counted.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from tuneloom.config import Config
from tuneloom.data.dedupe import (
    PERMUTATIONS,
    WORD,
    NearConfig,
    rows_a_band,
    signature,
)
from tuneloom.data.quality import own_text
from tuneloom.data.questions import asked_and_answered, hash64
from tuneloom.data.rows import open_rows

Kind = Literal["record", "question", "words", "near"]


class EvaluationSet(Config):
    name: str
    """What hits are counted under."""
    path: str
    """A dataset folder or a JSONL file of records."""
    split: str = "test"
    """Which split of a dataset folder."""

    @field_validator("name")
    @classmethod
    def plain(cls, value: str) -> str:
        if not value.replace("_", "").replace("-", "").isalnum():
            raise ValueError("expected letters, digits, - and _")
        return value


class AgainstConfig(Config):
    sets: list[EvaluationSet] = []
    words: Annotated[int, Field(ge=5, le=50)] = 13
    """A shared run of so many words is a hit."""
    action: Literal["list", "drop", "fail"] = "drop"
    """`list` counts hits, `drop` sets the rows aside, `fail` ends the ingest with exit code 3."""


@dataclass
class _Known:
    """One set, indexed by everything a row is compared by."""

    name: str
    ids: set[str]
    questions: set[int]
    runs: set[int]
    bands: dict[bytes, list[int]]
    signatures: np.ndarray


class Contamination:
    """All sets, loaded once a process."""

    def __init__(self, config: AgainstConfig, near: NearConfig) -> None:
        self.words = config.words
        self.near = near
        self.width = rows_a_band(near.threshold)
        self.sets = [self._load(entry) for entry in config.sets]

    def hit(self, record_id: str, question: int, content: Mapping[str, Any]) -> str | None:
        """`SET:KIND` of the first set that knows this row, or None."""
        if not self.sets:
            return None
        for known in self.sets:
            if record_id in known.ids:
                return f"{known.name}:record"
            if question in known.questions:
                return f"{known.name}:question"
        text = own_text(content)
        runs = set(runs_of_words(text, self.words))
        sketch = signature(text, self.near)
        for known in self.sets:
            if not runs.isdisjoint(known.runs):
                return f"{known.name}:words"
            if self._is_near(sketch, known):
                return f"{known.name}:near"
        return None

    def _is_near(self, sketch: bytes, known: _Known) -> bool:
        """Jaccard at or above the threshold with any row that shares a band."""
        row = np.frombuffer(sketch, "<u4")
        return any(
            (row == known.signatures[i]).mean() >= self.near.threshold
            for band in _bands(sketch, self.width)
            for i in known.bands.get(band, ())
        )

    def _load(self, entry: EvaluationSet) -> _Known:
        rows = open_rows(entry.path, entry.split)
        half = self.words // 2
        counted: Counter[int] = Counter()
        for i in range(len(rows)):
            counted.update(set(runs_of_words(own_text(rows[i].content), half)))
        common = {run for run, number in counted.items() if number > max(2, len(rows) // 100)}
        runs: set[int] = set()
        bands: dict[bytes, list[int]] = defaultdict(list)
        sketches, ids, questions = [], set(), set()
        for i in range(len(rows)):
            content = rows[i].content
            text = own_text(content)
            ids.add(rows[i].id)
            if "text" not in content:
                questions.add(hash64(asked_and_answered(content)[0]))
            halves = list(runs_of_words(text, half))
            for start, run in enumerate(runs_of_words(text, self.words)):
                if halves[start] not in common and halves[start + self.words - half] not in common:
                    runs.add(run)
            sketch = signature(text, self.near)
            sketches.append(np.frombuffer(sketch, "<u4"))
            for band in _bands(sketch, self.width):
                bands[band].append(i)
        stacked = np.array(sketches, dtype="<u4").reshape(-1, PERMUTATIONS)
        return _Known(entry.name, ids, questions, runs, dict(bands), stacked)


def runs_of_words(text: str, size: int) -> Iterator[int]:
    """64 bits of every run of `size` lower-case words; none of a shorter text."""
    words = WORD.findall(text.lower())
    for i in range(len(words) - size + 1):
        run = " ".join(words[i : i + size]).encode("utf-8")
        yield int.from_bytes(hashlib.blake2b(run, digest_size=8).digest(), "big")


def _bands(sketch: bytes, width: int) -> Iterator[bytes]:
    """Each band's place and bytes, as a key."""
    for i in range(PERMUTATIONS // width):
        yield bytes([i]) + sketch[4 * width * i : 4 * width * (i + 1)]
