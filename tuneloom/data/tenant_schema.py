"""JSON Schemas: the data owner's, asked about each raw row, and the one an extraction row holds."""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tuneloom.data.recognisers import Bounded
from tuneloom.data.schema import Reject
from tuneloom.errors import ConfigError

MOST_REFERENCES = 20_000
"""Followed for one answer; twenty definitions that each name the next twice would be a million."""
REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")


class NoSchema(ValueError):
    """What was given as a schema is none, or refers to something outside itself."""


def schema_check(path: str) -> Callable[[dict[str, Any]], None]:
    """A function that raises Reject for a row that breaks the schema; references stay local."""
    try:
        conforms = _checker(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, NoSchema) as error:
        raise ConfigError(f"data.json_schema: {path} is no JSON Schema ({error})") from None

    def check(row: dict[str, Any]) -> None:
        try:
            conforms(row, "row")
        except NoSchema as error:
            raise ConfigError(f"data.json_schema: {path} {error}") from None

    return check


def refuse_unlike(answer: Any, schema: dict[str, Any]) -> None:
    """Raise Reject for an answer that does not follow the row's own schema, or for no schema.

    A row's schema is whoever's wrote the row: its patterns and its references cost bounded time.
    """
    try:
        _checker(json.dumps(schema, sort_keys=True), bounded=True)(answer, "answer")
    except NoSchema as error:
        raise Reject("no_schema", f"schema: {error}") from None


@lru_cache(maxsize=64)
def _checker(text: str, *, bounded: bool = False) -> Callable[[Any, str], None]:
    """A function of a value and its name, for one schema; raises NoSchema."""
    try:
        import jsonschema
        import referencing
    except ImportError:
        raise ConfigError(
            "data: jsonschema is not installed, which JSON Schemas need; "
            "pip install 'tuneloom[data]'"
        ) from None
    try:
        schema = json.loads(text)
        if isinstance(schema, dict) and not isinstance(schema.get("$schema", ""), str):
            raise NoSchema("$schema: expected text")
        cls = jsonschema.validators.validator_for(schema)
        cls.check_schema(schema)
    except (ValueError, RecursionError, jsonschema.SchemaError) as error:
        raise NoSchema(str(getattr(error, "message", error))) from None
    bounds = Bounds()
    references = {n: _of_text(n, cls.VALIDATORS[n]) for n in REFERENCES if n in cls.VALIDATORS}
    own = bounds.keywords(references) if bounded else {"pattern": _search} | references
    cls = jsonschema.validators.extend(cls, own)
    validator = cls(schema, registry=referencing.Registry())  # the default one asks the network

    def conforms(value: Any, name: str) -> None:
        bounds.left = MOST_REFERENCES
        try:
            fault = next(validator.iter_errors(value), None)
        except referencing.exceptions.Unresolvable as error:
            raise NoSchema(f"refers to {error.ref}, not in it") from None
        except RecursionError:
            raise NoSchema("refers to itself without end") from None
        except OverflowError:  # of multipleOf, which divides
            raise Reject("schema", f"{name}: holds a number too large to check") from None
        if fault is not None:
            where = ".".join(map(str, fault.absolute_path)) or name
            # The library's message would quote the row's own text, which may be personal.
            raise Reject("schema", f"{where}: breaks {fault.validator!r} of the schema")

    return conforms


def _of_text(name: str, follow: Any) -> Any:
    """A keyword that refers, with the check of its type that draft 4's own schema lacks."""

    def checked(validator: Any, reference: Any, *rest: Any) -> Any:
        if not isinstance(reference, str):
            raise NoSchema(f"{name}: expected text")
        return follow(validator, reference, *rest)

    return checked


def _search(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[Exception]:
    """The keyword `pattern` of the data owner's schema, in bounded time on a stranger's text."""
    import jsonschema

    if validator.is_type(value, "string"):
        matches = Bounded(pattern, "data.json_schema").finditer(value)
        if next(matches, None) is None:
            yield jsonschema.ValidationError("does not match")


class Bounds:
    """Keywords that a stranger's schema may not use, or not without end."""

    def __init__(self) -> None:
        self.left = MOST_REFERENCES

    def keywords(self, references: Mapping[str, Any]) -> dict[str, Any]:
        """What stands in for the library's own keywords."""
        return {"pattern": self._refuse, "patternProperties": self._refuse} | {
            name: self._counted(follow) for name, follow in references.items()
        }

    def _refuse(self, *_: Any) -> None:
        raise NoSchema("pattern and patternProperties are not read in a row's schema")

    def _counted(self, follow: Any) -> Any:
        def counted(*args: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise NoSchema(f"more than {MOST_REFERENCES:,} references for one answer")
            return follow(*args)

        return counted
