"""The one redactor for what we print and write about a run: known secret shapes, and this
process's own.
"""

import functools
import os
import re
import sys
import threading
import traceback
from typing import Any

MASK = "[secret]"
NAMED = re.compile(
    r"(?i)token|secret|passw|passphrase|pseudonym|credential|(?:api|access|private)_?key"
)
"""Variables with such a name hold secrets, whatever shape their value has."""
SHORTEST = 8


def redact(text: str) -> str:
    """`text` with every credential of known form, and every value of a secret variable, masked."""
    from tuneloom.data.secrets import find_secrets  # 0.2 s of patterns

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


def redact_tracebacks() -> None:
    """From here on, what nobody catches is printed without secrets, in threads too."""

    def to_stderr(kind: Any, error: Any, trace: Any) -> None:
        sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))

    sys.excepthook = to_stderr
    threading.excepthook = lambda args: to_stderr(args.exc_type, args.exc_value, args.exc_traceback)


@functools.cache
def _own() -> tuple[str, ...]:
    """Values of secret variables, longest first; files (…_PATH, …_FILE, a path there) are none."""
    values = {
        value for name, value in os.environ.items()
        if NAMED.search(name) and not name.endswith(("_PATH", "_FILE", "_MODE"))
        and len(value) >= SHORTEST and not (os.path.isabs(value) and os.path.exists(value))
    }  # fmt: skip
    return tuple(sorted(values, key=len, reverse=True))
