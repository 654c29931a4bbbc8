"""From a raw row to the content of a record: by a recipe's templates, or by the shape of the row.

Shapes known without a recipe: messages (OpenAI), conversations (ShareGPT), instruction and output
(Alpaca), prompt and completion, text, prompt with chosen and rejected, input with label and labels
or with schema and answer.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tuneloom.data.fields import as_text, compile_template, walk
from tuneloom.data.records import PAYLOADS, Kind
from tuneloom.errors import ConfigError

Content = dict[str, Any]
Build = Callable[[Any], Any]
COMPLEX: tuple[Kind, ...] = ("preference", "classification", "extraction")
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
                  "chatgpt": "assistant", "bing": "assistant", "system": "system",
                  "tool": "tool", "function_response": "tool"}  # fmt: skip


class UnknownShape(ValueError):
    """A row that is none of the shapes, or a turn whose role nobody knows."""


def mapper(record: Mapping[str, Any] | None) -> Callable[[Mapping[str, Any]], Content]:
    """The function that makes a record's content from a raw row."""
    return recognise if record is None else _node(record, "data.record")


def _node(node: Any, key: str) -> Build:
    """Compile one node of the recipe: a template, a list, an object, or `each`."""
    if isinstance(node, str):
        return compile_template(node, key=key)
    if isinstance(node, list):
        items = [_node(item, f"{key}.{i}") for i, item in enumerate(node)]
        return lambda row: [item(row) for item in items]
    if isinstance(node, Mapping) and "each" in node:
        return _each(node, key)
    if isinstance(node, Mapping) and "choose" in node:
        return _choose(node, key)
    if isinstance(node, Mapping):
        fields = {name: _node(inner, f"{key}.{name}") for name, inner in node.items()}
        return lambda row: {name: field(row) for name, field in fields.items()}
    return lambda row: node


def _each(node: Mapping[str, Any], key: str) -> Build:
    """`{each: turns, make: {...}}`: one object for every item of the list at `turns`."""
    if set(node) != {"each", "make"}:
        raise ConfigError(f"{key}: expected the keys each and make, got {sorted(node)}")
    path, make = tuple(str(node["each"]).split(".")), _node(node["make"], f"{key}.make")

    def build(row: Any) -> list[Any]:
        items = walk(row, path)
        if not isinstance(items, list):
            raise UnknownShape(f"{'.'.join(path)} is no list")
        return [make(item) for item in items]

    return build


def _choose(node: Mapping[str, Any], key: str) -> Build:
    """`{choose: "{from}", among: {human: user}}`: a value translated by a table."""
    if set(node) != {"choose", "among"}:
        raise ConfigError(f"{key}: expected the keys choose and among, got {sorted(node)}")
    fill, table = compile_template(node["choose"], key=key), dict(node["among"])

    def build(row: Any) -> Any:
        value = fill(row)
        if value not in table:
            raise UnknownShape(f"{value[:40]!r} is not among {sorted(table)}")
        return table[value]

    return build


def recognise(row: Mapping[str, Any]) -> Content:
    """The content of a row in one of the common shapes; raises UnknownShape."""
    if "messages" in row:
        tools = {"tools": row["tools"]} if row.get("tools") else {}
        return {"messages": row["messages"]} | tools
    if "conversations" in row:
        return {"messages": _sharegpt(row)}
    if "instruction" in row and "output" in row:
        asked = [as_text(row["instruction"]), as_text(row.get("input"))]
        return {"prompt": "\n\n".join(part for part in asked if part), "completion": row["output"]}
    for kind in COMPLEX:
        if all(key in row for key in PAYLOADS[kind]):
            return {key: row[key] for key in PAYLOADS[kind]}
    if "prompt" in row and "completion" in row:
        return {"prompt": row["prompt"], "completion": row["completion"]}
    if "text" in row:
        return {"text": row["text"]}
    raise UnknownShape(f"fields {sorted(map(str, row))[:8]} are no shape known without data.record")


def _sharegpt(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """ShareGPT turns (`from`, `value`) as messages."""
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise UnknownShape("conversations is no list")
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for turn in turns:
        if not isinstance(turn, Mapping) or str(turn.get("from")) not in SHAREGPT_ROLES:
            raise UnknownShape("a turn whose `from` is none of " + ", ".join(SHAREGPT_ROLES))
        messages.append({"role": SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")})
    return messages
