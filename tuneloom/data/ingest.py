"""`tuneloom ingest data=debian`: raw records into a dataset folder that training takes as it is.

Blocks are prepared (in any number of processes), merged by id, deduplicated, split and written.
The result is a function of rows and recipe: not of workers, order of files, time zone or locale.
"""

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tuneloom.data.card import balance, card
from tuneloom.data.gather import Spill, first_of_each
from tuneloom.data.prepare import Preparer, canonical
from tuneloom.data.readers import blocks, find_sources
from tuneloom.data.recipe import IngestConfig, Recipe
from tuneloom.data.splits import SPLITS, assign
from tuneloom.data.store import ShardWriter, file_digest, manifest_id, publish, read_manifest
from tuneloom.errors import DataError

CONFIG = IngestConfig


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
            manifest = _write(config, draft, Spill(Path(spill)))
        (draft / "card.md").write_text(card(manifest), encoding="utf-8", newline="\n")
        return publish(draft, root, manifest)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write(config: IngestConfig, draft: Path, spill: Spill) -> dict[str, Any]:
    """Prepare, merge, split and write shards into the draft folder; returns the manifest."""
    recipe = config.data
    sources = find_sources(config.sources)
    prepare = Preparer(recipe)
    counts: dict[str, Counter[str]] = {"rejected": Counter(), "deduplicated": Counter(),
                                       "quarantined": Counter()}  # fmt: skip
    rows_of: Counter[str] = Counter()
    with (draft / "rejected.jsonl").open("w", encoding="utf-8", newline="\n") as rejected:
        for block in blocks(sources):
            done = prepare(block)
            rows_of[block.source] += done.rows_in
            counts["rejected"] += done.reasons()
            rejected.writelines(canonical(reject) + "\n" for reject in done.rejects)
            spill.add(block.number, done.table)
    _refuse_over_budget(recipe, rows_of.total(), counts["rejected"])

    tables = []
    for table in spill.ranges():
        fresh = first_of_each(table)
        counts["deduplicated"]["exact"] += int((~fresh).sum())
        tables.append(spill.keep(len(tables), table.filter(pa.array(fresh))))
    keys = np.concatenate([table["key"].to_numpy() for table in tables])
    names, labels = _labels(tables)
    chosen = np.ones(len(keys), dtype=bool)
    created_from: list[dict[str, Any]] = []
    if recipe.within:
        allowed, parent = _keys_within(Path(recipe.within.dataset), recipe.within.split)
        chosen = np.isin(keys, allowed)
        counts["quarantined"]["held_out"] = int((~chosen).sum())
        created_from.append({"dataset": parent, "split": recipe.within.split})
    split = np.full(len(keys), -1, dtype=np.int8)
    split[chosen] = assign(keys[chosen], None if labels is None else labels[chosen], recipe.split)

    splits, start = {}, 0
    writers = {name: ShardWriter(draft, name, recipe.rows_per_shard) for name in SPLITS}
    for table in tables:
        codes = split[start : start + len(table)]
        start += len(table)
        for code, name in enumerate(SPLITS):
            writers[name].add(table.filter(pa.array(codes == code)))
    splits = {name: writer.close() for name, writer in writers.items()}
    created_from += [
        {
            "name": source.name,
            "rows": rows_of[source.name],
            "sha256": file_digest(Path(source.path)),
        }
        for source in sources
    ]
    manifest = {
        "name": recipe.name,
        "splits": splits,
        "counts": {"in": rows_of.total(), "kept": int(chosen.sum())}
        | {fate: dict(sorted(why.items())) for fate, why in counts.items()},
        "labels": _label_table(names, labels, split),
        "config_digest": hashlib.sha256(canonical(recipe_identity(recipe)).encode()).hexdigest(),
        "recipe": recipe_identity(recipe),
        "created_from": created_from,
    }
    return manifest | {"id": manifest_id(manifest)}


def recipe_identity(recipe: Recipe) -> dict[str, Any]:
    """The recipe without where files happen to lie on this machine."""
    plain = recipe.model_dump(exclude={"source"})
    if recipe.within:
        plain["within"] = {"split": recipe.within.split}
    return plain


def _refuse_over_budget(recipe: Recipe, rows: int, rejected: Counter[str]) -> None:
    """Raise DataError when there is nothing, or when too many rows were bad."""
    if not rows:
        raise DataError("source: no rows in any file; is the export empty?")
    if rejected.total() > recipe.max_rejected * rows:
        table = "\n".join(f"  {why:<20}{count:>10,}" for why, count in rejected.most_common())
        raise DataError(
            f"data.max_rejected: {rejected.total():,} of {rows:,} rows were rejected, over "
            f"{recipe.max_rejected:.2%}; mend the source or raise the budget\n{table}"
        )


def _labels(tables: list[pa.Table]) -> tuple[list[str], np.ndarray | None]:
    """Label names in sorted order and (N,) int codes; None when rows have no labels."""
    column = pa.chunked_array([c for t in tables for c in t["label"].chunks], type=pa.string())
    if column.null_count:
        return [], None
    names = sorted(column.unique().to_pylist())
    codes = pa.compute.index_in(column, value_set=pa.array(names, pa.string()))
    return names, codes.to_numpy().astype(np.int64)


def _label_table(
    names: list[str], labels: np.ndarray | None, split: np.ndarray
) -> dict[str, dict[str, int]]:
    """Rows of each label in each split."""
    if labels is None:
        return {}
    return {
        name: {s: int(((labels == i) & (split == c)).sum()) for c, s in enumerate(SPLITS)}
        for i, name in enumerate(names)
    }


def _keys_within(folder: Path, split: str) -> tuple[np.ndarray, str]:
    """The key hashes of one split of a dataset, and the dataset's NAME@ID."""
    import pyarrow.parquet as pq

    manifest = read_manifest(folder)
    if split not in manifest["splits"]:
        raise DataError(
            f"data.within.split: {folder} has {sorted(manifest['splits'])}, not {split!r}"
        )
    keys = [
        int(json.loads(meta)["key"], 16)
        for shard in manifest["splits"][split]["shards"]
        for meta in pq.read_table(folder / shard["file"], columns=["meta"])["meta"].to_pylist()
    ]
    return np.array(sorted(keys), dtype=np.uint64), f"{manifest['name']}@{manifest['id']}"
