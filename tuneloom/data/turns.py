"""Where the assistant's turns lie in a rendered chat, and why a template's turns cannot be trusted.

A template with `{% generation %}` says itself what is trained. For any other, the text before
answer i is the rendering of messages[:i] with the generation prompt, and the text up to its end is
the rendering of messages[:i+1]; both must be prefixes of the whole chat, or the template is
refused by name. A turn ends with its end-of-turn token: the last control token of its part when
only whitespace follows it (ChatML's newline is not trained), else with its part.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tuneloom.data.tokenizer import CUT, END, START, Codec
from tuneloom.errors import DataError

Spans = list[tuple[int, int]]
Render = Callable[[list[dict[str, Any]], bool], tuple[str, Spans]]
"""(messages, with generation prompt) -> text and the spans of its `{% generation %}` blocks."""
WAY_OUT = (
    "set `train: false` on every assistant message but the last, split the conversation so that "
    "each answer comes last, or use a template with {% generation %}"
)


@dataclass(frozen=True)
class Turn:
    """One assistant message in the rendered text; `end` is None where it could not be derived."""

    start: int
    end: int | None
    train: bool


@dataclass(frozen=True)
class Layout:
    """A rendered chat with its turns; at `cuts` generation starts, so no token may cross them."""

    text: str
    turns: list[Turn]
    cuts: list[int] = field(default_factory=list)

    def marks(self, *, train: bool) -> list[tuple[int, str]]:
        """START and END of trained turns, CUT at every other border, by position."""
        marks = dict.fromkeys(self.cuts, CUT)
        for turn in self.turns:
            trained = train and turn.train
            marks[turn.start] = START if trained else CUT
            if turn.end is not None:
                marks[turn.end] = END if trained else CUT
        return sorted(marks.items())


class Chat:
    """One conversation and a template; renders each prefix at most once."""

    def __init__(self, name: str, render: Render, messages: list[dict[str, Any]]) -> None:
        self.name, self._render = name, render
        self.flags = [message.get("train") for message in messages]
        self.messages = [{k: v for k, v in m.items() if k != "train"} for m in messages]
        self.answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        self._prefixes: dict[tuple[int, bool], str | None] = {}

    def whole(self, *, prompt: bool) -> tuple[str, Spans]:
        return self._render(self.messages, prompt)

    def prefix(self, upto: int, *, prompt: bool) -> str | None:
        """Rendering of messages[:upto], or None where the template refuses to stop there."""
        key = (upto, prompt)
        if key not in self._prefixes:
            try:
                self._prefixes[key] = self._render(self.messages[:upto], prompt)[0]
            except DataError:
                self._prefixes[key] = None
        return self._prefixes[key]

    def trained(self, index: int) -> bool:
        return self.flags[index] is not False

    def tail(self, index: int) -> str:
        """The last characters that message `index` must show, whatever its template trims."""
        message = self.messages[index]
        if message.get("tool_calls"):
            return str(message["tool_calls"][-1]["function"]["name"])
        return str(message["content"]).strip()[-20:]


def refuse_unwritten(chat: Chat, text: str) -> None:
    """Raise DataError where a turn of another's is not in the text: templates pass over roles that
    they do not know, and the answer would be trained without what it answers.
    """
    for index, message in enumerate(chat.messages):
        # A word of letters and digits, as some templates write a tool's answer as JSON.
        words = re.findall(r"[A-Za-z0-9]+", str(message.get("content") or ""))
        if message["role"] != "assistant" and words and words[-1] not in text:
            raise DataError(
                f"{chat.name}: does not write message {index}, of role {message['role']!r} "
                f"({words[-1]!r}); remove such turns, or use a template that has a place for them"
            )


def tagged_layout(chat: Chat, codec: Codec, end_of_turn: str | None, *, prompt: bool) -> Layout:
    """Turns from the template's own `{% generation %}` blocks, one an assistant message.

    A block of nothing but control tokens (Phi-3's closing one) goes with the message before it.
    """
    text, spans = chat.whole(prompt=prompt)
    worded = [bool(codec.control.sub("", text[start:end]).strip()) for start, end in spans]
    if sum(worded) != len(chat.answers):
        raise DataError(
            f"{chat.name}: {{% generation %}} marks {sum(worded)} spans for {len(chat.answers)} "
            f"assistant messages; put each of them in one generation block"
        )
    turns: list[Turn] = []
    left = iter(chat.answers)
    for (start, end), speaks in zip(spans, worded, strict=True):
        if speaks:
            index = next(left)
            _verify_block(chat, text[start:end], index)
        train = chat.trained(index) if turns or speaks else False
        turns.append(Turn(start, _with_end_of_turn(text, end, end_of_turn, codec), train))
    befores = (chat.prefix(index, prompt=True) for index in chat.answers)
    cuts = [len(before) for before in befores if before and text.startswith(before)]
    return Layout(text, turns, cuts)


def _verify_block(chat: Chat, shown: str, index: int) -> None:
    if chat.tail(index) not in shown:
        raise DataError(
            f"{chat.name}: the {{% generation %}} block of message {index} does not hold its "
            f"content (Jinja misplaces a block inside a macro); move the block out"
        )


def _with_end_of_turn(text: str, end: int, token: str | None, codec: Codec) -> int:
    """`end` of a generation block, moved behind an end-of-turn token that was left outside."""
    if not token or not text.startswith(token, end):
        return end
    end += len(token)
    blank = len(text) - end - len(text[end:].lstrip())
    return end + blank if token in codec.swallows else end


def prefix_layout(chat: Chat, codec: Codec, *, prompt: bool) -> Layout:
    """Turns from renderings of prefixes; what is trained is verified, history may stay open."""
    text, _ = chat.whole(prompt=prompt)
    turns = []
    for index in chat.answers:
        start = _start(chat, text, index)
        end = _end(chat, codec, text, index, start, prompt=prompt)
        if chat.trained(index) and not prompt:
            _verify(chat, text, index, start, end)
        if start is not None:
            turns.append(Turn(start, end, chat.trained(index)))
    return Layout(text, turns)


def _start(chat: Chat, text: str, index: int) -> int | None:
    before = chat.prefix(index, prompt=True)
    return len(before) if before is not None and text.startswith(before) else None


def _end(
    chat: Chat, codec: Codec, text: str, index: int, start: int | None, *, prompt: bool
) -> int | None:
    """Where the turn ends, None for what the prefix does not show."""
    if start is None:
        return None
    whole = index == len(chat.messages) - 1 and not prompt
    upto = text if whole else chat.prefix(index + 1, prompt=False)
    if upto is None or len(upto) <= start:
        return None
    if text.startswith(upto):
        end = codec.end_of_control(text, start, len(upto))
        return len(upto) if end is None else end
    # Phi-3's template closes every chat with one more token, which the longer chat does not have.
    shorter = codec.without_last_control(upto)
    if len(shorter) > start and text.startswith(shorter):
        return codec.end_of_control(text, start, len(shorter))
    return None


def _verify(chat: Chat, text: str, index: int, start: int | None, end: int | None) -> None:
    """Refuse by name what cannot be masked, or would teach something that is not served."""
    if start is None:
        raise DataError(_no_start(chat, text, index))
    if end is None:
        raise DataError(_rewritten(chat, index))
    shown, tail = text[start:end], chat.tail(index)
    if tail not in shown:
        raise DataError(
            f"{chat.name}: does not write the content of message {index} ({tail!r}); a template "
            f"for images wants a list of parts, use the text model's"
        )
    if not shown[shown.rindex(tail) + len(tail) :].strip():
        raise DataError(
            f"{chat.name}: writes nothing after an answer, so the model would never learn to "
            f"stop; add its end-of-turn token to the template"
        )


def _no_start(chat: Chat, text: str, index: int) -> str:
    before, plain = chat.prefix(index, prompt=True), chat.prefix(index, prompt=False)
    if before is None:
        return f"{chat.name}: cannot render the chat before message {index}, an assistant's"
    if plain is not None and text.startswith(plain) and before.startswith(plain):
        return (
            f"{chat.name}: generation starts with {before[len(plain) :]!r}, but the rendered "
            f"answer (message {index}) does not; write the answer with its thinking part, or use a "
            f"template with {{% generation %}}"
        )
    return _rewritten(chat, index)


def _rewritten(chat: Chat, index: int) -> str:
    return (
        f"{chat.name}: rewrites earlier messages as the chat goes on (message {index} of "
        f"{len(chat.messages)} is not where its prefix ends), so no mask is right; {WAY_OUT}"
    )
