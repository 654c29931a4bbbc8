"""`tuneloom mix name=.. parts=[..]`: one dataset out of several, by weights, temperature or epochs.

A part's rows are taken in the order of a hash, again from the start where more are wanted than
there are, so a larger mixture holds the smaller one. Rows that stand in any part's validation or
test split, by id or by split key, are left out of train. `source` becomes DATASET/SOURCE, so the
ledger of a run reports what each part gave, in rows and in tokens; `model.path=..` counts the
tokens here already.
"""

import heapq
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from tuneloom.config import Config
from tuneloom.data.aside import ASIDE, LENGTHS, lengths_of
from tuneloom.data.consent import terms_of
from tuneloom.data.manifest import length_table
from tuneloom.data.paperwork import write_paperwork
from tuneloom.data.provenance import effective
from tuneloom.data.recipe import Name
from tuneloom.data.records import canonical, text_digest
from tuneloom.data.rows import verify_shard
from tuneloom.data.splits import SPLITS, place_of
from tuneloom.data.store import (
    COLUMNS,
    ROWS_PER_SHARD,
    SCHEMA,
    ShardWriter,
    digest_of,
    draft_in,
    manifest_id,
    publish,
    read_manifest,
)
from tuneloom.data.token_shares import TokenCounter
from tuneloom.errors import ConfigError, DataError

Row = dict[str, str]
AT_ONCE = 1_000
MOST_ROWS = 1_000_000_000
"""Of one mixture, about a terabyte; more is a slip in `epochs` or `rows`."""
Positive = Annotated[float, Field(gt=0.0)]


class Part(Config):
    dataset: str
    """A dataset folder."""
    weight: Positive | None = None
    """Share of the mixture, relative to the other weights."""
    epochs: Positive | None = None
    """Times that each row is in the mixture; 0.5 takes half of the rows."""


