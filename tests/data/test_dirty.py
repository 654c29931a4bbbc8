"""One dirty export in which every fault was planted: each count is known and met exactly."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.data import dirty
from tests.data.dirty import chat
from tuneloom.config import build
from tuneloom.data.ingest import ingest
from tuneloom.data.recipe import IngestConfig

SPLITS = ("train", "validation", "test")
RECIPE = """
name: support
near: {action: drop}
conflicts: quarantine
max_rejected: 0.05
max_row_bytes: %d
privacy: {actions: {%s: drop}}
against: {sets: [{name: exam, path: %s}]}
provenance:
  - {match: crm*, owner: Example Ltd, licence: LicenseRef-contract, commercial: true,
     consent: contract, consent_until: 2027-01-01, trust: 90}
  - {match: '*', owner: The forum's users, licence: CC-BY-SA-4.0, consent: public, trust: 30}
as_of: 2026-06-01
"""


def cli(tmp: Path, source: str, root: str, *more: str, **environment: str) -> Path:
    """`tuneloom ingest` as its own process; returns the dataset's folder."""
    done = subprocess.run(
        [sys.executable, "-m", "tuneloom", "ingest", "--config-dir", str(tmp / "mine"),
         "data=support", f"source={source}", f"root={tmp / root}",
         f"max_refused_files={len(dirty.HOSTILE)}", *more],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return (tmp / root / "support").resolve()


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("dirty")
    dirty.plant(tmp / "raw")
    (tmp / "mine" / "data").mkdir(parents=True)
    recipe = RECIPE % (dirty.MAX_ROW, dirty.DROPPED, tmp / "exam.jsonl")
    (tmp / "mine" / "data" / "support.yaml").write_text(recipe)
    return tmp


@pytest.fixture(scope="module")
def made(planted: Path) -> Path:
    return cli(planted, f"{planted}/raw", "one")


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


def kept(folder: Path) -> list[dict[str, Any]]:
    rows = [row for s in SPLITS for row in pq.read_table(folder / f"{s}-00000.parquet").to_pylist()]
    return [
        row | {"record": json.loads(row["record"]), "meta": json.loads(row["meta"])} for row in rows
    ]


def test_every_count_is_the_one_that_was_planted(made: Path) -> None:
    said = manifest(made)
    assert said["counts"] == dirty.COUNTS
    assert said["found"] == dirty.FOUND
    assert said["sanitised"] == dirty.SANITISED
    assert said["leaks"] == dirty.LEAKS
    assert said["label_conflicts"] == 2 * dirty.CONFLICTS
    assert sum(part["rows"] for part in said["splits"].values()) == len(kept(made))


def test_each_type_is_redacted_in_each_language(made: Path) -> None:
    redacted = Counter(
        (finding["entity"], row["record"]["messages"][1]["content"][:2])
        for row in kept(made)
        for finding in row["meta"].get("pii", [])
        if finding["entity"] != "secret"
    )
    wanted = set(dirty.PERSONAL) - {dirty.DROPPED}
    assert redacted == {(entity, language): 1 for entity in wanted for language in dirty.LANGUAGES}


def test_each_hostile_file_is_named_and_gives_no_row(made: Path) -> None:
    refused = {entry["name"]: entry["why"] for entry in manifest(made)["refused_files"]}
    assert sorted(refused) == sorted(dirty.HOSTILE)
    for name, (why, _) in dirty.HOSTILE.items():
        assert refused[name].startswith(name) and re.search(why, refused[name])
    assert "nobody may take" not in json.dumps(kept(made))
    assert not Path("/tmp/evil.jsonl").exists()
    assert not list(made.parent.parent.rglob("evil*"))


def test_one_file_too_many_ends_the_ingest_and_lists_all_of_them(planted: Path) -> None:
    with pytest.raises(
        AssertionError, match="max_refused_files: 8 files could not be read, over 7"
    ) as caught:
        cli(planted, f"{planted}/raw", "over", "max_refused_files=7")
    assert all(name in str(caught.value) for name in dirty.HOSTILE)
    assert not list((planted / "over").iterdir())


def test_every_reject_and_every_row_set_aside_has_its_place(made: Path, planted: Path) -> None:
    rejected = [json.loads(x) for x in (made / "rejected.jsonl").read_text().splitlines()]
    assert Counter(r["reason"] for r in rejected) == dirty.REJECTED
    assert all(r["line"] >= 1 and len(r["start"]) <= 200 for r in rejected)
    crm = (planted / "raw" / "crm.jsonl").read_bytes().split(b"\n")
    named = {(r["reason"], crm[r["line"] - 1]) for r in rejected if r["source"] == "crm.jsonl"}
    assert named == set(dirty.SHAPES)
    aside = pq.read_table(made / "set_aside.parquet").to_pylist()
    fates = dirty.COUNTS["deduplicated"] | dirty.COUNTS["quarantined"]
    del fates[f"privacy_{dirty.DROPPED}"]  # leaves no trace but its count
    assert Counter(row["reason"] for row in aside) == fates
    ids = {row["id"] for row in kept(made)}
    assert all(row["kept"] in ids for row in aside if row["reason"] == "near")
    assert {row["source"] for row in aside if row["reason"] == "exact"} == {
        "forum/2025.jsonl.gz", "forum/2026.zip/a.jsonl", "forum/2026.zip/deep/b.jsonl"
    }, "the less trusted copy goes"  # fmt: skip


def test_control_tokens_stay_text(made: Path) -> None:
    text = json.dumps([row["record"] for row in kept(made)])
    assert all(f"What does {token} mean?" in text for token in dirty.TOKENS)


def test_nothing_that_was_to_go_is_left_in_any_file(made: Path) -> None:
    rng = random.Random(11)
    values = [*dirty.SECRETS, "@example.com", "203.0.113.", "+49 151"]
    shapes = {
        "card": r"\b4\d{15}\b", "iban": r"\bDE\d{20}\b", "us_ssn": r"\b\d{3}-\d\d-\d{4}\b",
        "uk_nino": r"\bAB\d{6}C\b", "fr_nir": r"\b2\d{4}75\d{8}\b", "es_dni": r"\b\d{8}[A-Z]\b",
        "it_cf": r"\b[A-Z]{6}\d\dA\d\dH\d{3}[A-Z]\b",
    }  # fmt: skip
    for entity, shape in shapes.items():
        assert re.search(shape, dirty.PERSONAL[entity](rng)), "the search would find one"
    for path in made.iterdir():
        text = path.read_bytes().decode("utf-8", "replace")
        if path.suffix == ".parquet":
            text = json.dumps(pq.read_table(path).to_pylist(), ensure_ascii=False)
        assert not [(path.name, value) for value in values if value in text]
        assert not [(path.name, e) for e, shape in shapes.items() if re.search(shape, text)]


def tree(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "timing.json"}


def test_the_same_bytes_whatever_the_workers_order_place_zone_and_locale(
    made: Path, planted: Path
) -> None:
    two = cli(planted, f"{planted}/raw", "two", "workers=2", TZ="Asia/Kathmandu", LC_ALL="C",
              PYTHONHASHSEED="7")  # fmt: skip
    there = shutil.copytree(planted / "raw", planted / "else where" / "raw")
    files = [str(p) for p in there.rglob("*") if p.is_file() and p.suffix != ".pdf"]
    listed = sorted((f for f in files if "hidden" not in f), reverse=True)
    source = "[" + ",".join(f"'{file}'" for file in listed) + "]"
    four = cli(planted, source, "four", "workers=4", TZ="America/St_Johns")
    assert made.name == two.name == four.name
    assert tree(made) == tree(two) == tree(four)


def test_the_same_bytes_on_ray_data_hostile_files_and_all(made: Path, planted: Path) -> None:
    there = cli(planted, f"{planted}/raw", "ray", "launch=ray", "workers=2")
    assert made.name == there.name
    assert tree(made) == tree(there)


def test_no_question_is_on_two_sides_of_the_split(made: Path) -> None:
    sides: dict[str, set[str]] = {}
    for split in SPLITS:
        for row in pq.read_table(made / f"{split}-00000.parquet").to_pylist():
            sides.setdefault(json.loads(row["meta"])["key"], set()).add(split)
    assert len(sides) > 500 and all(len(side) == 1 for side in sides.values())


def test_the_report_shows_every_count_and_runs_no_script(made: Path) -> None:
    page = (made / "report.html").read_text(encoding="utf-8")
    assert f"support@{manifest(made)['id']}" in page
    for text in (
        "deduplicated: near", "Example Ltd", "CC-BY-SA-4.0", "No source stands in the way",
        "consent ends on 2027-01-01 (as of 2026-06-01).",
        "8 files could not be read, and none of their rows is counted here.",
        f"{dirty.REJECTED.total()} rows (", "no records; the recipe allows 5.00%.",
        "climbs.zip: &#x27;../../etc/evil.jsonl&#x27; leads out of it", f"{dirty.COUNTS['kept']}",
    ):  # fmt: skip
        assert text in page
    assert "<script" not in page and "src=" not in page and "url(" not in page


def test_hostile_rows_are_text_in_the_report(tmp_path: Path) -> None:
    (tmp_path / "raw.jsonl").write_text(
        json.dumps(chat("<script>alert(1)</script>", "<img src=x onerror=alert(2)>"))
        + '\n{"<b>": "<script>"}\n'
    )
    mapping = {"data": {"name": "d", "max_rejected": 1.0}, "source": str(tmp_path / "raw.jsonl")}
    page = (
        ingest(build(IngestConfig, mapping | {"root": str(tmp_path / "ds")})) / "report.html"
    ).read_text()
    assert "<script" not in page and "<img" not in page and "<b>" not in page
    assert "&lt;script&gt;alert(1)" in page


@pytest.mark.browser
def test_the_report_renders_in_a_browser(made: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    shot = tmp_path / "report.png"
    subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--screenshot={shot}",
         "--window-size=1100,3200", f"file://{made}/report.html"],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert shot.stat().st_size > 50_000
