"""JSON without what readers disagree about: no key twice, no NaN, no nesting that ends a stack."""

import json
import re
from typing import Any

import orjson

from tuneloom.data.payloads import DEEPEST, deeper
from tuneloom.data.schema import Reject, unique

TOO_DEEP = f"nested too deeply; at most {DEEPEST} levels are read"
SPACED = re.compile(rb'"[ \t\r\n]+:')


def parse_line(raw: bytes) -> dict[str, Any]:
    """A JSON object whose keys are unique and whose numbers are finite; raises Reject.

    orjson reads the usual row; what it refuses, or might read otherwise, the slow parser judges.
    """
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return parse_slowly(raw)
    _refuse_deep(value, raw)
    if type(value) is not dict or SPACED.search(raw):
        return parse_slowly(raw)
    # Every key stands before a colon: as many keys as `":` in the bytes, and none stands twice.
    return value if _keys(value) == raw.count(b'":') else parse_slowly(raw)


def _keys(value: Any) -> int:
    """Keys at any depth; below nothing if there is a number that orjson may have rounded."""
    keys = 0
    if type(value) is dict:
        keys, value = len(value), value.values()
    elif type(value) is not list:
        return -(1 << 60) if type(value) is float else 0
    for item in value:
        if type(item) is not str:
            keys += _keys(item)
    return keys


def parse_slowly(raw: bytes) -> dict[str, Any]:
    """The same by the standard library, with a reason for whatever is wrong."""
    try:
        value = DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Reject("invalid_utf8", f"byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise Reject("invalid_json", TOO_DEEP) from None
    except json.JSONDecodeError as error:
        raise Reject("invalid_json", f"{error.msg} at character {error.pos}") from None
    except Reject:
        raise
    except ValueError as error:  # an integer of more than 4,300 digits
        raise Reject("invalid_json", str(error)) from None
    _refuse_deep(value, raw)
    if not isinstance(value, dict):
        raise Reject("not_an_object", f"expected an object, got {type(value).__name__}")
    return value


def _finite(constant: str) -> float:
    raise Reject("not_finite", f"{constant} is no JSON number")


DECODER = json.JSONDecoder(object_pairs_hook=unique, parse_constant=_finite)


def _refuse_deep(value: Any, raw: bytes) -> None:
    """Raise Reject beyond DEEPEST levels, whatever Python's stack would have held."""
    if raw.count(b"{") + raw.count(b"[") > DEEPEST and deeper(value, DEEPEST):
        raise Reject("invalid_json", TOO_DEEP)
