"""Field templates of a recipe, "{package}: {meta.tags?}", filled from a raw row: no code in YAML.

`{a.b.0}` walks fields and list positions; `?` marks a field that may be missing or null; `{{` is
a brace.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from tuneloom.errors import ConfigError

PART = re.compile(r"\{\{|\}\}|\{([^{}?]+)(\?)?\}")
Fill = Callable[[Any], str]


class MissingField(KeyError):
    """A field that a template needs and the row has not."""


def compile_template(template: str, *, key: str) -> Fill:
    """A function from raw row to text; `key` is where the template stands, for the error."""
    if set("{}") & set(PART.sub("", template)):
        raise ConfigError(f"{key}: a brace without its pair; write {{{{ for one, got {template!r}")
    parts: list[str | tuple[tuple[str, ...], bool]] = []
    end = 0
    for match in PART.finditer(template):
        parts.append(template[end : match.start()])
        end = match.end()
        if match[0] in ("{{", "}}"):
            parts.append(match[0][0])
        else:
            parts.append((tuple(match[1].strip().split(".")), match[2] is not None))
    kept = [part for part in [*parts, template[end:]] if part != ""]

    def fill(row: Any) -> str:
        return "".join(
            part if isinstance(part, str) else as_text(walk(row, part[0], optional=part[1]))
            for part in kept
        )

    return fill


def walk(row: Any, path: tuple[str, ...], *, optional: bool = False) -> Any:
    """The value at `path`; raises MissingField where it is absent or null and not optional."""
    value = row
    for step in path:
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            value = None
        if value is None:
            if optional:
                return None
            raise MissingField(".".join(path))
    return value


def as_text(value: Any) -> str:
    """Text as it is, lists joined with commas, null as nothing, anything else as JSON."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(as_text(item) for item in value)
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
