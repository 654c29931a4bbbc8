"""A dataset version without some of its rows: the others stay in their splits, byte for byte."""

import datetime
import hashlib
import json
from collections import Counter
from collections.abc import Set
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tuneloom.data.aside import LENGTHS, lengths_of
from tuneloom.data.manifest import length_table
from tuneloom.data.paperwork import write_paperwork
from tuneloom.data.provenance import Provenance, SourceInfo, summary
from tuneloom.data.records import canonical
from tuneloom.data.store import (
    ROWS_PER_SHARD,
    ShardWriter,
    digest_of,
    draft_in,
    manifest_id,
    publish,
    read_manifest,
)


def rebuild(
    folder: Path,
    ids: set[str],
    *,
    sources: Set[str],
    renamed: dict[str, str],
    hide_texts: bool,
    hide_rejects: bool,
) -> Path:
    """Write the version without the rows `ids` beside the old one; returns its folder.

    What is said of rows from `sources`, which go as a whole, goes too; `renamed` are versions of
    datasets that were rebuilt before this one. With `hide_texts` no quarantined text is copied,
    with `hide_rejects` none of a rejected row.
    The link to the newest version moves only where the old one was the newest.
    """
    manifest = read_manifest(folder)
    root = folder.resolve().parent
    unwanted = pa.array(sorted(ids), pa.string())
    labels = {label: dict(by) for label, by in manifest["labels"].items()}
    gone: Counter[str] = Counter()
    metas: list[str] = []
    unlearnt: Counter[str] = Counter()
    lengths = np.zeros(len(LENGTHS), dtype=np.int64)
    with draft_in(root) as draft:
        splits = {}
        for split, part in manifest["splits"].items():
            writer = ShardWriter(
                draft, split, manifest["recipe"].get("rows_per_shard", ROWS_PER_SHARD)
            )
            for shard in part["shards"]:
                table = pq.read_table(folder / shard["file"])
                out = pc.is_in(table["id"], unwanted)
                for row in table.filter(out).to_pylist():
                    gone[row["source"]] += 1
                    unlearnt[row["source"]] += split == "train"
                    metas.append(row["meta"])
                    label = json.loads(row["meta"]).get("label")
                    if label in labels:
                        labels[label][split] -= 1
                left = table.filter(pc.invert(out))
                writer.add(left)
                if split == "train" or not manifest["mixture"]:
                    lengths += lengths_of(left["record"])
            splits[split] = writer.close()
        went = _copy_set_aside(folder, draft, unwanted, sources, hide_texts)
        aside = Counter(went["reason"].to_pylist())
        metas += went["meta"].drop_null().to_pylist() if "meta" in went.column_names else []
        made = _manifest(manifest, splits, gone, aside, renamed) | {
            "mixture": [_less(part, unlearnt) for part in manifest["mixture"]],
            "labels": labels, "lengths": length_table(lengths),
            **_noted(manifest, metas),
            "rejects_digest": _copy_rejects(folder, draft, sources, hide_rejects),
        }  # fmt: skip
        made["id"] = manifest_id(made)
        write_paperwork(draft, made)
        return publish(draft, root, made, replaces=folder)


def _copy_rejects(folder: Path, draft: Path, sources: Set[str], hide: bool) -> str:
    """Rejects without those of `sources`, without texts with `hide`; returns their digest."""
    sha = hashlib.sha256()
    with (
        (folder / "rejected.jsonl").open("rb") as old,
        (draft / "rejected.jsonl").open("wb") as new,
    ):
        for line in old:
            reject = json.loads(line)
            if reject["source"] not in sources:
                if hide:
                    line = (canonical(reject | {"start": "", "why": ""}) + "\n").encode()
                sha.update(line)
                new.write(line)
    return sha.hexdigest()


def _copy_set_aside(
    folder: Path, draft: Path, unwanted: pa.Array, sources: Set[str], hide_texts: bool
) -> pa.Table:
    """Rows set aside, without what goes; returns the quarantined rows that went."""
    aside = pq.read_table(folder / "set_aside.parquet")
    out = pc.or_(
        pc.is_in(aside["id"], unwanted),
        pc.is_in(aside["source"], pa.array(sorted(sources), pa.string())),
    )
    left = aside.filter(pc.invert(out))
    if hide_texts:
        for name in ("record", "note"):
            nothing = pa.nulls(len(left), pa.string())
            left = left.set_column(left.column_names.index(name), name, nothing)
    pq.write_table(left, draft / "set_aside.parquet", compression="zstd")
    return aside.filter(pc.and_(out, pc.equal(aside["fate"], "quarantined")))


def _manifest(
    before: dict[str, Any],
    splits: dict[str, Any],
    gone: Counter[str],
    aside: Counter[str],
    renamed: dict[str, str],
) -> dict[str, Any]:
    """The old manifest with its counts brought up to date, and the rebuild on the record."""
    counts = before["counts"]
    quarantined = Counter(counts["quarantined"])
    quarantined.subtract(aside)
    quarantined["erased"] += gone.total() + aside.total()
    created_from = []
    for part in before["created_from"]:
        if "dataset" in part:
            created_from.append(part | {"dataset": renamed.get(part["dataset"], part["dataset"])})
        else:
            created_from.append(part | {"kept": part["kept"] - gone[part["name"]]})
    step = {
        "step": "erase",
        "in_digest": digest_of(before["splits"]),
        "out_digest": digest_of(splits),
    }
    return {key: value for key, value in before.items() if key != "id"} | {
        "splits": splits,
        "counts": counts | {"kept": counts["kept"] - gone.total(),
                            "quarantined": {k: n for k, n in sorted(quarantined.items()) if n}},
        "licence": _licence(before, created_from),
        "created_from": created_from,
        "transforms": [*before["transforms"], step | {"rows": gone.total() + aside.total()}],
    }  # fmt: skip


def _noted(before: dict[str, Any], metas: list[str]) -> dict[str, dict[str, int]]:
    """What was repaired and found, without what the rows that went say of it."""
    gone: dict[str, Counter[str]] = {"sanitised": Counter(), "found": Counter()}
    for meta in map(json.loads, metas):
        gone["sanitised"].update(meta.get("sanitised", []))
        gone["found"].update(finding["entity"] for finding in meta.get("pii", []))
    return {
        name: {what: n - went[what] for what, n in before[name].items() if n > went[what]}
        for name, went in gone.items()
    }


def _less(part: dict[str, Any], gone: Counter[str]) -> dict[str, Any]:
    """A part of a mixture without the rows that went."""
    name = part["dataset"].split("@")[0]
    rows = part["rows"] - sum(n for source, n in gone.items() if source.startswith(f"{name}/"))
    return part | {"rows": rows}


def _licence(before: dict[str, Any], created_from: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary for the rows that are left; a mixture keeps that of its parts."""
    recipe = before["recipe"]
    if "provenance" not in recipe:
        return dict(before["licence"])
    kept_of = {part["name"]: part["kept"] for part in created_from if "name" in part}
    provenance = Provenance([SourceInfo.model_validate(entry) for entry in recipe["provenance"]])
    as_of = datetime.date.fromisoformat(recipe["as_of"]) if recipe["as_of"] else None
    return summary(kept_of, provenance, recipe["use"], as_of)
