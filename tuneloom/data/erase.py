"""`tuneloom erase row=ID`, or subject=, source=, licence=, consent=DAY: the plan, or what it says.

The plan lists every dataset version that holds the rows, what a teacher made from them or (made
from a version that does) rows of their keys, every run that saw them, every run started from those,
and what it took to make them.
`execute=true` writes a tombstone, rebuilds the versions without the rows, trains again what saw
them, checks that no exposure is left, and removes old versions, old runs and the token caches.
"""

import datetime
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import model_validator

from tuneloom.config import Config
from tuneloom.data.leftovers import golden_rows, synthetic_rows, texts_of
from tuneloom.data.rebuild import rebuild
from tuneloom.data.rows import open_rows
from tuneloom.errors import DataError, RefusedError
from tuneloom.registry.graph import SET_ASIDE, Graph, Kind, Run, ids_of, subject_hash
from tuneloom.registry.lineage import ROW_KINDS, as_text, exposure_of

TOMBSTONES = "tombstones.jsonl"


class EraseConfig(Config):
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
    execute: bool = False
    """Do what the plan says; without it nothing is changed."""
    reason: str | None = None
    """Why, for the tombstone; needed to execute."""
    retrain: bool = True
    """Train the runs again that saw the rows; false leaves that to you, and keeps the old runs."""
    datasets: str = "datasets"
    runs: str = "runs"
    golden: str = "golden"
    """Where golden sets lie: what the plan says of them."""
    synthetic: str = "raw/synthetic"
    """Where `tuneloom synthesise` wrote: the plan names its files that were made from the rows."""

    @model_validator(mode="after")
    def one_selector(self) -> "EraseConfig":
        chosen = [kind for kind in ROW_KINDS if getattr(self, kind) is not None]
        if len(chosen) != 1:
            raise ValueError(
                f"erase: expected one of {', '.join(f'{kind}=' for kind in ROW_KINDS)}; "
                f"got {chosen or 'none'}"
            )
        if self.row is not None and len(self.row) < 8:
            raise ValueError("row: expected at least the first 8 digits of an id")
        if self.execute and not self.reason:
            raise ValueError("reason: required with execute=true, for the tombstone")
        return self


CONFIG = EraseConfig
TEXT_KEYS = ("row", "subject", "source")
"""An id of digits alone, such as 12345678, is no number."""


@dataclass
class Plan:
    """What holds or has learnt the rows."""

    kind: Kind
    value: str
    ids: list[str]
    sources: set[str]
    """Sources that go as a whole."""
    datasets: dict[str, int]
    """Rows to remove from the splits, by version."""
    set_aside: dict[str, int]
    """Quarantined rows to remove, by version."""
    hidden: list[str]
    """Versions whose quarantined rows do not say whose they are; none of their texts stays."""
    runs: dict[str, dict[str, Any]]
    """Exposure of the runs that saw the rows."""
    descendants: list[str]
    """Runs started from those: they carry what their parents learnt."""
    exports: list[str]
    texts: list[str]
    """Evaluations of the rows; samples and reports of runs that could show them."""
    golden: dict[str, int]
    """Rows in golden sets, whose logs are never edited."""
    synthetic: dict[str, int]
    """Raw rows made from them by a teacher, by file, which the next ingest would bring back."""
    train_seconds: float
    """What the runs to make again took, by their own metrics."""


def main(config: EraseConfig) -> int:
    """Print the plan, or do it."""
    graph = Graph.load(config.datasets, config.runs)
    plan = make_plan(graph, config)
    print(
        as_text(
            {k: v for k, v in asdict(plan).items() if k not in ("ids", "sources", "hidden")}
            | {"rows": len(plan.ids)}
        )
    )
    for name in plan.hidden:
        print(
            f"{name}: quarantined rows cannot be told apart by subject, so the new version drops "
            "all their texts; ingest again first to keep those of others"
        )
    for folder, count in plan.golden.items():
        print(
            f"{folder}: {count} of the rows are in this golden set, which stays as it is: its log "
            "is never edited; remove the folder, and review the others anew"
        )
    for file, count in plan.synthetic.items():
        answers = Path(file).with_name(f".{Path(file).stem}.answers")
        print(
            f"{file}: {count} rows in it were made from the rows; it stays, and the next ingest "
            f"would bring them back; remove it and {answers}, and synthesise again"
        )
    if not config.execute:
        print("\nnothing was changed; add execute=true reason='...' to do it")
        return 0
    for line in execute(graph, plan, config):
        print(line, flush=True)
    return 0


