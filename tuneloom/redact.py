"""The one redactor for what we print and write about a run: known secret shapes, and this
process's own.
"""

import functools
import os
import sys
import threading
import traceback
from typing import Any

from tuneloom.yaml_guard import SECRET_NAME

MASK = "[secret]"
SHORTEST = 8


def redact(text: str) -> str:
    """`text` with every credential of known form, and every value of a secret variable, masked."""
    from tuneloom.data.secrets import find_secrets  # 0.2 s of patterns

    for value in own_secrets():
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
def own_secrets() -> dict[str, str]:
    """Values of this process's secret variables with their names, longest first; the path of a file
    that is there is none.
    """
    values = {
        value: name for name, value in os.environ.items()
        if SECRET_NAME.search(name) and len(value) >= SHORTEST
        and not (os.path.isabs(value) and os.path.exists(value))
    }  # fmt: skip
    return dict(sorted(values.items(), key=lambda item: len(item[0]), reverse=True))
