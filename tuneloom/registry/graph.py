"""What came from what: sources, datasets, rows, runs and exports, read from their own files.

Nothing is kept beside those files that could differ from them: datasets/*/manifest.json and shards,
runs/*/run.json and exposure.parquet.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tuneloom.errors import DataError
from tuneloom.registry.contract import FILE as CONTRACT

Kind = Literal["row", "subject", "source", "licence", "consent"]
SET_ASIDE = "set_aside"
"""Where quarantined rows stand, which are in no split."""
SEED = r'"seed":"(?P<seed>[0-9a-f]{64})"'
"""In a row's meta, the id of the row that a teacher made it from."""


@dataclass(frozen=True)
class Dataset:
    """One version of a dataset."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.manifest['name']}@{self.manifest['id']}"

    def digests(self) -> dict[str, str]:
        """The digest that a run records of each split, as tuneloom.data.rows computes it."""
        return {
            split: hashlib.sha256(
                ("dataset " + " ".join(shard["sha256"] for shard in part["shards"])).encode()
            ).hexdigest()
            for split, part in self.manifest["splits"].items()
        }

    def rows(self, columns: list[str]) -> Iterator[tuple[str, pa.Table]]:
        """Split and table of every shard."""
        for split, part in self.manifest["splits"].items():
            for shard in part["shards"]:
                path = self.folder / shard["file"]
                try:
                    yield split, pq.read_table(path, columns=columns)
                except (OSError, pa.ArrowException) as error:
                    raise DataError(f"{path}: cannot be read ({error}); ingest again") from None

    def quarantined(self) -> pa.Table:
        """Rows set aside whose text is kept: id, source, and meta where the file tells it."""
        path = self.folder / "set_aside.parquet"
        try:
            names = [n for n in ("id", "source", "meta") if n in pq.read_schema(path).names]
            table = pq.read_table(path, columns=names, filters=pc.field("record").is_valid())
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read ({error}); ingest again") from None
        if "meta" in names:
            return table
        return table.append_column("meta", pa.nulls(len(table), pa.string()))

    def hides_subjects(self) -> bool:
        """True when it was made before quarantined rows named their subjects, and it has some."""
        return bool(self.quarantined()["meta"].null_count)

    def terms(self) -> dict[str, dict[str, Any]]:
        """What the recipe says of each source: licence, consent_until and more; a mixture says it
        of the sources of its parts.
        """
        found = {}
        for part in self.manifest["created_from"]:
            if "provenance" in part:
                found[part["name"]] = part["provenance"]
            for source, said in part.get("terms", {}).items():
                found[f"{part['dataset'].split('@')[0]}/{source}"] = said
        return found

    def parents(self) -> list[str]:
        """Versions of datasets this one was made from."""
        return [part["dataset"] for part in self.manifest["created_from"] if "dataset" in part]


@dataclass(frozen=True)
class Run:
    """One run folder."""

    folder: Path
    record: dict[str, Any]

    @property
    def id(self) -> str:
        return self.folder.name

    def exposure(self) -> pa.Table:
        """Rows that reached a step: those of a finished run, or of its checkpoints so far."""
        files = sorted(self.folder.glob("exposure/step-*.parquet"))
        whole = self.folder / "exposure.parquet"
        tables = [_parquet(path) for path in ([whole] if whole.exists() else files)]
        return (
            pa.concat_tables(tables)
            if tables
            else pa.table({"record_id": pa.array([], pa.string())})
        )

    def exports(self) -> list[Path]:
        """Its weights, and the adapters and models that were exported from them."""
        folders = [self.folder / "weights", *sorted(self.folder.glob("export/*"))]
        return [path for path in folders if path.is_dir()]

    def comes_from(self, other: "Run") -> bool:
        """True when this run was started from `other`: named as parent, from its files, one of its
        checkpoints among them, or from a copy of its weights.
        """
        resumed = [attempt.get("resume") for attempt in self.record.get("attempts", [])]
        places = [self._base.get("path"), *(r for r in resumed if r not in ("auto", "never"))]
        return (
            self.record.get("parent") == other.id
            or any(p and other.folder.resolve() in Path(p).resolve().parents for p in places)
            or self.starts_from_copy_of(other)
        )

    def starts_from_copy_of(self, other: "Run") -> bool:
        """True when its base is weights that `other` exported, in a folder that is none of its."""
        path, digest = self._base.get("path"), self._base.get("digest", "")
        if path is None or digest is None or other.folder.resolve() in Path(path).resolve().parents:
            return False  # without a digest the weights were random
        exported = {_contract(folder).get("weights") for folder in other.exports()}
        return digest in exported or _contract(Path(path)).get("run") == other.id

    @property
    def _base(self) -> dict[str, Any]:
        return self.record.get("base") or {}


@dataclass(frozen=True)
class Graph:
    """All datasets below one root and all runs below another."""

    datasets: dict[str, Dataset]
    runs: dict[str, Run]

    @classmethod
    def load(cls, datasets: str | Path, runs: str | Path) -> "Graph":
        """Read the manifests and run records; missing roots are empty."""
        versions = [
            Dataset(path.parent, _manifest(path))
            for path in sorted(Path(datasets).glob("*@*/manifest.json"))
        ]
        found = [Run(path.parent, _json(path)) for path in sorted(Path(runs).glob("*/run.json"))]
        return cls({d.name: d for d in versions}, {r.id: r for r in found})

    def terms(self, dataset: Dataset) -> dict[str, dict[str, Any]]:
        """Terms by source; the sources of a mixture are DATASET/SOURCE of its parts."""
        found = dataset.terms()
        for name in dataset.parents():
            if parent := self.datasets.get(name):
                prefix = parent.manifest["name"]
                found |= {f"{prefix}/{s}": said for s, said in self.terms(parent).items()}
        return found

    def dataset_of(self, run: Run) -> tuple[Dataset, str] | None:
        """The version and split a run was trained on; None for a raw file, or one that is gone."""
        digest = (run.record.get("dataset") or {}).get("digest")
        for dataset in self.datasets.values():
            for split, own in dataset.digests().items():
                if own == digest:
                    return dataset, split
        return None

    def runs_of(self, dataset: Dataset) -> list[Run]:
        """Runs trained on any split of a version."""
        digests = set(dataset.digests().values())
        return [
            r
            for r in self.runs.values()
            if (r.record.get("dataset") or {}).get("digest") in digests
        ]

    def made_from(self, dataset: Dataset) -> list[Dataset]:
        """Versions made from this one, directly or further on."""
        found: list[Dataset] = []
        for other in self.datasets.values():
            if dataset.name in other.parents() and other not in found:
                found += [other, *(d for d in self.made_from(other) if d not in found)]
        return found

    def descendants(self, runs: list[Run]) -> list[Run]:
        """Runs started from these, directly or further on."""
        found: list[Run] = []
        todo = list(runs)
        while todo:
            parent = todo.pop()
            for run in self.runs.values():
                if run not in found and run not in runs and run.comes_from(parent):
                    found.append(run)
                    todo.append(run)
        return sorted(found, key=lambda run: run.id)

    def find_rows(self, kind: Kind, value: str) -> dict[str, pa.Table]:
        """By dataset version, the rows meant: id, split (or SET_ASIDE), source, meta."""
        found = {}
        for dataset in self.datasets.values():
            terms, tables = self.terms(dataset), []
            for split, table in _everything(dataset):
                if kind == "source":
                    named = table["source"].to_pylist()
                    meant = {s for s in set(named) if self._names(dataset, s, value)}
                    chosen = table.filter(pa.array([s in meant for s in named], pa.bool_()))
                else:
                    chosen = table.filter(_meant(table, kind, value, terms))
                tables.append(_in_split(chosen, split))
            joined = pa.concat_tables(tables)
            if len(joined):
                found[dataset.name] = joined
        return found

    def _names(self, dataset: Dataset, source: str, value: str) -> bool:
        """Whether a source of a version is the one of that name, in a mixture DATASET/SOURCE of a
        part, which may be a mixture itself; of a part that is gone, whatever ends with the name.
        """
        if source == value:
            return True
        for name in dataset.parents():
            part, _, rest = source.partition("/")
            if part == name.split("@")[0]:
                parent = self.datasets.get(name)
                return (
                    self._names(parent, rest, value)
                    if parent
                    else f"/{source}".endswith(f"/{value}")
                )
        return False

    def reached(self, found: dict[str, pa.Table]) -> dict[str, pa.Table]:
        """These rows and all that holds what they hold, to a fixed point: the same ids in any
        version, what a teacher made from one of them, and in versions made from theirs the rows of
        their keys. (A mixture holds rows of its parts by their ids.)
        """
        before = -1
        while (rows := sum(map(len, found.values()))) > before:
            before, ids = rows, pa.array(ids_of(found), pa.string())
            keys: dict[str, set[str]] = {}
            for name, table in found.items():
                for derived in self.made_from(self.datasets[name]):
                    if not derived.manifest.get("mixture"):
                        keys.setdefault(derived.name, set()).update(_keys_in(table))
            found = {}
            for name, dataset in self.datasets.items():
                tables = [
                    _in_split(table.filter(_holds(table, ids, keys.get(name, set()))), split)
                    for split, table in _everything(dataset)
                ]
                if len(joined := pa.concat_tables(tables)):
                    found[name] = joined
        return found


def _everything(dataset: Dataset) -> Iterator[tuple[str, pa.Table]]:
    """Id, source and meta of every row whose text the version holds."""
    yield from dataset.rows(["id", "source", "meta"])
    yield SET_ASIDE, dataset.quarantined()


def ids_of(found: dict[str, pa.Table]) -> list[str]:
    """The ids of rows by version, each once."""
    return sorted({i for table in found.values() for i in table["id"].to_pylist()})


def _keys_in(table: pa.Table) -> set[str]:
    """The split keys of rows, as their meta holds them."""
    return {json.loads(meta)["key"] for meta in table["meta"].drop_null().to_pylist()}


def _holds(table: pa.Table, ids: pa.Array, keys: set[str]) -> pa.Array:
    """(N,) bool: rows of these ids, made by a teacher from one of them, or of these keys."""
    same = pc.is_in(table["id"], ids)
    same = pc.or_(same, pc.is_in(pc.struct_field(pc.extract_regex(table["meta"], SEED), 0), ids))
    if not keys:
        return same
    keyed = [m is not None and json.loads(m)["key"] in keys for m in table["meta"].to_pylist()]
    return pc.or_(same, pa.array(keyed, pa.bool_()))


def _in_split(table: pa.Table, split: str) -> pa.Table:
    return table.append_column("split", pa.array([split] * len(table), pa.string()))


def _meant(table: pa.Table, kind: Kind, value: str, terms: dict[str, dict[str, Any]]) -> Any:
    """(N,) bool: the rows a selector means; consent= means those whose consent ended before."""
    if kind == "row":
        return pc.starts_with(table["id"], value)
    if kind == "subject":
        return pc.match_substring(table["meta"], f'"subject":"{subject_hash(value)}"')
    if kind == "consent":
        names = [s for s, said in terms.items() if (said["consent_until"] or value) < value]
    else:
        names = [source for source, said in terms.items() if said["licence"] == value]
    return pc.is_in(table["source"], pa.array(names, pa.string()))


def subject_hash(subject: str) -> str:
    """How a row's meta names its subject: 64 bits of sha256, as data.prepare writes them."""
    return hashlib.sha256(subject.encode("utf-8")).hexdigest()[:16]


def _parquet(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _contract(folder: Path) -> dict[str, Any]:
    """What an export says of itself; {} where a folder says nothing."""
    path = folder / CONTRACT
    return _json(path) if path.is_file() else {}


def _manifest(path: Path) -> dict[str, Any]:
    """What a dataset says of itself; without all of it no row could be followed."""
    manifest = _json(path)
    if missing := [key for key in ("name", "id", "splits", "created_from") if key not in manifest]:
        raise DataError(f"{path}: not a dataset manifest (no {missing[0]!r}); ingest again")
    return manifest


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from None
