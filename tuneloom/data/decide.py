"""What becomes of each unique row: kept, a near-duplicate, or set aside, and in which split.

Works on a few numbers of each row, in the order of ids, and so gives the same answer however the
rows were read. They lie in mapped files and are taken a chunk at a time (`scratch.py`).
"""

import itertools
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
from tuneloom.data.labels import find_issues, refuse_too_many
from tuneloom.data.provenance import Provenance, allows
from tuneloom.data.recipe import Recipe, WithinConfig
from tuneloom.data.scratch import CHUNK, Column, Lowest, Scratch, buckets, slices
from tuneloom.data.splits import assign
from tuneloom.data.store import read_column, read_manifest
from tuneloom.errors import DataError

Chosen = Callable[[slice], np.ndarray]
NAMED = ("label", "source", "weak", "leak")
MOST_LABELS = 100_000
"""Each has a line in the manifest and a place in memory."""


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

    def __init__(self, scratch: Scratch) -> None:
        self.hashes = {name: Column(scratch, "u8") for name in ("key", "asked", "answer")}
        self.codes = {name: Column(scratch, "i4") for name in ("rank", *NAMED)}
        self.names: dict[str, dict[str, int]] = {name: {} for name in NAMED}

    def add(self, table: pa.Table) -> None:
        """Take the numbers of one range."""
        for name, column in (self.hashes | {"rank": self.codes["rank"]}).items():
            column.add(table[name].to_numpy())
        for name, known in self.names.items():
            encoded = table[name].combine_chunks().dictionary_encode()
            codes = [known.setdefault(v, len(known)) for v in encoded.dictionary.to_pylist()]
            index = pc.fill_null(encoded.indices, len(codes)).to_numpy()
            self.codes[name].add(np.array([*codes, -1], np.int32)[index])
        if len(self.names["label"]) > MOST_LABELS:
            raise DataError(
                f"data.label: over {MOST_LABELS:,} different labels, so no class of anything; name "
                "another field, or leave data.label out"
            )

    def columns(self) -> Columns:
        """All ranges; codes stand for names in sorted order."""
        joined = {name: column.whole() for name, column in (self.hashes | self.codes).items()}
        names = {name: sorted(known) for name, known in self.names.items()}
        for name, known in self.names.items():
            rank = {value: place for place, value in enumerate(names[name])}
            place = np.array([*(rank[value] for value in known), -1], np.int32)
            for rows in slices(len(joined[name])):
                joined[name][rows] = place[joined[name][rows]]
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
        numbers = table_of(self.fate, len(self.fates))
        for (kind, reason), number in zip(self.fates, numbers, strict=True):
            if number and kind in totals:
                totals[kind][reason] += int(number)
        return totals


def decide(
    columns: Columns,
    signatures: np.ndarray | None,
    recipe: Recipe,
    inputs: Callable[[np.ndarray], list[str]],
    scratch: Scratch,
) -> Decision:
    """Set rows aside in the order of the sentences below, then split what is left.

    `inputs` reads the questions of some rows, for what cannot be told from numbers.
    """
    count = len(columns.key)
    decision = Decision(
        [("kept", "")], scratch.array(count, "i4"), scratch.numbers(count), np.empty(0), [], 0, {}
    )
    if recipe.within:
        _within(decision, columns, recipe.within, scratch)
    for code, name in enumerate(columns.weaknesses):
        _set_aside(decision, "quarantined", name, _is(columns.weak, code))
    decision.leaks = _leaks(decision, columns)
    if recipe.against.action == "drop":
        for code, name in enumerate(columns.leaks):
            _set_aside(decision, "quarantined", f"leak_{name}", _is(columns.leak, code))
    if recipe.licence_action == "drop":
        provenance = Provenance(recipe.provenance)
        for code, source in enumerate(columns.sources):
            if allows(provenance.of(source), recipe.use, recipe.as_of):
                _set_aside(decision, "quarantined", "licence", _is(columns.source, code))
    kept = _kept(decision, scratch)
    conflicting, decision.conflicts = _conflicts(columns, kept, scratch)
    if recipe.conflicts == "quarantine":
        _set_aside(decision, "quarantined", "label_conflict", lambda rows: conflicting[rows])
    if signatures is not None:
        _near(decision, columns, signatures, recipe, conflicting, scratch)
    if recipe.label_issues.action != "off":
        _doubt(decision, columns, recipe, inputs)
    kept = _kept(decision, scratch)
    group = columns.key
    if recipe.near.action == "group":
        group = _together(columns.key, decision.leader, scratch)
    labels = columns.label if columns.labels and _all_labelled(columns, kept) else None
    decision.split = assign(scratch, group, labels, kept, recipe.split)
    return decision


