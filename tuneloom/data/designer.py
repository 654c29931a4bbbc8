"""Rows by NVIDIA NeMo Data Designer, an extra, from a design of its own columns.

A design is Data Designer's YAML with `columns` and, if wanted, `constraints`: samplers,
expressions and answers of the model `teacher`. The seeds, the model and its endpoint come from
`tuneloom synthesise`, so a design can neither reach another host nor run code, and the library's
telemetry, which is on by default, is off (data_designer/engine/models/telemetry.py, 0.9.7), as is
the download of a tokenizer.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from tuneloom.errors import ConfigError, DataError
from tuneloom.yaml_guard import check_file

if TYPE_CHECKING:
    from tuneloom.data.synthesise import TeacherConfig

# Not `custom` (code), `validation` (runs linters or posts to a URL), `image`, `embedding`.
COLUMNS = ("sampler", "expression", "llm-text", "llm-code", "llm-structured", "llm-judge")
SEED = "tuneloom_seed"
ROWS_A_BATCH = 64
"""What an interrupted run has to ask again at most, in rows."""


def read_design(path: Path) -> dict[str, Any]:
    """The design, checked; raises ConfigError for what a design may not hold."""
    if not path.is_file():
        raise ConfigError(f"design: no file {path}; write one, docs/data.md has an example")
    check_file(path)
    design = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(design, dict) or not isinstance(design.get("columns"), list):
        raise ConfigError(f"design: {path} has no list `columns`")
    if other := sorted(set(design) - {"columns", "constraints"}):
        raise ConfigError(
            f"design: {path} has {other[0]!r}; only columns and constraints stand in a design, "
            "seeds and the model come from seeds= and teacher.*"
        )
    for column in design["columns"]:
        kind = column.get("column_type") if isinstance(column, dict) else None
        if kind not in COLUMNS:
            raise ConfigError(
                f"design: {path} has a column of type {kind!r}; use one of {', '.join(COLUMNS)}"
            )
        if column.get("model_alias", "teacher") != "teacher" or column.get("tool_alias"):
            raise ConfigError(
                f"design: {path}, column {column.get('name')!r}: model_alias must be 'teacher', "
                "and there are no tools"
            )
    return design


def answers(
    design: dict[str, Any], seeds: list[dict[str, Any]], *, teacher: "TeacherConfig",
    parallel: int, cache: Path,
) -> Iterator[tuple[int, dict[str, Any]]]:  # fmt: skip
    """The columns made for each seed, as (its position, columns); a row that failed is left out.

    A folder under `cache` keeps batches that are done: the same call goes on from them. Raises
    ConfigError without the extra or for a design that the library refuses, DataError where it
    makes no rows.
    """
    lines = "".join(json.dumps({SEED: i} | seed) + "\n" for i, seed in enumerate(seeds))
    digest = hashlib.sha256(f"{json.dumps(design)} {teacher} {lines}".encode()).hexdigest()
    folder = cache / f"design-{digest[:16]}"
    dd, interface, errors = _import(folder)
    source = folder / "seeds.jsonl"
    source.write_text(lines, "utf-8")
    names = [str(column["name"]) for column in design["columns"] if not column.get("drop")]
    config = _config(dd, errors, design, source, teacher=teacher, parallel=parallel)
    maker = interface.DataDesigner(
        folder / "made",
        model_providers=[dd.ModelProvider(
            name="teacher", endpoint=teacher.url,
            api_key="OPENAI_API_KEY" if os.environ.get("OPENAI_API_KEY") else "none",
        )],
        managed_assets_path=folder / "home", auto_configure_logging=False,
    )  # fmt: skip
    maker.set_run_config(dd.RunConfig(buffer_size=ROWS_A_BATCH, otel_metrics_port=None))
    try:
        maker.validate(config)
    except errors.DataDesignerError:  # it prints its reasons, and its exception has none
        raise ConfigError("design: Data Designer refuses it, for the reasons above") from None
    try:
        made = maker.create(
            config, num_records=len(seeds), dataset_name="rows",
            resume=dd.ResumeMode.IF_POSSIBLE,
        ).load_dataset()  # fmt: skip
    except errors.DataDesignerError as error:
        raise DataError(
            f"design: Data Designer made no rows ({_sentence(error)}); batches that are done "
            "are kept, the same command goes on from here"
        ) from None
    for row in made.to_dict(orient="records"):
        yield int(row[SEED]), {name: _plain(row[name]) for name in names if name in row}


def _config(
    dd: Any, errors: Any, design: dict[str, Any], source: Path, *, teacher: "TeacherConfig",
    parallel: int,
) -> Any:  # fmt: skip
    model = {
        "alias": "teacher", "model": teacher.model, "provider": "teacher",
        "skip_health_check": True,
        "inference_parameters": {
            "temperature": teacher.temperature, "max_tokens": teacher.max_tokens,
            "max_parallel_requests": parallel, "timeout": int(teacher.timeout_seconds) or 1,
        },
    }  # fmt: skip
    columns = [
        column | {"model_alias": "teacher"} if column["column_type"].startswith("llm-") else column
        for column in design["columns"]
    ]
    try:
        config = dd.DataDesignerConfigBuilder.from_config(
            design | {"columns": columns, "model_configs": [model]}
        )
    except (ValueError, TypeError, LookupError, errors.DataDesignerError) as error:
        raise ConfigError(f"design: {_sentence(error)}") from None
    config.with_seed_dataset(dd.LocalFileSeedSource(path=str(source)))
    return config


def _import(folder: Path) -> tuple[Any, Any, Any]:
    """The library's `config`, `interface` and `errors`, with its home inside `folder`.

    Both variables are read once, at import. Raises ConfigError without the extra.
    """
    os.environ["NEMO_TELEMETRY_ENABLED"] = "false"
    os.environ["DATA_DESIGNER_HOME"] = str(folder / "home")
    (folder / "home").mkdir(parents=True, exist_ok=True)
    try:
        from data_designer import config, errors, interface
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"design: Data Designer is not installed ({error.name} is missing); "
            "pip install 'tuneloom[designer]'"
        ) from None
    _count_bytes()
    return config, interface, errors


def _count_bytes() -> None:
    """Give tiktoken the one encoding that the library asks for, of a token a byte: it would be
    downloaded, for statistics that nobody here reads.
    """
    import tiktoken

    tiktoken.registry.ENCODINGS["cl100k_base"] = tiktoken.Encoding(
        "bytes", pat_str=r"[\s\S]", special_tokens={},
        mergeable_ranks={bytes([value]): value for value in range(256)},
    )  # fmt: skip


def _plain(value: Any) -> Any:
    """Arrays and numpy scalars as lists and numbers."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _sentence(error: Exception) -> str:
    """The first line; of a ValidationError where and what, of which that line has neither."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
