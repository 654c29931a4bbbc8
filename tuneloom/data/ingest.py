"""`tuneloom ingest data=debian`: raw records into a dataset folder that training takes as it is.

Blocks are prepared (in any number of processes), merged by id, deduplicated, split and written.
The result is a function of rows and recipe: not of workers, order of files, time zone or locale.
"""

import hashlib
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tuneloom.data.card import balance, card
from tuneloom.data.decide import Collector, Columns, Decision, decide, open_signatures
from tuneloom.data.gather import Spill, first_of_each
from tuneloom.data.pool import prepare_all
from tuneloom.data.provenance import Provenance, summary
from tuneloom.data.readers import Passed, read_blocks
from tuneloom.data.recipe import IngestConfig, Recipe
from tuneloom.data.records import canonical
from tuneloom.data.sources import find_sources
from tuneloom.data.splits import SPLITS
from tuneloom.data.store import ShardWriter, manifest_id, publish, read_manifest, write_json
from tuneloom.errors import DataError

CONFIG = IngestConfig
ASIDE = pa.schema([
    ("id", pa.string()), ("source", pa.string()), ("line", pa.int64()), ("fate", pa.string()),
    ("reason", pa.string()), ("kept", pa.string()), ("record", pa.string()),
])  # fmt: skip


def main(config: IngestConfig) -> int:
    """Ingest, print what became of the rows and the next command."""
    folder = ingest(config)
    manifest = read_manifest(folder)
    for what, rows in balance(manifest["counts"]):
        print(f"  {what:<32}{rows:>12,}")
    for name, part in manifest["splits"].items():
        print(f"  {'split ' + name:<32}{part['rows']:>12,}")
    print(f"{folder}")
    print(f"next: tuneloom train data.path={Path(config.root) / config.data.name} model.path=...")
    return 0


def ingest(config: IngestConfig) -> Path:
    """Make the dataset; returns its folder NAME@ID."""
    root = Path(config.root)
    root.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=root))
    try:
        with tempfile.TemporaryDirectory(prefix=".spill-", dir=root) as spill:
            manifest, seconds = _make(config, draft, Path(spill))
        (draft / "card.md").write_text(card(manifest), encoding="utf-8", newline="\n")
        folder = publish(draft, root, manifest)
        write_json(folder / "timing.json", seconds)
        return folder
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@dataclass
class Tally:
    """What the first pass counted."""

    rows_of: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    rejects: Any = field(default_factory=hashlib.sha256)
    passed: list[Passed] = field(default_factory=list)


def _make(
    config: IngestConfig, draft: Path, spill: Path
) -> tuple[dict[str, Any], dict[str, float]]:
    """Prepare, merge, decide, write; returns the manifest and the seconds each stage took."""
    recipe = config.data
    clock = [time.perf_counter()]
    tally = _prepare(config, draft, spill)
    _refuse_over_budget(recipe, tally)
    clock.append(time.perf_counter())
    with pq.ParquetWriter(draft / "set_aside.parquet", ASIDE, compression="zstd") as aside:
        columns, exact = _merge(Spill(spill), aside, recipe)
        clock.append(time.perf_counter())
        near = open_signatures(spill / "signatures") if recipe.near.action != "off" else None
        decision = decide(columns, near, recipe)
        clock.append(time.perf_counter())
        splits = _write(Spill(spill), draft, decision, aside, recipe)
    clock.append(time.perf_counter())
    manifest = _manifest(recipe, tally, columns, decision, exact, splits)
    _refuse_blocked(recipe, manifest["licence"])
    stages = ("prepare", "merge", "decide", "write")
    seconds = {s: round(b - a, 3) for s, a, b in zip(stages, clock, clock[1:], strict=False)}
    return manifest, seconds


def _prepare(config: IngestConfig, draft: Path, spill: Path) -> Tally:
    """First pass: every raw row prepared into the spill folder, or rejected."""
    tally = Tally()
    blocks = read_blocks(find_sources(config.sources), tally.passed)
    with (draft / "rejected.jsonl").open("wb") as rejected:
        for block, done in prepare_all(blocks, config.data, spill, workers=config.workers):
            tally.rows_of[block.source] += done.rows_in
            for reject in done.rejects:
                line = (canonical(reject) + "\n").encode("utf-8")
                tally.rejects.update(line)
                rejected.write(line)
            tally.rejected.update(reject["reason"] for reject in done.rejects)
            for total, part in ((tally.dropped, done.dropped), (tally.changed, done.changed),
                                (tally.found, done.found)):  # fmt: skip
                total.update(part)
    return tally


def _merge(spill: Spill, aside: pq.ParquetWriter, recipe: Recipe) -> tuple[Columns, int]:
    """Second pass: unique rows in the order of ids; equal rows are listed and counted."""
    collector, exact = Collector(), 0
    with (spill.folder / "signatures").open("wb") as signatures:
        for number, table in enumerate(spill.ranges()):
            fresh = first_of_each(table)
            unique = table
            if not fresh.all():
                unique, again = table.filter(pa.array(fresh)), table.filter(pa.array(~fresh))
                exact += len(again)
                aside.write_table(
                    _aside(again, "deduplicated", "exact", again["id"], records=False)
                )
            if recipe.near.action != "off":
                for chunk in unique["signature"].chunks:
                    signatures.write(b"".join(chunk.to_pylist()))
            spill.keep(number, unique.drop_columns(["signature"]))
            collector.add(unique)
    return collector.columns(), exact


