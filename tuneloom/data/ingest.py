"""`tuneloom ingest data=debian`: raw records into a dataset folder that training takes as it is.

Blocks are prepared (in any number of processes), merged by id, deduplicated, split and written.
The result is a function of rows and recipe: not of workers, order of files, time zone or locale.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tuneloom.data.aside import ASIDE, aside_rows, write_rows
from tuneloom.data.card import balance
from tuneloom.data.decide import Collector, Columns, decide, open_signatures
from tuneloom.data.gather import Spill, first_of_each
from tuneloom.data.manifest import (
    Tally,
    make_manifest,
    refuse_blocked,
    refuse_empty,
    refuse_leaks,
    refuse_over_budget,
    refuse_over_files,
)
from tuneloom.data.paperwork import write_paperwork
from tuneloom.data.pool import Prepare, prepare_here
from tuneloom.data.readers import Passed, Refused
from tuneloom.data.recipe import IngestConfig, Recipe
from tuneloom.data.records import canonical
from tuneloom.data.scratch import Column, Scratch
from tuneloom.data.sources import find_sources
from tuneloom.data.store import TIMING, draft_in, publish, write_json
from tuneloom.errors import RefusedError

STAGES = ("prepare", "merge", "decide", "write")


@dataclass(frozen=True)
class Made:
    """A dataset that was made: its folder NAME@ID, and what stands in it. (Another process that
    makes the same dataset puts its own copy there, so nobody reads this one's back.)
    """

    folder: Path
    manifest: dict[str, Any]
    seconds: dict[str, float]


def main(config: IngestConfig, prepare: Prepare) -> int:
    """Ingest, print what became of the rows and the next command."""
    made = make(config, prepare)
    for what, rows in balance(made.manifest["counts"]):
        print(f"  {what:<32}{rows:>12,}")
    if refused := made.manifest.get("refused_files"):
        print(f"  {'files refused':<32}{len(refused):>12,}")
    for name, part in made.manifest["splits"].items():
        print(f"  {'split ' + name:<32}{part['rows']:>12,}")
    print("  seconds: " + ", ".join(f"{stage} {made.seconds[stage]}" for stage in STAGES))
    print(f"{made.folder}")
    print(f"next: tuneloom train data.path={Path(config.root) / config.data.name} model.path=...")
    return 0


def ingest(config: IngestConfig, prepare: Prepare = prepare_here) -> Path:
    """Make the dataset; returns its folder NAME@ID."""
    return make(config, prepare).folder


def make(config: IngestConfig, prepare: Prepare) -> Made:
    """Make the dataset, and say what it is."""
    root = Path(config.root)
    try:
        with draft_in(root) as draft:
            spill = draft / "spill"
            spill.mkdir()
            manifest, seconds = _make(config, prepare, draft, spill)
            shutil.rmtree(spill)
            write_paperwork(draft, manifest)
            write_json(draft / TIMING, seconds)
            return Made(publish(draft, root, manifest), manifest, seconds)
    except OSError as error:  # full, or gone: what readers meet is a DataError already
        place = error.filename or root
        why = error.strerror or error
        raise RefusedError(f"root: {place} cannot be written ({why})") from error


def _make(
    config: IngestConfig, prepare: Prepare, draft: Path, spill: Path
) -> tuple[dict[str, Any], dict[str, float]]:
    """Prepare, merge, decide, write; returns the manifest and the seconds each stage took."""
    recipe = config.data
    clock = [time.perf_counter()]
    tally = _prepare(config, prepare, draft, spill)
    refuse_over_budget(recipe, tally)
    clock.append(time.perf_counter())
    with pq.ParquetWriter(draft / "set_aside.parquet", ASIDE, compression="zstd") as aside:
        columns, ids, exact = _merge(Spill(spill), aside, recipe)
        clock.append(time.perf_counter())
        near = open_signatures(spill / "signatures") if recipe.near.action != "off" else None
        decision = decide(columns, near, recipe, Spill(spill).questions, Scratch(spill))
        clock.append(time.perf_counter())
        written = write_rows(Spill(spill), draft, decision, aside, recipe, ids)
    clock.append(time.perf_counter())
    manifest = make_manifest(recipe, tally, columns, decision, exact, written)
    refuse_blocked(recipe, manifest["licence"])
    refuse_leaks(recipe, manifest["leaks"])
    refuse_empty(manifest["counts"])
    seconds = {s: round(b - a, 3) for s, a, b in zip(STAGES, clock, clock[1:], strict=False)}
    return manifest, seconds


def _prepare(config: IngestConfig, prepare: Prepare, draft: Path, spill: Path) -> Tally:
    """First pass: every raw row prepared into the spill folder, or rejected."""
    tally, ends = Tally(), list[Passed | Refused]()
    sources = find_sources(config.sources)
    with (draft / "rejected.jsonl").open("wb") as rejected:
        for block, done in prepare(config, sources, spill, ends):
            tally.rows_of[block.source] += done.rows_in
            for reject in done.rejects:
                line = (canonical(reject) + "\n").encode("utf-8")
                tally.rejects.update(line)
                rejected.write(line)
            tally.rejected.update(reject["reason"] for reject in done.rejects)
            for total, part in ((tally.dropped, done.dropped), (tally.changed, done.changed),
                                (tally.found, done.found)):  # fmt: skip
                total.update(part)
    tally.passed = [end for end in ends if isinstance(end, Passed)]
    tally.refused = [end for end in ends if isinstance(end, Refused)]
    refuse_over_files(config.max_refused_files, tally)
    return tally


def _merge(
    spill: Spill, aside: pq.ParquetWriter, recipe: Recipe
) -> tuple[Columns, np.ndarray, int]:
    """Second pass: unique rows in the order of ids; equal rows are listed and counted.

    Returns the rows' numbers, their ids where near-duplicates will ask for them, the equal rows.
    """
    scratch, exact = Scratch(spill.folder), 0
    collector, ids = Collector(scratch), Column(scratch, "S64")
    with (spill.folder / "signatures").open("wb") as signatures:
        for number, table in enumerate(spill.ranges()):
            fresh = first_of_each(table)
            unique = table
            if not fresh.all():
                unique, again = table.filter(pa.array(fresh)), table.filter(pa.array(~fresh))
                exact += len(again)
                aside.write_table(
                    aside_rows(again, "deduplicated", "exact", again["id"], records=False)
                )
            if recipe.near.action != "off":
                for chunk in unique["signature"].chunks:
                    signatures.write(b"".join(chunk.to_pylist()))
                ids.add(unique["id"].to_numpy().astype("S64"))
            spill.keep(number, unique.drop_columns(["signature"]))
            collector.add(unique)
    return collector.columns(), ids.whole(), exact
