"""Labels that were flipped on purpose in real rows are found, set aside and counted."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tuneloom.config import build
from tuneloom.data.ingest import ingest
from tuneloom.data.recipe import IngestConfig
from tuneloom.errors import DataError

DEBIAN = Path(__file__).parents[2] / "examples/debian/packages.jsonl"
SECTIONS = ["fonts", "haskell", "perl", "science"]


def planted(path: Path) -> dict[str, str]:
    """Eight hundred packages of four sections, one label in twenty flipped; the truth of those."""
    rows = [json.loads(line) for line in DEBIAN.read_text(encoding="utf-8").splitlines()]
    chosen: list[dict[str, Any]] = []
    for section in SECTIONS:
        chosen += [row for row in rows if row["section"] == section][:200]
    truth = {}
    rng = random.Random(3)
    for row in rng.sample(chosen, len(chosen) // 20):
        truth[row["package"]] = row["section"]
        row["section"] = rng.choice([s for s in SECTIONS if s != row["section"]])
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    return truth


def run(tmp_path: Path, **more: Any) -> Path:
    record = {"input": "{package}: {description}", "label": "{section}", "labels": SECTIONS}
    data = {"name": "sections", "record": record, "conflicts": "quarantine", **more}
    mapping = {"data": data, "source": str(tmp_path / "raw.jsonl"), "root": str(tmp_path / "out")}
    return ingest(build(IngestConfig, mapping))


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8")))


def test_flipped_labels_are_set_aside_with_what_their_words_say(tmp_path: Path) -> None:
    pytest.importorskip("cleanlab")
    truth = planted(tmp_path / "raw.jsonl")
    folder = run(tmp_path, label_issues={"action": "quarantine"})
    aside = pq.read_table(folder / "set_aside.parquet").to_pylist()
    doubted = [row for row in aside if row["reason"] == "label_issue"]
    right = 0
    for row in doubted:
        package = json.loads(row["record"])["input"].split(":")[0]
        right += f"likely {truth.get(package)} (" in row["note"]
    assert right / len(doubted) >= 0.9
    assert right / len(truth) >= 0.4  # 21 of 40 found, and nothing else suspected
    said = manifest(folder)
    assert said["label_issues"] == {"checked": 800, "suspected": len(doubted), "unchecked": 0}
    assert said["counts"]["quarantined"]["label_issue"] == len(doubted)
    assert said["counts"]["kept"] == 800 - len(doubted)
    assert f"{len(doubted)} of 800 look wrong" in (folder / "report.html").read_text()


def test_listing_counts_and_keeps_every_row(tmp_path: Path) -> None:
    pytest.importorskip("cleanlab")
    planted(tmp_path / "raw.jsonl")
    lines = (tmp_path / "raw.jsonl").read_text(encoding="utf-8").splitlines()
    rare = {"package": "odd", "description": "alone", "section": "science"}
    (tmp_path / "raw.jsonl").write_text("\n".join([*lines[::4], json.dumps(rare)]) + "\n")
    said = manifest(run(tmp_path, label_issues={"action": "list", "max_odds": 0.5}))
    assert said["label_issues"]["checked"] == said["counts"]["kept"] == 201
    assert said["label_issues"]["suspected"] > 0
    assert "label_issue" not in said["counts"]["quarantined"]


def test_rows_without_labels_cannot_be_doubted(tmp_path: Path) -> None:
    (tmp_path / "raw.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    with pytest.raises(DataError, match=r"0 labels have 5 rows or more.*set data\.label"):
        run(tmp_path, record=None, label_issues={"action": "list"})
