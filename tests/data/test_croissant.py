"""croissant.json is read by MLCommons' own library, which finds the records in it."""

import json
from pathlib import Path

import pytest

from tuneloom.config import build
from tuneloom.data.ingest import ingest
from tuneloom.data.recipe import IngestConfig
from tuneloom.data.rows import open_rows


def test_mlcroissant_validates_it_and_reads_the_records(tmp_path: Path) -> None:
    mlcroissant = pytest.importorskip("mlcroissant")
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(40)]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    provenance = [{"match": "*", "licence": "CC-BY-4.0"}]
    mapping = {
        "data": {"name": "d", "provenance": provenance},
        "source": str(tmp_path / "raw.jsonl"),
    }
    folder = ingest(build(IngestConfig, mapping | {"root": str(tmp_path / "ds")}))
    dataset = mlcroissant.Dataset(jsonld=str(folder / "croissant.json"))
    assert not dataset.metadata.ctx.issues.errors
    assert dataset.metadata.license == ["CC-BY-4.0"]
    read = [row["train-00000/id"].decode() for row in dataset.records("train-00000")]
    opened = open_rows(folder)
    assert sorted(read) == sorted(opened[i].id for i in range(len(opened)))
