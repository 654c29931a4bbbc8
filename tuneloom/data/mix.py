"""`tuneloom mix name=.. parts=[..]`: one dataset out of several, by weights, temperature or epochs.

A part's rows are taken in the order of a hash, again from the start where more are wanted than
there are, so a larger mixture holds the smaller one. Rows that stand in any part's validation or
test split, by id or by split key, are left out of train. `source` becomes DATASET/SOURCE, so the
ledger of a run reports what each part gave, in rows and in tokens; `model.path=..` counts the
tokens here already.
"""

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from tuneloom.config import Config
from tuneloom.data.aside import ASIDE, LENGTHS
from tuneloom.data.manifest import length_table
from tuneloom.data.paperwork import write_paperwork
from tuneloom.data.provenance import effective
from tuneloom.data.recipe import Name
from tuneloom.data.records import canonical
from tuneloom.data.rows import verify_shard
from tuneloom.data.splits import SPLITS, place_of
from tuneloom.data.store import (
    ROWS_PER_SHARD,
    SCHEMA,
    ShardWriter,
    digest_of,
    manifest_id,
    publish,
    read_manifest,
)
from tuneloom.data.token_shares import TokenCounter
from tuneloom.errors import DataError

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
    print("\n".join(_token_lines(counter.of(folder)) if counter else [NOT_COUNTED]))
    print(
        f"next: tuneloom train data.path={Path(config.root) / config.name} "
        f"model.path={model.path or '...'}"
    )
    return 0


def _token_lines(tokens: dict[str, int]) -> list[str]:
    """A line for each dataset, of the length of its line of rows."""
    total = max(1, sum(tokens.values()))
    return [
        f"  {name:<32}{number:>10,} tokens {number / total:>6.2%}"
        for name, number in tokens.items()
    ]