def _set_aside(decision: Decision, kind: str, reason: str, chosen: Chosen) -> None:
    """Give a fate to rows that have none yet; `chosen` tells a chunk of rows, (n,) bool."""
    decision.fates.append((kind, reason))
    for rows in slices(len(decision.fate)):
        fate = decision.fate[rows]
        fate[chosen(rows) & (fate == 0)] = len(decision.fates) - 1


def _is(codes: np.ndarray, code: int) -> Chosen:
    """Rows of one code."""
    return lambda rows: codes[rows] == code


def _kept(decision: Decision, scratch: Scratch) -> np.ndarray:
    """(N,) bool: rows without another fate so far."""
    column = Column(scratch, "?")
    for rows in slices(len(decision.fate)):
        column.add(decision.fate[rows] == 0)
    return column.whole()


def _all_labelled(columns: Columns, kept: np.ndarray) -> bool:
    """True when no kept row is without a label."""
    return all(bool((columns.label[r] >= 0)[kept[r]].all()) for r in slices(len(kept)))


def table_of(codes: np.ndarray, count: int, *more: tuple[np.ndarray, int]) -> np.ndarray:
    """Rows of each code, or of each combination of several columns' codes; -1 is counted nowhere.

    codes: (N,) int below `count`, and so with each of `more`.
    """
    columns, shape = [codes, *(c for c, _ in more)], (count, *(n for _, n in more))
    found = np.zeros(shape, np.int64)
    for rows in slices(len(codes)):
        parts = [column[rows].astype(np.int64) for column in columns]
        named = np.logical_and.reduce([part >= 0 for part in parts])
        flat = np.ravel_multi_index(tuple(part[named] for part in parts), shape)
        found += np.bincount(flat, minlength=found.size).reshape(shape)
    return found


def _within(decision: Decision, columns: Columns, within: WithinConfig, scratch: Scratch) -> None:
    """Set aside what is not of the keys of another dataset's split."""
    folder = Path(within.dataset)
    manifest = read_manifest(folder)
    allowed = keys_of(folder, manifest, within.split, scratch)
    _set_aside(decision, "quarantined", "held_out",
               lambda rows: ~_stands_in(columns.key[rows], allowed))  # fmt: skip
    parent = f"{manifest['name']}@{manifest['id']}"
    decision.created_from.append({"dataset": parent, "split": within.split})


def _stands_in(keys: np.ndarray, rising: np.ndarray) -> np.ndarray:
    """(n,) bool: keys that a sorted array holds."""
    if not len(rising):
        return np.zeros(len(keys), bool)
    return np.asarray(rising[np.minimum(np.searchsorted(rising, keys), len(rising) - 1)] == keys)


def _leaks(decision: Decision, columns: Columns) -> dict[str, int]:
    """Rows without another fate so far, by the set that knows them and how."""
    fates = len(decision.fates)
    counted = table_of(columns.leak, len(columns.leaks), (decision.fate, fates))[:, 0]
    return dict(zip(columns.leaks, counted.tolist(), strict=True))


def _near(
    decision: Decision,
    columns: Columns,
    signatures: np.ndarray,
    recipe: Recipe,
    conflicting: np.ndarray,
    scratch: Scratch,
) -> None:
    """Clusters among the rows still kept; all but one of each are dropped where the recipe says.

    Of rows that contradict each other none is dropped: "yes" and "no" to one long question are
    near-duplicates, and keeping either would decide the conflict unseen.
    """
    among = _kept(decision, scratch)
    if recipe.near.action == "drop":
        for rows in slices(len(among)):
            among[rows] &= ~conflicting[rows]
    leader = clusters(scratch, signatures, columns.rank, among, recipe.near)
    decision.leader = leader
    if recipe.near.action == "drop":
        _set_aside(decision, "deduplicated", "near",
                   lambda rows: leader[rows] != np.arange(rows.start, rows.stop))  # fmt: skip


