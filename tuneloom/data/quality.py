"""Is a record worth learning from? Weak ones are set aside with the reason, never lost."""

import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from tuneloom.config import Config
from tuneloom.data.payloads import CLASSIFIED, EXTRACTED, as_json, payload_of
from tuneloom.data.questions import asked_and_answered

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Script = Literal["latin", "greek", "cyrillic", "hebrew", "arabic", "devanagari", "thai", "han",
                 "kana", "hangul"]  # fmt: skip
# Blocks that hold the letters in everyday use (Unicode 15, Blocks.txt).
SCRIPTS: dict[Script, re.Pattern[str]] = {
    "latin": re.compile("[A-Za-z\u00c0-\u024f\u1e00-\u1eff]"),
    "greek": re.compile("[\u0370-\u03ff\u1f00-\u1fff]"),
    "cyrillic": re.compile("[\u0400-\u052f]"),
    "hebrew": re.compile("[\u05d0-\u05ea]"),
    "arabic": re.compile("[\u0620-\u064a\u0671-\u06d3\u0750-\u077f]"),
    "devanagari": re.compile("[\u0900-\u097f]"),
    "thai": re.compile("[\u0e01-\u0e4e]"),
    "han": re.compile("[\u3400-\u4dbf\u4e00-\u9fff]"),
    "kana": re.compile("[\u3041-\u30ff]"),
    "hangul": re.compile("[\uac00-\ud7a3\u1100-\u11ff]"),
}
PLACEHOLDER = re.compile(
    r"^\W*(?:n/?a|none|null|nan|todo|tbd|test|\.{2,}|lorem ipsum.*|-+)\W*$", re.IGNORECASE
)


class QualityConfig(Config):
    min_answer_characters: Annotated[int, Field(ge=0)] = 1
    """Shorter answers are set aside as `short`."""
    max_characters: Annotated[int, Field(gt=0)] = 200_000
    """Longer records are set aside as `long`."""
    max_repetition: Share = 0.9
    """Share of a text of 400 characters or more that compression finds to be repetition."""
    placeholders: bool = True
    """Set answers such as N/A, TODO or null aside as `placeholder`."""
    scripts: list[Script] = []
    """Scripts that letters may be of, such as [latin, greek]; empty allows all. A record with more
    than a fifth of its letters outside them is set aside as `script`."""


def weakness(content: Mapping[str, Any], text: str, config: QualityConfig) -> str | None:
    """The first thing that is wrong with a record, whose texts are `text`, by name, or None.

    A label or an extracted object is right or wrong, however short: `none` is a label too.
    """
    answer = answer_of(content)
    closed = payload_of(content) in (CLASSIFIED, EXTRACTED)
    if not closed and len(answer.strip()) < config.min_answer_characters:
        return "short"
    if not closed and config.placeholders and len(answer) < 80 and PLACEHOLDER.match(answer):
        return "placeholder"
    if len(text) > config.max_characters:
        return "long"
    if len(text) >= 400 and repeats(text) and repetition(text) > config.max_repetition:
        return "repetition"
    if config.scripts and foreign_share(text, config.scripts) > 0.2:
        return "script"
    return None


def answer_of(content: Mapping[str, Any]) -> str:
    """The text that is learnt: the last assistant turn, the completion, the better answer, the
    label, the extracted JSON, or the text itself."""
    if "messages" in content:
        last = next(turn for turn in reversed(content["messages"]) if turn["role"] == "assistant")
        return last.get("content") or "(tool call)"
    if payload_of(content):
        return asked_and_answered(content)[1]
    return str(content.get("completion", content.get("text", "")))


def texts(content: Mapping[str, Any]) -> Iterator[str]:
    """Every text of a record, turn by turn; not the label set and schema, which many rows share."""
    for turn in content.get("messages", []):
        if turn.get("reasoning_content"):
            yield turn["reasoning_content"]
        yield turn.get("content") or ""
        for call in turn.get("tool_calls") or ():
            arguments = call["function"].get("arguments", "")
            yield call["function"]["name"]
            yield arguments if isinstance(arguments, str) else as_json(arguments)
    for name in ("prompt", "completion", "text", "input", "label", "chosen", "rejected"):
        if name in content:
            yield content[name]
    if "answer" in content:
        yield as_json(content["answer"])


def own_text(content: Mapping[str, Any]) -> str:
    """What tells a record from others: its texts without the instructions to the model, which many
    rows share.
    """
    turns = content.get("messages", [])
    own = [turn for turn in turns if turn["role"] not in ("system", "developer")]
    return "\n".join(texts({**content, "messages": own} if own else content))


def repeats(text: str) -> bool:
    """A cheap look: does one of three pieces of 24 characters stand in the text three times?"""
    quarter = len(text) // 4
    return any(text.count(text[i : i + 24]) >= 3 for i in (quarter, 2 * quarter, 3 * quarter - 24))


def repetition(text: str) -> float:
    """Share of a text that zlib saves: 0.5 for prose, above 0.9 where one phrase comes again.

    The first 4,000 characters speak for the rest; level 1 takes 15 us for 1 KB.
    """
    data = text[:4000].encode("utf-8")
    return 1.0 - len(zlib.compress(data, 1)) / len(data)


def foreign_share(text: str, scripts: list[Script]) -> float:
    """Share of letters of a known script that are of none of `scripts`."""
    counted = {name: len(pattern.findall(text)) for name, pattern in SCRIPTS.items()}
    total = sum(counted.values())
    return sum(n for name, n in counted.items() if name not in scripts) / total if total else 0.0