class Rehearsal(Config):
    dataset: str
    """Rows that keep general skill alive."""
    share: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Of the whole mixture. LoRA on a small base fell from 0.92 to 0.00 on general rows without."""


class MixModelConfig(Config):
    path: str | None = None
    """Folder or hub id whose tokenizer counts the tokens of each dataset; the mixture is the same
    without."""
    revision: str | None = None


class MixConfig(Config):
    name: Name
    parts: Annotated[list[Part], Field(min_length=1)]
    rows: Annotated[int, Field(gt=0)] | None = None
    """Train rows in all, without rehearsal; None takes as many as the parts have."""
    temperature: Annotated[float, Field(ge=1.0)] = 1.0
    """Without weights a part counts for its rows to the power of 1/temperature: 1 is by size."""
    rehearsal: Rehearsal | None = None
    seed: int = 0
    model: MixModelConfig = MixModelConfig()
    root: str = "datasets"

    @model_validator(mode="after")
    def one_way_to_share(self) -> "MixConfig":
        weights = sum(part.weight is not None for part in self.parts)
        epochs = sum(part.epochs is not None for part in self.parts)
        if weights not in (0, len(self.parts)) or epochs not in (0, len(self.parts)):
            raise ValueError("parts: give a weight to every part or to none, and so with epochs")
        if weights and epochs:
            raise ValueError("parts: weight and epochs are two ways to say one thing; keep one")
        if epochs and (self.rows is not None or self.temperature != 1.0):
            raise ValueError("parts: epochs say how many rows; remove rows and temperature")
        if weights and self.temperature != 1.0:
            raise ValueError("temperature: shares parts that have no weight; remove one of the two")
        return self


CONFIG = MixConfig
NOT_COUNTED = (
    "tokens: not counted, since they depend on the tokenizer; add model.path=..., or see shares in "
    "ledger.json of a run"
)


def main(config: MixConfig) -> int:
    """Mix, print the shares and the next command."""
    model = config.model
    counter = TokenCounter(model.path, model.revision) if model.path else None
    folder = mix(config)
    manifest = read_manifest(folder)
    for part in manifest["mixture"]:
        print(f"  {part['dataset']:<32}{part['rows']:>10,} rows {part['share']:>8.2%}"
              f"{part['epochs']:>8.2f} epochs")  # fmt: skip
    print(folder, flush=True)
    print("\n".join(_token_lines(*counter.of(folder)) if counter else [NOT_COUNTED]))
    print(
        f"next: tuneloom train data.path={Path(config.root) / config.name} "
        f"model.path={model.path or '...'}"
    )
    return 0


def _token_lines(tokens: dict[str, int], left_out: int) -> list[str]:
    """A line for each dataset, of the length of its line of rows."""
    total = max(1, sum(tokens.values()))
    lines = [
        f"  {name:<32}{number:>10,} tokens {number / total:>6.2%}"
        for name, number in tokens.items()
    ]
    return [*lines, *([f"  {left_out:,} pairs of answers are not counted"] if left_out else [])]


def mix(config: MixConfig) -> Path:
    """Make the mixture; returns its folder NAME@ID."""
    root = Path(config.root)
    with draft_in(root) as draft:
        return publish(draft, root, _mixed(config, draft))


def _mixed(config: MixConfig, draft: Path) -> dict[str, Any]:
    """Choose the rows of each part and write them; returns the manifest."""
    parts = [Loaded(part.dataset) for part in config.parts]
    rehearsal = Loaded(config.rehearsal.dataset) if config.rehearsal else None
    everyone = [*parts, rehearsal] if rehearsal else parts
    held_ids, held_keys = set[str](), set[str]()
    for part in everyone:
        ids, keys = part.held_out()
        held_ids |= ids
        held_keys |= keys
    for part in everyone:
        part.keep_out(held_ids, held_keys, config.seed)
    wanted = shares(config, [part.train for part in parts])
    if config.rehearsal and rehearsal:
        wanted.append(round(sum(wanted) * config.rehearsal.share / (1.0 - config.rehearsal.share)))
    if not any(wanted):
        raise ConfigError("parts: no row is taken; raise epochs")
    if sum(wanted) > MOST_ROWS:
        raise ConfigError(f"parts: {sum(wanted):,} rows in all; at most {MOST_ROWS:,} are mixed")
    for part, number in zip(everyone, wanted, strict=True):
        part.take(number)
    return _write(config, draft, parts, everyone)


def shares(config: MixConfig, sizes: list[int]) -> list[int]:
    """Train rows of each part; parts of weight are rounded down and the rest goes to the first."""
    if config.parts[0].epochs is not None:
        return [
            round(size * (part.epochs or 0)) for part, size in zip(config.parts, sizes, strict=True)
        ]
    if config.parts[0].weight is not None:
        weights = np.array([part.weight for part in config.parts], dtype=np.float64)
    else:
        weights = np.array(sizes, dtype=np.float64) ** (1.0 / config.temperature)
    total = sum(sizes) if config.rows is None else config.rows
    rows = np.floor(weights / weights.sum() * total + 1e-9).astype(int).tolist()
    rows[0] += total - sum(rows)
    return list(rows)


class Loaded:
    """One part: its name, what it says of itself, and how often each of its train rows is taken.

    Rows are read in batches; 17 bytes a train row stay in memory, and the held-out ids and keys.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.name = f"{self.manifest['name']}@{self.manifest['id']}"
        for split in self.manifest["splits"].values():
            for shard in split["shards"]:
                verify_shard(self.folder / shard["file"], shard["sha256"])
        self.train = self.left_out = self.taken = 0
        self.order = self.times = np.zeros(0, np.int64)

    def held_out(self) -> tuple[set[str], set[str]]:
        """Ids and keys of the validation and test rows."""
        ids, keys = set[str](), set[str]()
        for split in ("validation", "test"):
            for row in self._read(split, ["id", "meta"]):
                ids.add(row["id"])
                keys.add(_key(row["meta"]))
        return ids, keys

    def keep_out(self, ids: set[str], keys: set[str], seed: int) -> None:
        """Choose the train rows that no part validates or tests on, in the order of a hash."""
        places, clean = array("d"), array("b")
        for row in self._read("train", ["id", "meta"]):
            places.append(place_of(f"{seed} {row['id']}"))
            clean.append(row["id"] not in ids and _key(row["meta"]) not in keys)
        kept = np.flatnonzero(np.frombuffer(clean, np.int8))
        self.order = kept[np.argsort(np.frombuffer(places, np.float64)[kept], kind="stable")]
        self.times = np.zeros(len(clean), np.int64)
        self.train, self.left_out = len(kept), len(clean) - len(kept)
        if not self.train:
            raise DataError(f"parts: {self.name} has no train rows that no part holds out")

    def take(self, number: int) -> None:
        """Take `number` train rows, round and round in their order."""
        rounds, rest = divmod(number, self.train)
        self.taken = number
        self.times[self.order] = rounds
        self.times[self.order[:rest]] += 1

    def rows(self, split: str) -> Iterator[Row]:
        """The rows of a split in the order of ids, those of train as often as they are taken."""
        before = ""
        for number, row in enumerate(self._read(split, COLUMNS)):
            if row["id"] < before:
                raise DataError(f"{self.folder}: {split} is not in the order of ids; ingest again")
            before = row["id"]
            row["source"] = f"{self.manifest['name']}/{row['source']}"
            for _ in range(self.times[number] if split == "train" else 1):
                yield row

    def _read(self, split: str, columns: Sequence[str]) -> Iterator[Row]:
        for shard in self.manifest["splits"].get(split, {"shards": []})["shards"]:
            with pq.ParquetFile(self.folder / shard["file"]) as file:
                for batch in file.iter_batches(AT_ONCE, columns=list(columns)):
                    yield from batch.to_pylist()