def make_plan(graph: Graph, config: EraseConfig) -> Plan:
    """Everything that the rows reached; raises DataError when there are no such rows."""
    kind = next(k for k in ROW_KINDS if getattr(config, k) is not None)
    value = str(getattr(config, kind))
    found = graph.find_rows(kind, value)
    if kind == "row" and len(ids := ids_of(found)) > 1:
        raise DataError(f"row: {value!r} begins {len(ids)} ids; give more digits")
    sources = whole_sources(found) if kind in ("source", "licence", "consent") else set()
    found = graph.reached(found)
    hidden = _hidden(graph, kind, found)
    if not found and not hidden:
        raise DataError(f"{kind}: no dataset holds {value!r}; nothing to erase")
    ids = ids_of(found)
    aside = {name: t["split"].to_pylist().count(SET_ASIDE) for name, t in found.items()}
    seen = {run.id: exposure_of(run, pa.array(ids, pa.string())) for run in graph.runs.values()}
    seen = {run_id: exposure for run_id, exposure in seen.items() if exposure}
    later = graph.descendants([graph.runs[run_id] for run_id in seen])
    again = [*(graph.runs[run_id] for run_id in seen), *later]
    return Plan(
        kind=kind, value=value, ids=ids, sources=sources,
        datasets=dict.fromkeys(hidden, 0) | {n: len(t) - aside[n] for n, t in found.items()},
        set_aside={name: rows for name, rows in aside.items() if rows}, hidden=hidden,
        runs=seen, descendants=[run.id for run in later],
        exports=[str(path) for run in again for path in run.exports()],
        texts=[str(path) for path in texts_of(graph, set(ids), {*found, *hidden})],
        golden=golden_rows(Path(config.golden), set(ids)),
        synthetic=synthetic_rows(Path(config.synthetic), set(ids)),
        train_seconds=round(sum(map(seconds_of, again)), 1),
    )  # fmt: skip


def _hidden(graph: Graph, kind: Kind, found: dict[str, pa.Table]) -> list[str]:
    """Versions that may hold the rows among quarantined ones that do not say whose they are."""
    derived = {d.name for name in found for d in graph.made_from(graph.datasets[name])}
    return [
        name
        for name, dataset in graph.datasets.items()
        if (name in derived or (kind == "subject" and dataset.manifest["recipe"].get("subject")))
        and dataset.hides_subjects()
    ]


def whole_sources(found: dict[str, pa.Table]) -> set[str]:
    """The names of the sources that the rows come from."""
    return {source for table in found.values() for source in table["source"].to_pylist()}


def seconds_of(run: Run) -> float:
    """Seconds of a run's steps, by the time/* keys of its metrics."""
    total = 0.0
    path = run.folder / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        total += sum(v for k, v in json.loads(line).items() if k.startswith("time/") and v)
    return total


