"""The chat template of a tokenizer: from messages to text in which the trained turns are marked.

Strings from the record are guarded before they enter the template, so that nothing in them becomes
a control token, and the template's clock stands still. A template that does not end in time never
runs here (template_probe.py). Where turns lie is found in turns.py.
"""

import hashlib
import json
import re
import threading
from datetime import date
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from tuneloom.data.template_probe import faults
from tuneloom.data.tokenizer import Codec, name_of
from tuneloom.data.turns import Chat, Layout, Spans, prefix_layout, refuse_unwritten, tagged_layout
from tuneloom.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
TODAY = date(2024, 7, 26)
"""What `strftime_now` answers (Llama 3.1's own default date): ids may not change at midnight."""
CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
RENDERING = threading.Lock()
PROBE = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
OPTIONAL_FIELDS = {
    "tools": ("tools",),
    "tool_calls": ("tool_calls",),
    "reasoning_content": ("reasoning", "thinking"),
}
"""Fields that some templates read, and the names by which they do."""


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
        self._refuse_endless()
        self.end_of_turn = self._find_end_of_turn()

    @cached_property
    def serves_what_it_trains(self) -> bool:
        """Whether the generation prompt is how a rendered answer starts (R1's opens `<think>`)."""
        chat = self._chat({"messages": PROBE})
        before = chat.prefix(1, prompt=True)
        return before is not None and chat.whole(prompt=False)[0].startswith(before)

    def conversation(self, content: dict[str, Any]) -> str:
        """The whole chat, sealed, with START and END around what is trained."""
        layout = self._layout(self._chat(content), prompt=False)
        return self._codec.marked(layout.text, layout.marks(train=True))

    def prompt(self, content: dict[str, Any], upto: int) -> str:
        """messages[:upto] and the generation prompt, sealed, cut like `conversation`."""
        layout = self._layout(self._chat(content, upto), prompt=True)
        return self._codec.marked(layout.text, layout.marks(train=False))

    def _layout(self, chat: Chat, *, prompt: bool) -> Layout:
        if self.kind == "generation":
            layout = tagged_layout(chat, self._codec, self.end_of_turn, prompt=prompt)
        else:
            layout = prefix_layout(chat, self._codec, prompt=prompt)
        refuse_unwritten(chat, layout.text)
        return layout

    def _chat(self, content: dict[str, Any], upto: int | None = None) -> Chat:
        """Messages and tools as templates want them, control strings in them marked as text."""
        messages = [_template_message(message) for message in content["messages"][:upto]]
        self._refuse_unread(content)
        tools = self._protect(content.get("tools") or None)
        render = partial(self._render, tools)
        return Chat(self.name, render, self._protect(messages))

    def _refuse_unread(self, content: dict[str, Any]) -> None:
        """Fields that this template never looks at would be lost without a word."""
        given = {key for message in content["messages"] for key in message if message[key]}
        given |= {"tools"} if content.get("tools") else set()
        for field, names in OPTIONAL_FIELDS.items():
            if field in given and not any(name in self.source for name in names):
                raise DataError(
                    f"{self.name}: has no place for {field!r}, which this chat holds; remove the "
                    f"field or use a template that reads it"
                )

    def _protect(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._codec.protect(value)
        if isinstance(value, list):
            return [self._protect(inner) for inner in value]
        if isinstance(value, dict):
            return {self._protect(key): self._protect(inner) for key, inner in value.items()}
        return value

    def _render(self, tools: Any, messages: list[Any], prompt: bool) -> tuple[str, Spans]:
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
        except Exception as error:  # a template is a program of its author: anything may come
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

    def _refuse_endless(self) -> None:
        """Raise DataError for a template that a process with limits could not render."""
        variables = {name: str(value) for name, value in self._variables.items()}
        for fault in faults([self._without_tools, self._with_tools], variables):
            if fault:
                raise DataError(
                    f"{self.name}: the chat template {fault}; it is broken or hostile, take "
                    f"another one"
                )

    def _find_end_of_turn(self) -> str | None:
        """The control token after the answer of a two-message chat, if there is one."""
        text = self._chat({"messages": PROBE}).prefix(len(PROBE), prompt=False) or ""
        after = text.rpartition(PROBE[-1]["content"])[2]
        found = self._codec.control.search(after) if after != text else None
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


def template_source(tokenizer: Any) -> str:
    """Every chat template of the tokenizer as one string, empty when it has none."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return template if isinstance(template, str) else json.dumps(template, sort_keys=True)


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
