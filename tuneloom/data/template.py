"""Where the assistant's answers lie in a chat that a Hugging Face template rendered.

A template with `{% generation %}` says so itself. For any other, the text before answer i is the
rendering of messages[:i] with the generation prompt, and the text up to its end is the rendering of
messages[:i+1]; both must be prefixes of the whole conversation, or the template is refused by name.
An answer ends with its end-of-turn token: the last control token of its part when only whitespace
follows it (ChatML's newline is not trained), else with its part.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

from tuneloom.data.tokenizer import CUT, END, START, Codec, name_of
from tuneloom.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
TODAY = date(2024, 7, 26)
"""What `strftime_now` answers (Llama 3.1's own default date): ids may not change at midnight."""
CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
RENDERING = threading.Lock()
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


class ChatTemplate:
    """The chat template of one tokenizer; `kind` is how spans are found: generation or prefix."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", codec: Codec) -> None:
        self._tokenizer, self._codec = tokenizer, codec
        self.source = template_source(tokenizer)
        if not self.source:
            raise DataError(
                f"{name_of(tokenizer)}: the tokenizer has no chat template, which `messages` need; "
                f"add chat_template.jinja to the folder or use prompt/completion rows"
            )
        self.kind = "generation" if GENERATION.search(self.source) else "prefix"
        self.name = f"{name_of(tokenizer)} (template {digest_of(self.source)[:12]})"
        self._without_tools, self._with_tools = self._jinja(None), self._jinja([{}])
        self._variables = dict(tokenizer.special_tokens_map)
        self.end_of_turn = self._find_end_of_turn()

    def conversation(self, content: dict[str, Any]) -> str:
        """The whole chat, sealed, with START and END around what is trained."""
        messages, tools = self._inputs(content)
        text, turns = self._turns(messages, tools, prompt=False)
        return self._codec.marked(text, _marks(turns))

    def prompt(self, content: dict[str, Any], upto: int) -> str:
        """messages[:upto] and the generation prompt, sealed, cut like `conversation`."""
        messages, tools = self._inputs(content)
        text, turns = self._turns(messages[:upto], tools, prompt=True)
        cuts = [Turn(turn.start, turn.end, False) for turn in turns]
        return self._codec.marked(text, _marks(cuts))

    def _inputs(self, content: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Any] | None]:
        """Messages and tools as templates want them, control strings in them marked as text."""
        messages = [_template_message(message) for message in content["messages"]]
        return self._protect(messages), self._protect(content.get("tools") or None)

    def _protect(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._codec.protect(value)
        if isinstance(value, list):
            return [self._protect(inner) for inner in value]
        if isinstance(value, dict):
            return {self._protect(key): self._protect(inner) for key, inner in value.items()}
        return value

    def _turns(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, *, prompt: bool
    ) -> tuple[str, list[Turn]]:
        flags = [message.pop("train", None) for message in messages]
        if self.kind == "generation":
            return self._tagged_turns(messages, tools, flags, prompt=prompt)
        return self._prefix_turns(messages, tools, flags, prompt=prompt)

    def _tagged_turns(
        self, messages: list[Any], tools: Any, flags: list[bool | None], *, prompt: bool
    ) -> tuple[str, list[Turn]]:
        """Spans from the template's own `{% generation %}` blocks, one an assistant message."""
        text, spans = self._render(messages, tools, prompt=prompt)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(spans) != len(answers):
            raise DataError(
                f"{self.name}: {{% generation %}} marks {len(spans)} spans for {len(answers)} "
                f"assistant messages; put each assistant message in one generation block"
            )
        turns = []
        for index, (start, end) in zip(answers, spans, strict=True):
            tail = messages[index].get("content", "").strip()[-20:]
            if tail not in text[start:end]:
                raise DataError(
                    f"{self.name}: the {{% generation %}} block of message {index} does not "
                    f"hold its content (Jinja misplaces a block inside a macro); move it out"
                )
            turns.append(Turn(start, self._with_end_of_turn(text, end), flags[index] is not False))
        return text, turns

    def _with_end_of_turn(self, text: str, end: int) -> int:
        """`end` of a generation block, moved behind an end-of-turn token that was left outside."""
        if not self.end_of_turn or not text.startswith(self.end_of_turn, end):
            return end
        end += len(self.end_of_turn)
        blank = len(text) - end - len(text[end:].lstrip())
        return end + blank if self.end_of_turn in self._codec.swallows else end

    def _prefix_turns(
        self, messages: list[Any], tools: Any, flags: list[bool | None], *, prompt: bool
    ) -> tuple[str, list[Turn]]:
        """Spans from renderings of prefixes, each verified to be a prefix of the whole."""
        text, _ = self._render(messages, tools, prompt=prompt)
        turns = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start, end = self._span(text, messages, tools, index, prompt=prompt)
            train = flags[index] is not False
            if train and not prompt and (start is None or end is None):
                raise DataError(
                    f"{self.name}: rewrites earlier messages as the chat goes on (message {index} "
                    f"of {len(messages)} is not where its prefix ends), so no mask is right; "
                    f"{WAY_OUT}"
                )
            if start is not None:
                turns.append(Turn(start, end, train))
        return text, turns

    def _span(
        self, text: str, messages: list[Any], tools: Any, index: int, *, prompt: bool
    ) -> tuple[int | None, int | None]:
        """Start and end of message `index` in `text`, None for what its prefixes do not show."""
        before = self._prefix(messages[:index], tools, prompt=True)
        if before is None or not text.startswith(before):
            return None, None
        whole = index == len(messages) - 1 and not prompt
        upto = text if whole else self._prefix(messages[: index + 1], tools, prompt=False)
        start = len(before)
        if upto is None or len(upto) <= start or not text.startswith(upto):
            return start, None
        end = self._codec.end_of_control(text, start, len(upto))
        return start, len(upto) if end is None else end

    def _prefix(self, messages: list[Any], tools: Any, *, prompt: bool) -> str | None:
        """A rendering, or None where the template refuses to stop there."""
        try:
            return self._render(messages, tools, prompt=prompt)[0]
        except DataError:
            return None

    def _render(
        self, messages: list[Any], tools: Any, *, prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        typed_render: Any = render_jinja_template  # annotated as str, gives texts and spans
        try:
            # The compiled template is shared, and its span tracker serves one rendering at a time.
            with RENDERING:
                texts, spans = typed_render(
                    conversations=[messages],
                    tools=tools,
                    chat_template=self._with_tools if tools else self._without_tools,
                    return_assistant_tokens_mask=self.kind == "generation",
                    add_generation_prompt=prompt,
                    **self._variables,
                )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise DataError(f"{self.name}: cannot render this chat: {error}") from error
        return str(texts[0]), [(int(start), int(end)) for start, end in spans[0]] if spans else []

    def _jinja(self, tools: list[Any] | None) -> str:
        """The template for chats with or without tools, its clock stopped at TODAY."""
        try:
            chosen = str(self._tokenizer.get_chat_template(tools=tools))
        except ValueError as error:
            raise DataError(f"{self.name}: {error}") from error
        stopped = CLOCK.sub(lambda call: repr(TODAY.strftime(call.group(2))), chosen)
        if "strftime_now(" in stopped:
            raise DataError(f"{self.name}: asks the clock, so its tokens change from day to day")
        return stopped

    def _find_end_of_turn(self) -> str | None:
        """The control token after the answer of a two-message chat, if there is one."""
        chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        try:
            text, _ = self._render(chat, None, prompt=False)
        except DataError:  # a template may insist on a system message; its rows will show it
            return None
        found = self._codec.control.search(text, text.rfind("answer"))
        return found.group() if found else None


def _template_message(message: dict[str, Any]) -> dict[str, Any]:
    """Without nulls (templates print `None`), tool arguments as objects (templates call tojson)."""
    kept = {key: value for key, value in message.items() if value is not None}
    if "tool_calls" in kept:
        kept["tool_calls"] = [_template_call(call) for call in kept["tool_calls"]]
    return kept


def _template_call(call: dict[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"])
        except ValueError:
            raise DataError(
                f"tool call {function['name']}: arguments are not JSON: "
                f"{function['arguments'][:60]!r}"
            ) from None
    return {**call, "function": function}


def _marks(turns: list[Turn]) -> list[tuple[int, str]]:
    """START and END of trained turns, CUT at the borders of the others."""
    marks = []
    for turn in turns:
        marks.append((turn.start, START if turn.train else CUT))
        if turn.end is not None:
            marks.append((turn.end, END if turn.train else CUT))
    return marks


def template_source(tokenizer: Any) -> str:
    """Every chat template of the tokenizer as one string, empty when it has none."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return template if isinstance(template, str) else json.dumps(template, sort_keys=True)


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