def mix(config: MixConfig) -> Path:
    """Make the mixture; returns its folder NAME@ID."""
    root = Path(config.root)
    root.mkdir(parents=True, exist_ok=True)
    parts = [Loaded(part.dataset) for part in config.parts]
    rehearsal = Loaded(config.rehearsal.dataset) if config.rehearsal else None
    everyone = [*parts, rehearsal] if rehearsal else parts
    held_ids, held_keys = set[str](), set[str]()
    for part in everyone:
        ids, keys = part.held_out()
        held_ids |= ids
        held_keys |= keys
    for part in everyone:
        part.keep_out(held_ids, held_keys)
    wanted = shares(config, [len(part.train) for part in parts])
    if config.rehearsal and rehearsal:
        wanted.append(round(sum(wanted) * config.rehearsal.share / (1.0 - config.rehearsal.share)))
    taken = [part.take(number, config.seed) for part, number in zip(everyone, wanted, strict=True)]
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=root))
    try:
        manifest = _write(config, draft, parts, everyone, taken)
        return publish(draft, root, manifest)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


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
    """One part: its rows by split, its name, what it says of itself."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.name = f"{self.manifest['name']}@{self.manifest['id']}"
        self.splits = {split: self._read(split) for split in SPLITS}
        self.train = self.splits["train"]
        self.left_out = 0

    def _read(self, split: str) -> pa.Table:
        shards = self.manifest["splits"].get(split, {"shards": []})["shards"]
        for shard in shards:
            verify_shard(self.folder / shard["file"], shard["sha256"])
        tables = [pq.read_table(self.folder / shard["file"]) for shard in shards]
        rows = pa.concat_tables([SCHEMA.empty_table(), *tables])
        sources = [f"{self.manifest['name']}/{source}" for source in rows["source"].to_pylist()]
        return rows.set_column(2, "source", pa.array(sources, pa.string()))

    def held_out(self) -> tuple[set[str], set[str]]:
        """Ids and keys of the validation and test rows."""
        tables = [self.splits["validation"], self.splits["test"]]
        ids = {i for table in tables for i in table["id"].to_pylist()}
        return ids, {_key(meta) for table in tables for meta in table["meta"].to_pylist()}

    def keep_out(self, ids: set[str], keys: set[str]) -> None:
        """Remove train rows that some part validates or tests on."""
        rows = zip(self.train["id"].to_pylist(), self.train["meta"].to_pylist(), strict=True)
        clean = [i not in ids and _key(meta) not in keys for i, meta in rows]
        self.left_out = len(clean) - sum(clean)
        self.train = self.train.filter(pa.array(clean, pa.bool_()))

    def take(self, number: int, seed: int) -> pa.Table:
        """`number` train rows in the order of a hash of their ids, round and round."""
        if not len(self.train):
            raise DataError(f"parts: {self.name} has no train rows that no part holds out")
        places = [place_of(f"{seed} {i}") for i in self.train["id"].to_pylist()]
        order = np.argsort(np.array(places), kind="stable")
        return self.train.take(pa.array(np.resize(order, number)))


def _key(meta: str) -> str:
    return str(json.loads(meta)["key"])


def _write(
    config: MixConfig,
    draft: Path,
    parts: list[Loaded],
    everyone: list[Loaded],
    taken: list[pa.Table],
) -> dict[str, Any]:
    """Shards, paperwork and manifest of the mixture."""
    writers = {split: ShardWriter(draft, split, ROWS_PER_SHARD) for split in SPLITS}
    train = pa.concat_tables(taken).sort_by([("id", "ascending"), ("source", "ascending")])
    writers["train"].add(train)
    for split in ("validation", "test"):
        joined = pa.concat_tables([part.splits[split] for part in parts]).sort_by("id")
        ids = joined["id"].to_pylist()
        fresh = [i == 0 or ids[i] != ids[i - 1] for i in range(len(ids))]
        writers[split].add(joined.filter(pa.array(fresh, pa.bool_())))
    splits = {split: writer.close() for split, writer in writers.items()}
    kept = sum(part["rows"] for part in splits.values())
    licences: Counter[str] = Counter()
    for part, rows in zip(everyone, taken, strict=True):
        for name, number in part.manifest["licence"]["licences"].items():
            licences[name] += round(number / max(1, part.manifest["counts"]["kept"]) * len(rows))
    (draft / "rejected.jsonl").write_text("", encoding="utf-8")
    pq.write_table(ASIDE.empty_table(), draft / "set_aside.parquet")
    places: Any = {
        "root": True,
        "model": True,
        "parts": {"__all__": {"dataset"}},
        "rehearsal": {"dataset"},
    }
    identity = config.model_dump(mode="json", exclude=places)
    lengths = np.bincount(
        np.searchsorted(LENGTHS[:-1], [len(record) for record in train["record"].to_pylist()]),
        minlength=len(LENGTHS),
    )
    mixture = [
        {"dataset": part.name, "rows": len(rows), "share": round(len(rows) / len(train), 6),
         "epochs": round(len(rows) / len(part.train), 6), "held_out": part.left_out}
        for part, rows in zip(everyone, taken, strict=True)
    ]  # fmt: skip
    manifest = {
        "name": config.name, "splits": splits,
        "counts": {"in": kept, "kept": kept, "rejected": {}, "deduplicated": {}, "quarantined": {}},
        "lengths": length_table(lengths), "sanitised": {}, "found": {}, "leaks": {}, "against": [],
        "label_conflicts": 0, "label_issues": {}, "labels": {}, "mixture": mixture,
        "licence": _licence(everyone, dict(sorted(licences.items()))),
        "config_digest": _digest(canonical(identity)), "recipe": identity,
        "transforms": [{"step": "mix", "version": 1, "rows": kept, "out_digest": digest_of(splits),
                        "in_digest": _digest(" ".join(part.name for part in everyone))}],
        "created_from": [{"dataset": part.name, "split": "train"} for part in everyone],
    }  # fmt: skip
    manifest["id"] = manifest_id(manifest)
    write_paperwork(draft, manifest)
    return manifest


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


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
