"""One record of training data, in one of six payloads, and its id.

`parse(row)` checks a raw row and gives a `Record`; everything that cannot be trained on as it
stands is a DataError with the place, never a traceback and never silently ignored.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from tuneloom.data import payloads
from tuneloom.data.payloads import DEEPEST, deeper
from tuneloom.errors import DataError

Kind = Literal[
    "messages", "prompt_completion", "text", "preference", "classification", "extraction"
]
Format = Literal[
    "auto", "messages", "prompt_completion", "text", "preference", "classification", "extraction"
]

ROLES = ("system", "user", "assistant", "tool", "developer")
PAYLOADS: dict[Kind, tuple[str, ...]] = {
    "messages": ("messages", "tools"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "preference": ("prompt", "chosen", "rejected"),
    "classification": ("input", "label", "labels"),
    "extraction": ("input", "schema", "answer"),
}
SIGNS: dict[Kind, tuple[str, ...]] = {
    "messages": ("messages", "tools"),
    "prompt_completion": ("completion",),
    "text": ("text",),
    "preference": ("chosen", "rejected"),
    "classification": ("labels",),
    "extraction": ("schema",),
}
"""Keys that only one payload has: what a row is told by."""
EXPECTED = (
    "messages, prompt and completion, or text; prompt, chosen and rejected; "
    "input, label and labels; or input, schema and answer"
)
ENVELOPE = ("id", "source", "meta")
"""Keys of a raw row that are about the content and not part of it."""
MESSAGE_KEYS = {
    "role": str,
    "content": str,
    "train": bool,
    "name": str,
    "tool_calls": list,
    "tool_call_id": str,
    "reasoning_content": str,
}
RESERVED = re.compile("[\ufdd0-\ufddf]")
"""Unicode noncharacters, never meant for interchange; render.py marks control tokens with them."""


@dataclass(frozen=True)
class Record:
    """`content` holds only the keys of its kind; `id` is the sha256 of its canonical JSON."""

    id: str
    content: dict[str, Any]
    source: str
    kind: Kind


def canonical(content: Any) -> str:
    """Sorted keys, no spaces, real Unicode: the text that a record's id is the sha256 of."""
    return json.dumps(
        content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def content_id(content: Any) -> str:
    """sha256 (hex) of the canonical JSON of `content`."""
    return text_digest(canonical(content))


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def parse(obj: Any, format: Format = "auto", *, source: str = "", where: str = "") -> Record:
    """Check one raw row; `where` (path:line) leads messages, `source` is the default source."""
    where = where or source or "record"
    if not isinstance(obj, dict):
        raise DataError(f"{where}: expected a JSON object a row, got {_shown(obj)}")
    _refuse_unstorable(obj, where)
    kind = _kind(obj, format, where)
    content = {key: obj[key] for key in PAYLOADS[kind] if key in obj}
    if kind == "messages":
        _check_messages(content["messages"], where)
        _check_tools(content.get("tools"), where)
    elif kind in ("preference", "classification", "extraction"):
        try:
            content = payloads.normal(kind, content)
        except payloads.Fault as fault:
            raise DataError(f"{where}: {fault.sentence}") from None
        _refuse_unstorable(content, where)  # what was read from a text of JSON
    else:
        for key in PAYLOADS[kind]:
            _check_text(content[key], key, where)
    given = obj.get("source", source)
    if not isinstance(given, str):
        raise DataError(f"{where}: source: expected a string, got {_shown(given)}")
    return Record(content_id(content), content, given, kind)


def loads(line: str, where: str) -> Any:
    """JSON of one line; refuses NaN, infinities and nesting that Python cannot follow."""

    def refuse(constant: str) -> None:
        raise DataError(f"{where}: {constant} is not JSON; write null or a number")

    try:
        return json.loads(line, parse_constant=refuse)
    except RecursionError:
        raise DataError(f"{where}: nested too deeply; at most {DEEPEST} levels are read") from None
    except json.JSONDecodeError as error:
        near = line[max(0, error.pos - 20) : error.pos + 20]
        raise DataError(
            f"{where}: broken JSON at column {error.colno} ({error.msg}), near {near!r}"
        ) from None
    except DataError:
        raise
    except ValueError as error:  # an integer of more than 4,300 digits
        raise DataError(f"{where}: broken JSON ({error})") from None


def _kind(obj: dict[str, Any], format: Format, where: str) -> Kind:
    """Which payload this row holds; a row that could be two is refused."""
    found = [kind for kind, keys in SIGNS.items() if any(key in obj for key in keys)]
    if not found and "prompt" in obj:
        found = ["prompt_completion"]
    if len(found) > 1:
        raise DataError(
            f"{where}: holds {' and '.join(found)} at once, which is ambiguous; keep one of them"
        )
    wanted = found[0] if format == "auto" and found else format
    if wanted == "auto" or wanted not in found:
        expected = EXPECTED if wanted == "auto" else wanted
        raise DataError(f"{where}: expected {expected}, found the keys {sorted(map(str, obj))}")
    known = (*PAYLOADS[wanted], *ENVELOPE)
    missing = [key for key in PAYLOADS[wanted] if key not in obj and key != "tools"]
    unknown = [key for key in obj if key not in known]
    if missing:
        raise DataError(f"{where}: {wanted} needs the key {missing[0]!r}, found {sorted(obj)}")
    if unknown:
        raise DataError(
            f"{where}: unknown key {unknown[0]!r} beside {wanted}; put it under 'meta' or remove it"
        )
    return wanted


def _check_messages(messages: Any, where: str) -> None:
    """Roles, types and non-empty answers of a chat."""
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{where}: messages: expected a list of at least one, got {_shown(messages)}"
        )
    for index, message in enumerate(messages):
        _check_message(message, f"{where}: messages[{index}]")


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict):
        raise DataError(f"{where}: expected an object with role and content, got {_shown(message)}")
    for key, value in message.items():
        if key not in MESSAGE_KEYS:
            hint = "; set train: true or false" if key in ("weight", "loss") else ""
            raise DataError(f"{where}.{key}: unknown key; known are {list(MESSAGE_KEYS)}{hint}")
        if value is not None and not isinstance(value, MESSAGE_KEYS[key]):
            raise DataError(
                f"{where}.{key}: expected {MESSAGE_KEYS[key].__name__}, got {_shown(value)}"
            )
    role = message.get("role")
    if role not in ROLES:
        raise DataError(f"{where}.role: expected one of {list(ROLES)}, got {_shown(role)}")
    if "train" in message and role != "assistant" and message["train"]:
        raise DataError(f"{where}.train: only assistant messages are trained on, this is {role}")
    if message.get("tool_calls"):
        _check_tool_calls(message, where)
    elif role == "assistant" and not (message.get("content") or "").strip():
        raise DataError(f"{where}.content: empty assistant answer; remove the row or fill it in")
    elif message.get("content") is None:
        raise DataError(f"{where}.content: expected str, got {_shown(message.get('content'))}")