def _doubt(
    decision: Decision,
    columns: Columns,
    recipe: Recipe,
    inputs: Callable[[np.ndarray], list[str]],
) -> None:
    """Count rows still kept whose label looks wrong, and set them aside where the recipe says."""
    kept = int(table_of(decision.fate, len(decision.fates))[0])
    counted = table_of(columns.label, len(columns.labels), (decision.fate, len(decision.fates)))
    refuse_too_many(int(counted[:, 0].sum()))
    labelled = [
        np.flatnonzero((decision.fate[part] == 0) & (columns.label[part] >= 0)) + part.start
        for part in slices(len(decision.fate))
    ]
    rows = np.concatenate([np.empty(0, np.int64), *labelled])
    issues = find_issues(rows, columns.label[rows], columns.labels, inputs, recipe.label_issues)
    decision.label_issues = {
        "checked": issues.checked,
        "suspected": len(issues.rows),
        "unchecked": kept - issues.checked,
    }
    if recipe.label_issues.action == "quarantine":
        _set_aside(decision, "quarantined", "label_issue",
                   lambda rows: np.isin(np.arange(rows.start, rows.stop), issues.rows))  # fmt: skip
        decision.notes = dict(zip(issues.rows.tolist(), issues.notes, strict=True))


def _together(key: np.ndarray, leader: np.ndarray, scratch: Scratch) -> np.ndarray:
    """(N,) uint64: the key of the first row that each row is tied to by keys and clusters."""
    count = len(key)
    first, everyone = scratch.numbers(count), scratch.array(count, "?", True)
    changed = True
    while changed:
        changed = _spread_over_leaders(first, leader, scratch)
        for bucket in buckets(scratch, key, everyone, first):
            lowest = Lowest("i8")
            for _, keys, firsts in bucket:
                lowest.add(keys, firsts)
            for numbered, keys, firsts in bucket:
                found = lowest.of(keys)
                changed |= bool((found != firsts).any())
                first[numbered] = found
    group = Column(scratch, "u8")
    for rows in slices(count):
        group.add(key[first[rows]])
    return group.whole()


def _spread_over_leaders(first: np.ndarray, leader: np.ndarray, scratch: Scratch) -> bool:
    """Rows of one leader all take the least number among them; False where they had it."""
    lowest = scratch.array(len(first), "i8", len(first))
    for rows in slices(len(first)):
        np.minimum.at(lowest, leader[rows], first[rows])
    changed = False
    for rows in slices(len(first)):
        found = lowest[leader[rows]]
        changed |= bool((found != first[rows]).any())
        first[rows] = found
    return changed


def _conflicts(columns: Columns, kept: np.ndarray, scratch: Scratch) -> tuple[np.ndarray, int]:
    """(N,) bool: kept rows whose question another kept row answers differently; their number."""
    conflicting, number = scratch.array(len(kept), "?"), 0
    for bucket in buckets(scratch, columns.asked, kept, columns.answer):
        lowest, highest = Lowest(), Lowest()
        for _, asked, answer in bucket:
            lowest.add(asked, answer)
            highest.add(asked, ~answer)
        for rows, asked, _ in bucket:
            differs = lowest.of(asked) != ~highest.of(asked)
            conflicting[rows[differs]] = True
            number += int(differs.sum())
    return conflicting, number


def keys_of(folder: Path, manifest: dict[str, Any], split: str, scratch: Scratch) -> np.ndarray:
    """The key hashes of one split of a dataset, sorted where they lie."""
    if split not in manifest["splits"]:
        raise DataError(
            f"data.within.split: {folder} has {sorted(manifest['splits'])}, not {split!r}"
        )
    column = Column(scratch, "u8")
    metas = read_column(folder, manifest, split, "meta")
    while batch := list(itertools.islice(metas, CHUNK)):
        column.add(np.array([int(json.loads(meta)["key"], 16) for meta in batch], np.uint64))
    keys = column.whole()
    keys.sort()
    return keys


def open_signatures(path: Path) -> np.ndarray:
    """(N, 128) uint32 over the file that the first pass wrote."""
    if not path.stat().st_size:
        return np.empty((0, PERMUTATIONS), np.uint32)
    return np.memmap(path, dtype="<u4", mode="r").reshape(-1, PERMUTATIONS)
