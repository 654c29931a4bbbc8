"""manifest.json: all that a dataset says of itself, and what refuses to become one."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tuneloom.data.aside import LENGTHS, Written
from tuneloom.data.card import balance
from tuneloom.data.decide import Columns, Decision, table_of
from tuneloom.data.provenance import Provenance, summary
from tuneloom.data.readers import Passed, Refused
from tuneloom.data.recipe import Recipe
from tuneloom.data.records import canonical
from tuneloom.data.rows import open_rows
from tuneloom.data.splits import SPLITS
from tuneloom.data.store import digest_of, file_digest, manifest_id
from tuneloom.errors import DataError

VERSION = 4
"""Raised when the same rows and recipe would give other records than before."""


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
    refused: list[Refused] = field(default_factory=list)


def make_manifest(
    recipe: Recipe,
    tally: Tally,
    columns: Columns,
    decision: Decision,
    exact: int,
    written: Written,
) -> dict[str, Any]:
    """All that the dataset says of itself; its id is the digest of it."""
    fates = decision.counts()
    if exact:
        fates["deduplicated"]["exact"] = exact
    fates["quarantined"].update(tally.dropped)
    by_source = table_of(columns.source, len(columns.sources), (decision.fate, len(decision.fates)))
    kept_of = dict(zip(columns.sources, by_source[:, 0].tolist(), strict=True))
    kept = sum(kept_of.values())
    identity, provenance = recipe_identity(recipe), Provenance(recipe.provenance)
    manifest = {
        "name": recipe.name,
        "splits": written.splits,
        "counts": {"in": tally.rows_of.total(), "kept": kept,
                   "rejected": plain(tally.rejected), "deduplicated": plain(fates["deduplicated"]),
                   "quarantined": plain(fates["quarantined"])},
        "lengths": length_table(written.lengths),
        "sanitised": plain(tally.changed),
        "found": plain(tally.found),
        "leaks": decision.leaks,
        "label_conflicts": decision.conflicts,
        "label_issues": decision.label_issues,
        "labels": _label_table(columns, decision.split),
        "licence": summary(kept_of, provenance, recipe.use, recipe.as_of),
        "rejects_digest": tally.rejects.hexdigest(),
        "config_digest": hashlib.sha256(canonical(identity).encode()).hexdigest(),
        "recipe": identity,
        "mixture": [],
        "transforms": [
            {"step": "ingest", "version": VERSION, "in_digest": _sources_digest(tally),
             "out_digest": digest_of(written.splits), "rows": kept},
        ],
        "against": [
            {"name": entry.name, "digest": open_rows(entry.path, entry.split).digest}
            for entry in recipe.against.sets
        ],
        "created_from": [
            *decision.created_from,
            *({"name": p.source, "rows": tally.rows_of[p.source], "kept": kept_of.get(p.source, 0),
               "bytes": p.bytes, "sha256": p.sha256,
               "provenance": provenance.of(p.source).model_dump(mode="json")}
              for p in tally.passed),
        ],
    }  # fmt: skip
    if tally.refused:
        manifest["refused_files"] = [{"name": r.source, "why": r.why} for r in tally.refused]
    return manifest | {"id": manifest_id(manifest)}


def _sources_digest(tally: Tally) -> str:
    """One digest over the raw files, as they lie on disk."""
    text = " ".join(f"{passed.source} {passed.sha256}" for passed in tally.passed)
    return hashlib.sha256(text.encode()).hexdigest()


def plain(counter: Counter[str]) -> dict[str, int]:
    """A counter in the order of its keys."""
    return dict(sorted(counter.items()))


def recipe_identity(recipe: Recipe) -> dict[str, Any]:
    """The recipe without where files happen to lie on this machine, and without keys to secrets."""
    sets = {"sets": {"__all__": {"path"}}}
    places: Any = {"source": True, "privacy": {"key_file"}, "against": sets}
    whole = recipe.model_dump(mode="json", exclude=places)
    if recipe.json_schema:
        whole["json_schema"] = file_digest(Path(recipe.json_schema))
    if recipe.within:
        whole["within"] = {"split": recipe.within.split}
    return whole


def refuse_over_files(limit: int, tally: Tally) -> None:
    """Raise DataError when more files than allowed could not be read."""
    if len(tally.refused) > limit:
        lines = [f"  {refused.why}" for refused in tally.refused]
        raise DataError(
            f"max_refused_files: {len(tally.refused)} files could not be read, over {limit}; mend "
            "or remove them, or raise the limit\n" + "\n".join(lines)
        )


def refuse_over_budget(recipe: Recipe, tally: Tally) -> None:
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


def refuse_blocked(recipe: Recipe, licence: dict[str, Any]) -> None:
    """Raise DataError when a source does not allow the use and the recipe asks to fail then."""
    if recipe.licence_action == "fail" and licence["blockers"]:
        lines = [f"  {b['source']}: {b['rows']:,} rows, {b['reason']}" for b in licence["blockers"]]
        raise DataError(
            f"data.licence_action: {licence['rows_to_drop']:,} rows do not allow "
            f"{recipe.use} use; drop these sources\n" + "\n".join(lines)
        )


def refuse_leaks(recipe: Recipe, leaks: dict[str, int]) -> None:
    """Raise DataError when rows stand in an evaluation set and the recipe asks to fail then."""
    if recipe.against.action == "fail" and any(leaks.values()):
        lines = [f"  {name:<32}{rows:>10,}" for name, rows in leaks.items() if rows]
        raise DataError(
            f"data.against: {sum(leaks.values()):,} rows are known to an evaluation set; remove "
            "them from the source, or set data.against.action=drop\n" + "\n".join(lines)
        )


def refuse_empty(counts: dict[str, Any]) -> None:
    """Raise DataError when no row is left, with what became of them."""
    if not counts["kept"]:
        lines = [f"  {what:<32}{rows:>10,}" for what, rows in balance(counts)]
        raise DataError(
            "source: no row is left to train on; mend the source, or allow what the recipe sets "
            "aside\n" + "\n".join(lines)
        )


def _label_table(columns: Columns, split: np.ndarray) -> dict[str, dict[str, int]]:
    """Rows of each label in each split."""
    counted = table_of(columns.label, len(columns.labels), (split, len(SPLITS))).tolist()
    return {
        label: dict(zip(SPLITS, by_split, strict=True))
        for label, by_split in zip(columns.labels, counted, strict=True)
    }


def length_table(counted: np.ndarray) -> dict[str, list[int]]:
    """Records by their characters, without the empty ends of the scale."""
    filled = np.flatnonzero(counted)
    ends = slice(int(filled[0]), int(filled[-1]) + 1) if len(filled) else slice(0)
    return {"up_to": list(LENGTHS)[ends], "rows": counted.tolist()[ends]}