def _write(
    spill: Spill, draft: Path, decision: Decision, aside: pq.ParquetWriter, recipe: Recipe
) -> dict[str, Any]:
    """Third pass: kept rows into the shards of their splits, the others into set_aside.parquet."""
    writers = {name: ShardWriter(draft, name, recipe.rows_per_shard) for name in SPLITS}
    ids = _ids_of_leaders(spill, decision)
    start = 0
    for table in spill.unique():
        rows = slice(start, start + len(table))
        start += len(table)
        for code, writer in enumerate(writers.values()):
            writer.add(table.filter(pa.array(decision.split[rows] == code)))
        for code in np.unique(decision.fate[rows]):
            kind, reason = decision.fates[code]
            if kind != "kept":
                chosen = decision.fate[rows] == code
                kept = [ids.get(int(i)) for i in decision.leader[rows][chosen]]
                part = table.filter(pa.array(chosen))
                stored = kind == "quarantined" and reason != "held_out"
                aside.write_table(_aside(part, kind, reason, kept, records=stored))
    return {name: writer.close() for name, writer in writers.items()}


def _ids_of_leaders(spill: Spill, decision: Decision) -> dict[int, str]:
    """The ids of rows that near-duplicates were dropped for."""
    wanted = np.unique(decision.leader[decision.leader != np.arange(len(decision.leader))])
    found: dict[int, str] = {}
    start = 0
    for table in spill.unique() if len(wanted) else ():
        here = wanted[(wanted >= start) & (wanted < start + len(table))]
        ids = table["id"].take(pa.array(here - start)).to_pylist()
        found.update(zip(here.tolist(), ids, strict=True))
        start += len(table)
    return found


def _aside(table: pa.Table, fate: str, reason: str, kept: Any, *, records: bool) -> pa.Table:
    """Rows that are not in the dataset, as set_aside.parquet lists them."""
    count = len(table)
    columns = [
        table["id"], table["source"], table["line"], pa.array([fate] * count, pa.string()),
        pa.array([reason] * count, pa.string()),
        kept if isinstance(kept, pa.ChunkedArray) else pa.array(kept, pa.string()),
        table["record"] if records else pa.nulls(count, pa.string()),
    ]  # fmt: skip
    return pa.Table.from_arrays(columns, schema=ASIDE)


def _manifest(
    recipe: Recipe,
    tally: Tally,
    columns: Columns,
    decision: Decision,
    exact: int,
    splits: dict[str, Any],
) -> dict[str, Any]:
    """All that the dataset says of itself; its id is the digest of it."""
    fates = decision.counts()
    if exact:
        fates["deduplicated"]["exact"] = exact
    fates["quarantined"].update(tally.dropped)
    kept = decision.fate == 0
    kept_of = {s: int((kept & (columns.source == i)).sum()) for i, s in enumerate(columns.sources)}
    identity = recipe_identity(recipe)
    manifest = {
        "name": recipe.name,
        "splits": splits,
        "counts": {"in": tally.rows_of.total(), "kept": int(kept.sum()),
                   "rejected": plain(tally.rejected), "deduplicated": plain(fates["deduplicated"]),
                   "quarantined": plain(fates["quarantined"])},
        "sanitised": plain(tally.changed),
        "found": plain(tally.found),
        "label_conflicts": decision.conflicts,
        "labels": _label_table(columns, decision.split),
        "licence": summary(kept_of, Provenance(recipe.provenance), recipe.use, recipe.as_of),
        "rejects_digest": tally.rejects.hexdigest(),
        "config_digest": hashlib.sha256(canonical(identity).encode()).hexdigest(),
        "recipe": identity,
        "created_from": [
            *decision.created_from,
            *({"name": p.source, "rows": tally.rows_of[p.source], "kept": kept_of.get(p.source, 0),
               "bytes": p.bytes, "sha256": p.sha256} for p in tally.passed),
        ],
    }  # fmt: skip
    return manifest | {"id": manifest_id(manifest)}


def plain(counter: Counter[str]) -> dict[str, int]:
    """A counter in the order of its keys."""
    return dict(sorted(counter.items()))


def recipe_identity(recipe: Recipe) -> dict[str, Any]:
    """The recipe without where files happen to lie on this machine, and without keys to secrets."""
    whole = recipe.model_dump(mode="json", exclude={"source": True, "privacy": {"key_file"}})
    if recipe.within:
        whole["within"] = {"split": recipe.within.split}
    return whole


def _refuse_over_budget(recipe: Recipe, tally: Tally) -> None:
    """Raise DataError when there is nothing, or when too many rows were bad."""
    rows, bad = tally.rows_of.total(), tally.rejected.total()
    if not rows:
        raise DataError("source: no rows in any file; is the export empty?")
    if bad > recipe.max_rejected * rows:
        table = "\n".join(f"  {why:<20}{n:>10,}" for why, n in tally.rejected.most_common())
        raise DataError(
            f"data.max_rejected: {bad:,} of {rows:,} rows were rejected, over "
            f"{recipe.max_rejected:.2%}; mend the source or raise the budget\n{table}"
        )


def _refuse_blocked(recipe: Recipe, licence: dict[str, Any]) -> None:
    """Raise DataError when a source does not allow the use and the recipe asks to fail then."""
    if recipe.licence_action == "fail" and licence["blockers"]:
        lines = [f"  {b['source']}: {b['rows']:,} rows, {b['reason']}" for b in licence["blockers"]]
        raise DataError(
            f"data.licence_action: {licence['rows_to_drop']:,} rows do not allow "
            f"{recipe.use} use; drop these sources\n" + "\n".join(lines)
        )


def _label_table(columns: Columns, split: np.ndarray) -> dict[str, dict[str, int]]:
    """Rows of each label in each split."""
    return {
        label: {s: int(((columns.label == i) & (split == c)).sum()) for c, s in enumerate(SPLITS)}
        for i, label in enumerate(columns.labels)
    }
