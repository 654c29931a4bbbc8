"""The points that a report begins with: each is said when it is so, and only then."""

import json
from pathlib import Path
from typing import Any

from tuneloom.config import build
from tuneloom.data.ingest import ingest
from tuneloom.data.recipe import IngestConfig
from tuneloom.data.signoff import open_points

OWNER = {"match": "*", "owner": "A", "licence": "CC0-1.0", "consent": "contract"}


def points(tmp_path: Path, **recipe: Any) -> str:
    rows = [{"prompt": f"question {i % 3}", "completion": f"answer {i}"} for i in range(6)]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mapping = {"data": {"name": "d", **recipe}, "source": str(tmp_path / "raw.jsonl"),
               "root": str(tmp_path / "out")}  # fmt: skip
    folder = ingest(build(IngestConfig, mapping))
    return "\n".join(open_points(json.loads((folder / "manifest.json").read_text())))


def test_what_nobody_said_of_a_source_is_open(tmp_path: Path) -> None:
    said = points(tmp_path)
    assert "raw.jsonl (6 rows): no owner, no licence, no consent is named." in said
    assert "Near-duplicates were not looked for" in said and "No golden or evaluation set" in said
    assert "6 rows that another row contradicts are kept" in said


def test_a_consent_that_ends_is_open_and_whether_it_was_checked(tmp_path: Path) -> None:
    ends = [OWNER | {"consent_until": "2027-01-01"}]
    assert "consent ends on 2027-01-01 (not checked" in points(tmp_path, provenance=ends)
    dated = points(tmp_path, provenance=ends, as_of="2026-01-01")
    assert "(6 rows): consent ends on 2027-01-01 (as of 2026-01-01)" in dated


def test_personal_data_that_is_kept_is_open(tmp_path: Path) -> None:
    kept = points(tmp_path, privacy={"actions": {"email": "keep", "card": "drop"}})
    assert "email is not looked for" in kept and "card" not in kept
    assert "Personal data without an action" in points(tmp_path, privacy={"default": "keep"})


def test_a_recipe_that_asks_for_everything_leaves_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "golden.jsonl").write_text('{"prompt": "another", "completion": "thing"}\n')
    against = {"sets": [{"name": "golden", "path": str(tmp_path / "golden.jsonl")}]}
    said = points(tmp_path, provenance=[OWNER], against=against, near={"action": "group"},
                  conflicts="list")  # fmt: skip
    assert said == "6 rows that another row contradicts are kept (data.conflicts=list)."