def _key(meta: str) -> str:
    return str(json.loads(meta)["key"])


def _joined(parts: list[Loaded], split: str) -> Iterator[Row]:
    """The rows of all parts in the order of ids, and of equal ones in that of sources."""
    return heapq.merge(*(part.rows(split) for part in parts), key=itemgetter("id", "source"))


def _write(
    config: MixConfig, draft: Path, parts: list[Loaded], everyone: list[Loaded]
) -> dict[str, Any]:
    """Shards, paperwork and manifest of the mixture."""
    lengths = np.zeros(len(LENGTHS), dtype=np.int64)
    writers = {split: ShardWriter(draft, split, ROWS_PER_SHARD) for split in SPLITS}
    for table in _tables(_joined(everyone, "train")):
        writers["train"].add(table)
        lengths += lengths_of(table["record"])
    for split in ("validation", "test"):
        firsts = (next(same) for _, same in groupby(_joined(parts, split), itemgetter("id")))
        for table in _tables(firsts):
            writers[split].add(table)
    splits = {split: writer.close() for split, writer in writers.items()}
    kept = sum(part["rows"] for part in splits.values())
    licences: Counter[str] = Counter()
    for part in everyone:
        for name, number in part.manifest["licence"]["licences"].items():
            share = number / max(1, part.manifest["counts"]["kept"])
            licences[name] += round(share * part.taken)
    (draft / "rejected.jsonl").write_text("", encoding="utf-8")
    pq.write_table(ASIDE.empty_table(), draft / "set_aside.parquet")
    places: Any = {
        "root": True,
        "model": True,
        "parts": {"__all__": {"dataset"}},
        "rehearsal": {"dataset"},
    }
    identity = config.model_dump(mode="json", exclude=places)
    mixture = [
        {"dataset": part.name, "rows": part.taken,
         "share": round(part.taken / splits["train"]["rows"], 6),
         "epochs": round(part.taken / part.train, 6), "held_out": part.left_out}
        for part in everyone
    ]  # fmt: skip
    manifest = {
        "name": config.name, "splits": splits,
        "counts": {"in": kept, "kept": kept, "rejected": {}, "deduplicated": {}, "quarantined": {}},
        "lengths": length_table(lengths), "sanitised": {}, "found": {}, "leaks": {}, "against": [],
        "label_conflicts": 0, "label_issues": {}, "labels": {}, "mixture": mixture,
        "licence": _licence(everyone, dict(sorted(licences.items()))),
        "config_digest": text_digest(canonical(identity)), "recipe": identity,
        "transforms": [{"step": "mix", "version": 1, "rows": kept, "out_digest": digest_of(splits),
                        "in_digest": text_digest(" ".join(part.name for part in everyone))}],
        "created_from": [
            {"dataset": part.name, "split": "train", "terms": terms_of(part.folder, part.manifest)}
            for part in everyone
        ],
    }  # fmt: skip
    manifest["id"] = manifest_id(manifest)
    write_paperwork(draft, manifest)
    return manifest


def _tables(rows: Iterator[Row]) -> Iterator[pa.Table]:
    """Rows in tables of AT_ONCE."""
    while some := list(islice(rows, AT_ONCE)):
        yield pa.Table.from_pylist(some, SCHEMA)


def _licence(everyone: list[Loaded], licences: dict[str, int]) -> dict[str, Any]:
    """All parts' licences together, and everything that blocks one of them."""
    blockers = [
        blocker | {"source": f"{part.manifest['name']}/{blocker['source']}"}
        for part in everyone
        for blocker in part.manifest["licence"]["blockers"]
    ]
    uses = {part.manifest["licence"]["use"] for part in everyone}
    return {
        "use": "commercial" if uses == {"commercial"} else "research", "licences": licences,
        "effective": effective(licences), "blockers": blockers,
        "rows_to_drop": sum(blocker["rows"] for blocker in blockers),
    }  # fmt: skip