def _check_tool_calls(message: dict[str, Any], where: str) -> None:
    """The OpenAI shape that chat templates read: [{"function": {"name", "arguments"}}]."""
    if message["role"] != "assistant":
        raise DataError(f"{where}.tool_calls: only an assistant calls tools")
    for index, call in enumerate(message["tool_calls"]):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{where}.tool_calls[{index}]: expected "
                f'{{"function": {{"name", "arguments"}}}}, got {_shown(call)}'
            )
        if not isinstance(function.get("arguments", {}), dict | str):
            raise DataError(
                f"{where}.tool_calls[{index}].function.arguments: expected an object, "
                f"got {_shown(function['arguments'])}"
            )


def _check_tools(tools: Any, where: str) -> None:
    if tools is None:
        return
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: tools: expected a list of JSON schemas, got {_shown(tools)}")


def _check_text(value: Any, key: str, where: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{where}: {key}: expected a string, got {_shown(value)}")
    if key != "prompt" and not value.strip():
        raise DataError(f"{where}: {key}: empty, nothing to train on; remove the row")


def _refuse_unstorable(obj: dict[Any, Any], where: str) -> None:
    """Lone surrogates, NaN, odd types, deep nesting and reserved characters, in one pass."""
    if deeper(obj, DEEPEST):
        raise DataError(f"{where}: nested too deeply; at most {DEEPEST} levels are read")
    try:
        text = canonical(obj)
        text.encode()
    except UnicodeEncodeError as error:
        bad = f"U+{ord(error.object[error.start]):04X}"
        raise DataError(f"{where}: holds the lone surrogate {bad}; repair the text") from None
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: cannot be written as JSON ({error})") from None
    reserved = RESERVED.search(text)
    if reserved:
        code = f"U+{ord(reserved.group()):04X}"
        raise DataError(f"{where}: holds the noncharacter {code}, reserved here; remove it")


def _shown(value: Any) -> str:
    """A value short enough for a sentence."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
