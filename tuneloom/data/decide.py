"""What becomes of each unique row: kept, a near-duplicate, or set aside, and in which split.

Works on arrays of a few numbers a row (about 60 bytes), in the order of ids, and so gives the same
answer however the rows were read.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tuneloom.data.dedupe import PERMUTATIONS, clusters
from tuneloom.data.labels import find_issues
from tuneloom.data.provenance import Provenance, allows
from tuneloom.data.recipe import Recipe
from tuneloom.data.splits import assign
from tuneloom.data.store import read_column, read_manifest
from tuneloom.errors import DataError


@dataclass
class Columns:
    """The numbers of all unique rows, in the order of ids; names for the codes in them."""

    key: np.ndarray  # (N,) uint64
    asked: np.ndarray  # (N,) uint64
    answer: np.ndarray  # (N,) uint64
    rank: np.ndarray  # (N,) int32
    label: np.ndarray  # (N,) int32, -1 for none
    source: np.ndarray  # (N,) int32
    weak: np.ndarray  # (N,) int32, -1 for none
    leak: np.ndarray  # (N,) int32, -1 for none
    labels: list[str]
    sources: list[str]
    weaknesses: list[str]
    leaks: list[str]


class Collector:
    """Builds Columns from the ranges of unique rows as they pass."""

    def __init__(self) -> None:
        self.parts: dict[str, list[np.ndarray]] = {}
        self.names: dict[str, dict[str, int]] = {"label": {}, "source": {}, "weak": {}, "leak": {}}

    def add(self, table: pa.Table) -> None:
        """Take the numbers of one range."""
        for name in ("key", "asked", "answer", "rank"):
            self.parts.setdefault(name, []).append(table[name].to_numpy())
        for name, known in self.names.items():
            encoded = table[name].combine_chunks().dictionary_encode()
            codes = [known.setdefault(v, len(known)) for v in encoded.dictionary.to_pylist()]
            index = pc.fill_null(encoded.indices, len(codes)).to_numpy()
            self.parts.setdefault(name, []).append(np.array([*codes, -1], np.int32)[index])

    def columns(self) -> Columns:
        """All ranges joined; codes stand for names in sorted order."""
        joined = {name: np.concatenate(parts) for name, parts in self.parts.items()}
        names = {}
        for name, known in self.names.items():
            names[name] = sorted(known)
            place = np.array([*(names[name].index(v) for v in known), -1], np.int32)
            joined[name] = place[joined[name]]
        return Columns(
            **joined,
            labels=names["label"],
            sources=names["source"],
            weaknesses=names["weak"],
            leaks=names["leak"],
        )


@dataclass
class Decision:
    """`fate`: (N,) index into `fates`, 0 for kept; `leader`: (N,) row kept for a near-duplicate."""

    fates: list[tuple[str, str]]
    fate: np.ndarray
    leader: np.ndarray
    split: np.ndarray
    created_from: list[dict[str, Any]]
    conflicts: int
    leaks: dict[str, int]
    label_issues: dict[str, int] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)

    def counts(self) -> dict[str, Counter[str]]:
        """Rows by kind of fate and reason."""
        totals: dict[str, Counter[str]] = {"deduplicated": Counter(), "quarantined": Counter()}
        numbers = np.bincount(self.fate, minlength=len(self.fates))
        for (kind, reason), number in zip(self.fates, numbers, strict=True):
            if number and kind in totals:
                totals[kind][reason] += int(number)
        return totals


def decide(
    columns: Columns,
    signatures: np.ndarray | None,
    recipe: Recipe,
    inputs: Callable[[np.ndarray], list[str]],
) -> Decision:
    """Set rows aside in the order of the sentences below, then split what is left.

    `inputs` reads the questions of some rows, for what cannot be told from numbers.
    """
    count = len(columns.key)
    decision = Decision([("kept", "")], np.zeros(count, np.int32), np.arange(count),
                        np.full(count, -1, np.int8), [], 0, {})  # fmt: skip
    if recipe.within:
        folder, split = Path(recipe.within.dataset), recipe.within.split
        manifest = read_manifest(folder)
        allowed = keys_of(folder, manifest, split)
        _set_aside(decision, ~np.isin(columns.key, allowed), "quarantined", "held_out")
        parent = f"{manifest['name']}@{manifest['id']}"
        decision.created_from.append({"dataset": parent, "split": split})
    for code, name in enumerate(columns.weaknesses):
        _set_aside(decision, columns.weak == code, "quarantined", name)
    decision.leaks = {
        name: int(((columns.leak == code) & (decision.fate == 0)).sum())
        for code, name in enumerate(columns.leaks)
    }
    if recipe.against.action == "drop":
        for code, name in enumerate(columns.leaks):
            _set_aside(decision, columns.leak == code, "quarantined", f"leak_{name}")
    if recipe.licence_action == "drop":
        provenance = Provenance(recipe.provenance)
        for code, source in enumerate(columns.sources):
            if allows(provenance.of(source), recipe.use, recipe.as_of):
                _set_aside(decision, columns.source == code, "quarantined", "licence")
    if signatures is not None:
        _near(decision, columns, signatures, recipe)
    conflicting = _conflicts(columns, decision.fate == 0)
    decision.conflicts = int(conflicting.sum())
    if recipe.conflicts == "quarantine":
        _set_aside(decision, conflicting, "quarantined", "label_conflict")
    if recipe.label_issues.action != "off":
        _doubt(decision, columns, recipe, inputs)
    kept = decision.fate == 0
    group = columns.key
    if recipe.near.action == "group":
        group = group[_together(columns.key, decision.leader)]
    labels = columns.label if columns.labels and (columns.label[kept] >= 0).all() else None
    decision.split[kept] = assign(
        group[kept], None if labels is None else labels[kept], recipe.split
    )
    return decision


def _set_aside(decision: Decision, rows: np.ndarray, kind: str, reason: str) -> None:
    """Give a fate to rows that have none yet."""
    decision.fates.append((kind, reason))
    decision.fate[rows & (decision.fate == 0)] = len(decision.fates) - 1


def _near(decision: Decision, columns: Columns, signatures: np.ndarray, recipe: Recipe) -> None:
    """Clusters among the rows still kept; all but one of each are dropped where the recipe says."""
    kept = np.flatnonzero(decision.fate == 0)
    leader = kept[clusters(signatures[kept], columns.rank[kept], recipe.near)]
    decision.leader[kept] = leader
    if recipe.near.action == "drop":
        _set_aside(decision, decision.leader != np.arange(len(columns.key)), "deduplicated", "near")


def _doubt(
    decision: Decision,
    columns: Columns,
    recipe: Recipe,
    inputs: Callable[[np.ndarray], list[str]],
) -> None:
    """Count rows still kept whose label looks wrong, and set them aside where the recipe says."""
    labels = np.where(decision.fate == 0, columns.label, -1)
    issues = find_issues(labels, columns.labels, inputs, recipe.label_issues)
    decision.label_issues = {
        "checked": issues.checked,
        "suspected": len(issues.rows),
        "unchecked": int((decision.fate == 0).sum()) - issues.checked,
    }
    if recipe.label_issues.action == "quarantine":
        suspected = np.isin(np.arange(len(labels)), issues.rows)
        _set_aside(decision, suspected, "quarantined", "label_issue")
        decision.notes = dict(zip(issues.rows.tolist(), issues.notes, strict=True))


def _together(key: np.ndarray, leader: np.ndarray) -> np.ndarray:
    """(N,) int64: the first row that each row is tied to by keys and clusters."""
    ties = [np.unique(values, return_inverse=True)[1] for values in (key, leader)]
    first = np.arange(len(key))
    while True:
        before = first
        for codes in ties:
            lowest = np.full(len(key), len(key))
            np.minimum.at(lowest, codes, first)
            first = lowest[codes]
        if (first == before).all():
            return first


def _conflicts(columns: Columns, kept: np.ndarray) -> np.ndarray:
    """(N,) bool: kept rows whose question another kept row answers differently."""
    order = np.lexsort((columns.answer, columns.asked))
    order = order[kept[order]]
    asked, answer = columns.asked[order], columns.answer[order]
    differs = (asked[1:] == asked[:-1]) & (answer[1:] != answer[:-1])
    conflicting = np.isin(columns.asked, np.unique(asked[1:][differs])) & kept
    return conflicting


def keys_of(folder: Path, manifest: dict[str, Any], split: str) -> np.ndarray:
    """The key hashes of one split of a dataset, sorted."""
    if split not in manifest["splits"]:
        raise DataError(
            f"data.within.split: {folder} has {sorted(manifest['splits'])}, not {split!r}"
        )
    keys = [
        int(json.loads(meta)["key"], 16) for meta in read_column(folder, manifest, split, "meta")
    ]
    return np.array(sorted(keys), dtype=np.uint64)


def open_signatures(path: Path) -> np.ndarray:
    """(N, 128) uint32 over the file that the first pass wrote."""
    if not path.stat().st_size:
        return np.empty((0, PERMUTATIONS), np.uint32)
    return np.memmap(path, dtype="<u4", mode="r").reshape(-1, PERMUTATIONS)
