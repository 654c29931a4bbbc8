"""From a record to token ids and the mask of what is trained: one piece of code for training,
evaluation and serving, so that no token differs between them.

Chat: the tokenizer's template, loss on each assistant message with its end-of-turn token.
Prompt and completion, and what trains as such (payloads.py): loss on the completion and the
end-of-sequence token. Text: loss on all tokens but the first.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from tuneloom.data.payloads import COMPARED, prompt_and_answer
from tuneloom.data.records import Record
from tuneloom.data.template import ChatTemplate, digest_of, template_source
from tuneloom.data.tokenizer import END, START, Codec, name_of
from tuneloom.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VERSION = 1
"""Raised when the same record would give other ids or masks; old token caches are then unused."""
Objective = Literal["sft", "pretrain"]
OverLength = Literal["drop", "truncate", "error"]


@dataclass(frozen=True)
class Example:
    """ids: (L,) int32; target: (L,) bool, target[i] means that token i is predicted with loss.

    `tokens` and `targets` count it before it was cut to max_length; a dropped one has L = 0.
    """

    ids: np.ndarray
    target: np.ndarray
    tokens: int
    targets: int
    dropped: str = ""


class Renderer:
    """Renders records for one tokenizer and objective; see `Example` for what comes out."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        objective: Objective = "sft",
        max_length: int | None = None,
        over_length: OverLength = "drop",
    ) -> None:
        self.tokenizer, self.objective = tokenizer, objective
        self.max_length, self.over_length = max_length, over_length
        self.codec = Codec(tokenizer, template_source(tokenizer))
        self._bos = _prefix_ids(tokenizer)

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template; a tokenizer without one serves the formats that need none."""
        return ChatTemplate(self.tokenizer, self.codec)

    @cached_property
    def digest(self) -> str:
        """Of everything that decides ids and masks: tokenizer, template, options, this code."""
        parts = {
            "version": VERSION,
            "tokenizer": self.codec.digest,
            "template": digest_of(template_source(self.tokenizer)),
            "special": {k: str(v) for k, v in self.tokenizer.special_tokens_map.items()},
            "bos": self._bos.tolist(),
            "objective": self.objective,
            "max_length": self.max_length,
            "over_length": self.over_length,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def render(self, record: Record) -> Example:
        """One record; raises DataError for a mask of all zeros or all ones."""
        return self.render_many([record])[0]

    def render_many(
        self, records: Sequence[Record], places: Sequence[str] | None = None
    ) -> list[Example]:
        """Many records in one call of the tokenizer; `places` (path:line) lead the messages."""
        names = places or [f"record {record.id[:12]}" for record in records]
        texts = [self._placed(record, name) for record, name in zip(records, names, strict=True)]
        encoded = self.codec.encode(texts)
        return [self._example(*each) for each in zip(records, encoded, names, strict=True)]

    def prompt_ids(self, record: Record) -> list[int]:
        """Everything before the last assistant answer, with the generation prompt.

        A chat that ends with another role is all prompt: that is what serving sends.
        """
        if record.kind == "messages":
            messages = record.content["messages"]
            upto = len(messages) - (messages[-1]["role"] == "assistant")
            text = self.template.prompt(record.content, upto)
            return self._bare(text).tolist()
        if record.kind == "text":
            raise DataError(f"record {record.id[:12]}: a text record has no prompt")
        text = self.codec.seal(self.codec.protect(self._pair(record)[0]))
        return [*self._bos.tolist(), *self._bare(text).tolist()]

    def answer(self, record: Record) -> str:
        """The text that the model should answer to `prompt_ids`."""
        if record.kind == "messages":
            last = record.content["messages"][-1]
            if last["role"] != "assistant":
                raise DataError(f"record {record.id[:12]}: the chat does not end with an answer")
            return last.get("content") or json.dumps(last["tool_calls"], ensure_ascii=False)
        return str(record.content["text"]) if record.kind == "text" else self._pair(record)[1]

    def expected(self, record: Record) -> str | None:
        """`answer`, or None for a chat that ends with another role."""
        messages = record.content["messages"] if record.kind == "messages" else None
        if messages is not None and messages[-1]["role"] != "assistant":
            return None
        return self.answer(record)

    def _pair(self, record: Record) -> tuple[str, str]:
        """Prompt and completion of a record that is neither a chat nor a text."""
        if record.kind == COMPARED:
            raise DataError(
                "preference rows need an objective that compares answers, and objective="
                f"{self.objective} does not; make prompt and completion of the chosen ones"
            )
        if record.kind == "prompt_completion":
            return str(record.content["prompt"]), str(record.content["completion"])
        return prompt_and_answer(record.content)

    def _placed(self, record: Record, name: str) -> str:
        try:
            return self._text(record)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error

    def _text(self, record: Record) -> str:
        """Sealed text with marks: what the codec encodes."""
        trained_by = "pretrain" if record.kind == "text" else "sft"
        if record.kind != COMPARED and trained_by != self.objective:
            raise DataError(
                f"{record.kind} rows are for objective={trained_by}, not {self.objective}"
            )
        if record.kind == "messages":
            return self.template.conversation(record.content)
        end = self._end_of_sequence()
        if record.kind == "text":
            return self.codec.marked(self.codec.protect(record.content["text"]) + end, [])
        prompt, completion = map(self.codec.protect, self._pair(record))
        whole = prompt + completion + end
        return self.codec.marked(whole, [(len(prompt), START), (len(whole), END)])

    def _end_of_sequence(self) -> str:
        end = self.tokenizer.eos_token
        if end not in self.codec.aliases:
            raise DataError(
                f"{name_of(self.tokenizer)}: no end-of-sequence token, so the model would never "
                f"learn to stop; set eos_token in tokenizer_config.json"
            )
        return str(end)

    def _bare(self, text: str) -> np.ndarray:
        """ids of a text without its marks."""
        ids = self.codec.encode([text])[0]
        return ids[~np.isin(ids, (self.codec.start, self.codec.end, self.codec.cut))]

    def _example(self, record: Record, coded: np.ndarray, name: str) -> Example:
        ids, target = self._unmark(coded)
        if record.kind != "messages":
            ids = np.concatenate([self._bos, ids])
            target = np.concatenate([np.zeros(len(self._bos), bool), target])
        if record.kind == "text":
            target[:] = True
        elif target[int(ids[0] == self.tokenizer.bos_token_id) :].all():
            raise DataError(f"{name}: every token would be trained on: the prompt is empty")
        target[0] = False  # nothing comes before it to predict it from
        if not target.any():
            raise DataError(
                f"{name}: no token to train on; every answer is empty or `train: false`"
            )
        return self._fit(ids, target, name)

    def _unmark(self, coded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids without marks, and whether each lay between START and END."""
        starts, ends = coded == self.codec.start, coded == self.codec.end
        inside = np.cumsum(starts) > np.cumsum(ends)
        kept = ~(starts | ends | (coded == self.codec.cut))
        return coded[kept], inside[kept]

    def _fit(self, ids: np.ndarray, target: np.ndarray, name: str) -> Example:
        """The over-length policy."""
        tokens, targets, limit = len(ids), int(target.sum()), self.max_length
        if limit is None or tokens <= limit:
            return Example(ids, target, tokens, targets)
        if self.over_length == "error":
            raise DataError(
                f"{name}: {tokens:,} tokens, batch.max_length is {limit:,} and batch.over_length "
                f"is error; raise the one or set the other to drop or truncate"
            )
        kept = self.over_length == "truncate" and bool(target[:limit].any())
        size = limit if kept else 0
        reason = (
            "" if kept else "no_answer_left" if self.over_length == "truncate" else "over_length"
        )
        return Example(ids[:size], target[:size], tokens, targets, reason)


def _prefix_ids(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """What the tokenizer puts before plain text (most often BOS, often nothing)."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return np.asarray(full[:start], np.int32)
    raise DataError(
        f"{name_of(tokenizer)}: adds tokens inside plain text ({plain} becomes {full}), "
        f"so BOS cannot be told apart"
    )
