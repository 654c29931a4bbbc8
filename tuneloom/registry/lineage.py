"""`tuneloom lineage row=ID`, or subject=, source=, licence=, consent=, dataset=, run=,
adapter=FOLDER.

From data to models: in which datasets the rows are, and which runs saw them, how often, at which
steps. From models to data: every row that reached an optimizer step of a run, or of the run that an
adapter came from, with source, licence and what was found in it.
"""

import datetime
import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import model_validator

from tuneloom.config import Config, OutFile
from tuneloom.errors import DataError
from tuneloom.registry.graph import Dataset, Graph, Kind, Run

ROW_KINDS: tuple[Kind, ...] = ("row", "subject", "source", "licence", "consent")
SHOWN = 20


class LineageConfig(Config):
    row: str | None = None
    """A record's id, or the first 8 digits of it or more."""
    subject: str | None = None
    """A person, as the recipe's `subject` template names them."""
    source: str | None = None
    """A raw file, by its name in the manifest."""
    licence: str | None = None
    """A licence, as the recipe gives it to sources."""
    consent: datetime.date | None = None
    """A day: rows of sources whose consent ended before it."""
    dataset: str | None = None
    """A version, NAME@ID, or NAME for the newest."""
    run: str | None = None
    """A run id."""
    adapter: str | None = None
    """The folder of an adapter or model that `tuneloom export` wrote."""
    datasets: str = "datasets"
    runs: str = "runs"
    out: OutFile | None = None
    """A Parquet file for all rows; the screen shows twenty."""
    format: Literal["text", "json"] = "text"
    """What is printed."""

    @model_validator(mode="after")
    def one_question(self) -> "LineageConfig":
        keys = (*ROW_KINDS, "dataset", "run", "adapter")
        asked = [key for key in keys if getattr(self, key) is not None]
        if len(asked) != 1:
            raise ValueError(
                f"lineage: expected one of {', '.join(f'{key}=' for key in keys)}; "
                f"got {', '.join(asked) or 'none'}"
            )
        if self.row is not None and len(self.row) < 8:
            raise ValueError("row: expected at least the first 8 digits of an id")
        return self


CONFIG = LineageConfig
TEXT_KEYS = ("row", "subject", "source")
"""An id of digits alone, such as 12345678, is no number."""


def main(config: LineageConfig) -> int:
    """Answer on the screen, and with all rows in `out`."""
    graph = Graph.load(config.datasets, config.runs)
    answer, rows = ask(graph, config)
    if config.out:
        pq.write_table(rows, config.out)
    as_json = config.format == "json"
    print(json.dumps(answer, indent=1, ensure_ascii=False) if as_json else as_text(answer))
    return 0


def ask(graph: Graph, config: LineageConfig) -> tuple[dict[str, Any], pa.Table]:
    """The answer and the table of all rows it is about."""
    for kind in ROW_KINDS:
        value = getattr(config, kind)
        if value is not None:
            return forward(graph, kind, str(value))
    if config.dataset is not None:
        return of_dataset(graph, config.dataset)
    if config.run is not None:
        return backward(graph, _run(graph, config.run))
    assert config.adapter is not None
    return backward(graph, run_of_adapter(graph, config.adapter))


def forward(graph: Graph, kind: Kind, value: str) -> tuple[dict[str, Any], pa.Table]:
    """From rows to the datasets that hold them and the runs that saw them."""
    found = graph.find_rows(kind, value)
    if not found:
        raise DataError(f"{kind}: no dataset holds {value!r}")
    ids = pa.array(sorted({i for t in found.values() for i in t["id"].to_pylist()}), pa.string())
    seen_by = {}
    for run in graph.runs.values():
        seen = exposure_of(run, ids)
        if seen:
            seen_by[run.id] = seen
    direct = [graph.runs[run_id] for run_id in seen_by]
    answer = {
        kind: value,
        "rows": len(ids),
        "datasets": {
            name: dict(sorted(Counter(table["split"].to_pylist()).items()))
            for name, table in found.items()
        },
        "erase_takes": {name: len(table) for name, table in graph.reached(found).items()},
        "made_from_them": sorted(
            {d.name for n in found for d in graph.made_from(graph.datasets[n])}
        ),
        "runs": seen_by,
        "runs_started_from_those": [run.id for run in graph.descendants(direct)],
        "exports": [
            str(path) for run in [*direct, *graph.descendants(direct)] for path in run.exports()
        ],
    }
    tables = [
        t.append_column("dataset", pa.array([n] * len(t), pa.string())) for n, t in found.items()
    ]
    rows = pa.concat_tables(tables)
    answer["first_rows"] = rows.slice(0, SHOWN).to_pylist()
    return answer, rows


def exposure_of(run: Run, ids: pa.Array) -> dict[str, Any]:
    """How often a run saw these rows; empty when never."""
    table = run.exposure()
    table = table.filter(pc.is_in(table["record_id"], ids))
    if not len(table):
        return {}
    return {
        "rows": len(table["record_id"].unique()),
        "times": len(table),
        "first_step": pc.min(table["step"]).as_py(),
        "last_step": pc.max(table["step"]).as_py(),
        "tokens": pc.sum(table["tokens"]).as_py(),
        "target_tokens": pc.sum(table["target_tokens"]).as_py(),
    }