def execute(graph: Graph, plan: Plan, config: EraseConfig) -> Any:
    """Tombstone, rebuild, train again, remove; yields a line for each thing done."""
    again = [graph.runs[i] for i in [*plan.runs, *plan.descendants]]
    for run in again:
        if run.record.get("state") == "running":
            raise RefusedError(f"erase: run {run.id} is still running; stop it first")
    for run, other in itertools.permutations(again if config.retrain else (), 2):
        if run.starts_from_copy_of(other):
            raise RefusedError(
                f"erase: run {run.id} was started from {run.record['base']['path']}, a copy of "
                f"what {other.id} learnt, which nothing here replaces; set retrain=false, remove "
                "the copy, and train the two again"
            )
    for run in again if config.retrain else ():
        refuse_raw(graph, run, set(plan.ids))
    tombstone = {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "kind": plan.kind,
                 "value": subject_hash(plan.value) if plan.kind == "subject" else plan.value,
                 "reason": config.reason, "ids": plan.ids,
                 "datasets": list(plan.datasets), "runs": [run.id for run in again]}  # fmt: skip
    with (Path(config.datasets) / TOMBSTONES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(tombstone, ensure_ascii=False) + "\n")
    yield f"tombstone written to {Path(config.datasets) / TOMBSTONES}"
    replaced: dict[str, Path] = {}
    children = {name: len(graph.made_from(graph.datasets[name])) for name in plan.datasets}
    for name in sorted(children, key=lambda name: -children[name]):
        replaced[name] = rebuild(
            graph.datasets[name].folder, set(plan.ids), sources=plan.sources,
            renamed={old: new.name for old, new in replaced.items()},
            hide_texts=name in plan.hidden, hide_rejects=plan.kind == "subject",
        )  # fmt: skip
        yield f"rebuilt {name} as {replaced[name].name}"
    moved: dict[str, str] = {}
    for run in sorted(again, key=lambda run: run.record["started"]) if config.retrain else ():
        moved[run.id] = train_again(graph, run, replaced, moved, config)
        yield f"trained {run.id} again as {moved[run.id]}"
        left = exposure_of(
            Graph.load(config.datasets, config.runs).runs[moved[run.id]], pa.array(plan.ids)
        )
        if left:
            raise DataError(f"erase: run {moved[run.id]} still saw {left['rows']} of the rows")
        yield f"  exposures of the rows in {moved[run.id]}: 0"
    for name in plan.datasets:
        shutil.rmtree(graph.datasets[name].folder)
        yield f"removed {name}"
    for run_id in moved:
        shutil.rmtree(graph.runs[run_id].folder)
        yield f"removed run {run_id}"
    for path in filter(Path.exists, map(Path, plan.texts)):
        path.unlink()
        yield f"removed {path}"
    shutil.rmtree(Path(config.runs) / ".tokens", ignore_errors=True)
    yield f"removed the token caches of {config.runs}; they are made again when needed"


def refuse_raw(graph: Graph, run: Run, ids: set[str]) -> None:
    """Raise RefusedError where what a run would be trained on again, no version here that is
    rebuilt, holds the rows still.
    """
    data = run.record["config"]["data"]
    if graph.dataset_of(run) is not None:
        return
    rows = open_rows(data["path"], data["split"], data["format"])
    if left := sum(rows[i].id in ids for i in range(len(rows))):
        raise RefusedError(
            f"erase: run {run.id} would be trained again on {data['path']}, which is no dataset "
            f"version here and holds {left} of the rows; remove them there, or set retrain=false "
            "and train it again yourself"
        )


def train_again(
    graph: Graph, run: Run, replaced: dict[str, Path], moved: dict[str, str], config: EraseConfig
) -> str:
    """The same training on the rebuilt dataset, as a run of its own; returns the new run's id."""
    import yaml

    settings = json.loads(json.dumps(run.record["config"]))
    known = graph.dataset_of(run)
    if known is not None and known[0].name in replaced:
        settings["data"]["path"] = str(replaced[known[0].name])
    for old, new in moved.items():
        settings["model"]["path"] = _moved(settings["model"]["path"], graph.runs[old].folder, new)
        settings["resume"] = _moved(settings["resume"], graph.runs[old].folder, new)
        if settings["run"]["parent"] == old:
            settings["run"]["parent"] = new
    new_id = f"{run.id[:55]}-erased"
    settings["run"] |= {"id": new_id, "root": config.runs}
    launcher = run.record.get("launcher") or {"kind": "inline"}
    folder = Path(config.runs) / f".{new_id}"
    (folder / "experiment").mkdir(parents=True, exist_ok=True)
    text = "# @package _global_\n" + yaml.safe_dump(settings | {"launch": launcher})
    (folder / "experiment" / "again.yaml").write_text(text, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "tuneloom",
        "train",
        "--config-dir",
        str(folder),
        "experiment=again",
    ]
    environment = os.environ | {"TUNELOOM_TRAINS_AGAIN": "1"}  # as it was, whatever is refused now
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise DataError(
            f"erase: training {run.id} again failed ({done.returncode}): {done.stderr[-800:]}"
        )
    shutil.rmtree(folder)
    return new_id


def _moved(path: str, folder: Path, new: str) -> str:
    """A base that lies in a run made again lies in its replacement now."""
    inside = Path(path).resolve()
    if folder.resolve() in inside.parents:
        return str(folder.parent / new / inside.relative_to(folder.resolve()))
    return path
