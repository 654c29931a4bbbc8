"""The one redactor for what we print and write about a run: known secret shapes, and this
process's own.
"""

import functools
import os
import re
from typing import Any

from tuneloom.data.secrets import find_secrets

MASK = "[secret]"
NAMED = re.compile(r"(?i)token|secret|passw|api_?key|credential|access_?key")
"""Variables with such a name hold secrets, whatever shape their value has."""
SHORTEST = 8


def redact(text: str) -> str:
    """`text` with every credential of known form, and every value of a secret variable, masked."""
    for value in _own():
        text = text.replace(value, MASK)
    for found in sorted(find_secrets(text), key=lambda f: f.start, reverse=True):
        text = text[: found.start] + MASK + text[found.end :]
    return text


def redacted(value: Any) -> Any:
    """The same for every string in a tree of mappings and lists, keys too."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redacted(key): redacted(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(inner) for inner in value]
    return value


@functools.cache
def _own() -> tuple[str, ...]:
    """Values of secret variables, longest first; names of files (…_PATH, …_FILE) are none."""
    values = {
        value for name, value in os.environ.items()
        if NAMED.search(name) and not name.endswith(("_PATH", "_FILE", "_MODE"))
        and len(value) >= SHORTEST and not os.path.isabs(value)
    }  # fmt: skip
    return tuple(sorted(values, key=len, reverse=True))
