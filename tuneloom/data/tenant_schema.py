"""The data owner's own JSON Schema, asked about each raw row before it is mapped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuneloom.data.schema import Reject
from tuneloom.errors import ConfigError


def schema_check(path: str) -> Callable[[dict[str, Any]], None]:
    """A function that raises Reject for a row that breaks the schema; references stay local."""
    try:
        import jsonschema
        import referencing
    except ImportError:
        raise ConfigError(
            "data.json_schema: jsonschema is not installed; pip install 'tuneloom[data]'"
        ) from None
    try:
        schema = json.loads(Path(path).read_text(encoding="utf-8"))
        cls = jsonschema.validators.validator_for(schema)
        cls.check_schema(schema)
    except (OSError, ValueError, jsonschema.SchemaError) as error:
        reason = getattr(error, "message", error)
        raise ConfigError(f"data.json_schema: {path} is no JSON Schema ({reason})") from None
    validator = cls(schema, registry=referencing.Registry())  # the default one asks the network

    def conforms(row: dict[str, Any]) -> None:
        try:
            fault = next(validator.iter_errors(row), None)
        except referencing.exceptions.Unresolvable as error:
            raise ConfigError(
                f"data.json_schema: {path} refers to {error.ref}, not in it"
            ) from None
        if fault is not None:
            where = ".".join(map(str, fault.absolute_path)) or "row"
            # The library's message would quote the row's own text, which may be personal.
            raise Reject("schema", f"{where}: breaks {fault.validator!r} of the schema")

    return conforms