def of_dataset(graph: Graph, name: str) -> tuple[dict[str, Any], pa.Table]:
    """What a version was made from, and what was made from it."""
    dataset = _dataset(graph, name)
    runs = graph.runs_of(dataset)
    answer = {
        "dataset": dataset.name,
        "rows": {split: part["rows"] for split, part in dataset.manifest["splits"].items()},
        "created_from": dataset.manifest["created_from"],
        "made_from_it": [d.name for d in graph.made_from(dataset)],
        "runs": [run.id for run in runs],
        "runs_started_from_those": [run.id for run in graph.descendants(runs)],
    }
    parts = [t.append_column("split", pa.array([s] * len(t), pa.string()))
             for s, t in dataset.rows(["id", "source", "meta"])]  # fmt: skip
    return answer, pa.concat_tables(parts) if parts else pa.table({})


def backward(graph: Graph, run: Run) -> tuple[dict[str, Any], pa.Table]:
    """Every row that a run learnt from, and where each came from."""
    rows = rows_seen(graph, run)
    known = graph.dataset_of(run)
    parents = [r.id for r in graph.runs.values() if run.comes_from(r)]
    by_source: dict[str, dict[str, Any]] = {}
    for row in rows.to_pylist():
        entry = by_source.setdefault(
            row["source"] or "unknown",
            {"rows": 0, "times": 0, "licence": row["licence"], "found": Counter()},
        )
        entry["rows"] += 1
        entry["times"] += row["times"]
        entry["found"].update(row["found"])
    answer = {
        "run": run.id,
        "dataset": f"{known[0].name} {known[1]}"
        if known
        else (run.record.get("dataset") or {}).get("path"),
        "base": run.record.get("base"),
        "started_from": parents,
        "started_from_it": [r.id for r in graph.descendants([run])],
        "exports": [str(path) for path in run.exports()],
        "rows": len(rows),
        "by_source": {s: {**e, "found": dict(e["found"])} for s, e in sorted(by_source.items())},
        "first_rows": rows.slice(0, SHOWN).to_pylist(),
    }
    return answer, rows


def rows_seen(graph: Graph, run: Run) -> pa.Table:
    """One line a row: id, times, steps, tokens; source, licence and findings where known."""
    seen = run.exposure()
    if not len(seen):
        return pa.table({"record_id": pa.array([], pa.string())})
    table = seen.group_by("record_id").aggregate(
        [
            ("step", "count"),
            ("step", "min"),
            ("step", "max"),
            ("tokens", "sum"),
            ("target_tokens", "sum"),
        ]
    )
    names = ["record_id", "times", "first_step", "last_step", "tokens", "target_tokens"]
    order = ["record_id", "step_count", "step_min", "step_max", "tokens_sum", "target_tokens_sum"]
    table = table.select(order).rename_columns(names).sort_by("record_id")
    facts = _facts(graph, run)
    known: list[Any] = [facts.get(i, (None, None, [])) for i in table["record_id"].to_pylist()]
    return (
        table.append_column("source", pa.array([k[0] for k in known], pa.string()))
        .append_column("licence", pa.array([k[1] for k in known], pa.string()))
        .append_column("found", pa.array([k[2] for k in known], pa.list_(pa.string())))
    )


def _facts(graph: Graph, run: Run) -> dict[str, tuple[str, str | None, list[str]]]:
    """Source, licence and kinds of findings of each row in the run's dataset."""
    known = graph.dataset_of(run)
    if known is None:
        return {}
    dataset, split = known
    terms, facts = graph.terms(dataset), {}
    for name, table in dataset.rows(["id", "source", "meta"]):
        if name == split:
            for row in table.to_pylist():
                found = [f["entity"] for f in json.loads(row["meta"]).get("pii", [])]
                licence = terms.get(row["source"], {}).get("licence")
                facts[row["id"]] = (row["source"], licence, sorted(set(found)))
    return facts


def run_of_adapter(graph: Graph, path: str) -> Run:
    """The run whose folder an export lies in, or whose id its contract names."""
    folder = Path(path).resolve()
    for run in graph.runs.values():
        if run.folder.resolve() in (folder, *folder.parents):
            return run
    contract = folder / "contract.json"
    if contract.exists():
        said = json.loads(contract.read_text(encoding="utf-8"))
        if said.get("run") in graph.runs:
            return graph.runs[said["run"]]
    raise DataError(f"adapter: {path} lies in no run that is known here; set runs=FOLDER")


def _run(graph: Graph, run_id: str) -> Run:
    if run_id not in graph.runs:
        raise DataError(f"run: no {run_id!r} here; there are {sorted(graph.runs)[-5:]}")
    return graph.runs[run_id]


def _dataset(graph: Graph, name: str) -> Dataset:
    """A version by NAME@ID, or the one that NAME links to."""
    if name in graph.datasets:
        return graph.datasets[name]
    for dataset in graph.datasets.values():
        if (dataset.folder.parent / name).resolve() == dataset.folder.resolve():
            return dataset
    raise DataError(f"dataset: no {name!r} here; there are {sorted(graph.datasets)}")


def as_text(value: Any, indent: str = "") -> str:
    """An answer as indented lines; long ids are cut."""
    lines = []
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            lines += [f"{indent}{key}", as_text(inner, indent + "  ")]
        elif isinstance(inner, list) and inner and isinstance(inner[0], dict):
            lines.append(f"{indent}{key}")
            for item in inner:
                shown = (f"{k}={str(v)[:16] if k in ('id', 'record_id', 'sha256') else v}"
                         for k, v in item.items() if v not in (None, [], {}))  # fmt: skip
                lines.append(f"{indent}  {' '.join(shown)}")
        else:
            text = ", ".join(map(str, inner)) if isinstance(inner, list) else inner
            lines.append(f"{indent}{key:<24} {text if text not in ('', None, {}) else '-'}")
    return "\n".join(lines)
