"""Texts of rows outside datasets: in run folders, golden sets, and what teachers made of them."""

import json
from pathlib import Path
from typing import Any

from tuneloom.errors import DataError
from tuneloom.registry.graph import Graph


def texts_of(graph: Graph, ids: set[str], datasets: set[str]) -> list[Path]:
    """Files in run folders that hold texts of the rows, whether the run has seen them or not."""
    found: list[Path] = []
    for run in graph.runs.values():
        scored = [path for path in sorted(run.folder.glob("evals/*.rows.jsonl"))
                  if any(row["id"] in ids for row in _lines(path))]  # fmt: skip
        for path in scored:
            found += [path, path.with_name(path.name.replace(".rows.jsonl", ".json"))]
        known = graph.dataset_of(run)
        sampled = known is not None and known[0].name in datasets
        found += [run.folder / "samples.jsonl"] if sampled else []
        found += [run.folder / "report.html"] if scored or sampled else []
    return [path for path in found if path.exists()]


def golden_rows(root: Path, ids: set[str]) -> dict[str, int]:
    """How many of the rows each golden set below `root` holds."""
    counted = {
        str(log.parent): len({event["id"] for event in _lines(log)} & ids)
        for log in sorted(root.glob("*/events.jsonl"))
    }
    return {folder: count for folder, count in counted.items() if count}


def synthetic_rows(root: Path, ids: set[str]) -> dict[str, int]:
    """How many rows made from the rows each raw file of `tuneloom synthesise` holds."""
    counted = {
        str(path): sum(_seed(row) in ids for row in _lines(path))
        for path in sorted(root.glob("*.jsonl"))
    }
    return {path: count for path, count in counted.items() if count}


def _seed(row: dict[str, Any]) -> str:
    """The row that a teacher made this one from."""
    meta = row.get("meta")
    made = meta.get("synthetic") if isinstance(meta, dict) else None
    return str(made.get("seed")) if isinstance(made, dict) else ""


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    try:
        with path.open(encoding="utf-8") as file:
            return [dict(json.loads(line)) for line in file]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as JSONL ({error})") from None
