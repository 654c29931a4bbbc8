"""One dirty export through the command line: every planted count is met exactly, every time."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from tests.data.dirty_corpus import (
    BROKEN,
    CLUSTERS,
    CONTROL_TOKENS,
    EXPECTED,
    FOUND_IN,
    HOSTILE,
    LANGUAGES,
    PERSONAL,
    RECIPE,
    SECRETS,
    chat,
    plant,
)
from tuneloom.cli import main
from tuneloom.config import build
from tuneloom.data.ingest import ingest
from tuneloom.data.recipe import IngestConfig

SPLITS = ("train", "validation", "test")


def arguments(raw: Path, root: Path, *more: str) -> list[str]:
    """The one call of a data owner."""
    recipes = raw.parent / "mine" / "data"
    recipes.mkdir(parents=True, exist_ok=True)
    golden = {"sets": [{"name": "golden", "path": str(raw.parent / "golden.jsonl")}]}
    (recipes / "support.yaml").write_text(yaml.safe_dump(RECIPE | {"against": golden}))
    return ["ingest", f"--config-dir={recipes.parent}", "data=support", f"root={root}", *more]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(tmp_path_factory.mktemp("dirty"))


@pytest.fixture(scope="module")
def made(raw: Path) -> Path:
    root = raw.parent / "datasets"
    assert main(arguments(raw, root, f"source={raw}")) == 0
    return (root / "support").resolve()


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


def kept(folder: Path) -> list[dict[str, Any]]:
    return [
        row | {"split": split}
        for split in SPLITS
        for row in pq.read_table(folder / f"{split}-00000.parquet").to_pylist()
    ]


def question(row: dict[str, Any]) -> str:
    content = json.loads(row["record"])
    return str(content["messages"][0]["content"] if "messages" in content else content["prompt"])


def test_every_count_is_the_one_that_was_planted(made: Path) -> None:
    said = manifest(made)
    assert {key: said[key] for key in EXPECTED} == EXPECTED


def test_rows_in_are_rows_kept_rejected_deduplicated_and_quarantined(made: Path) -> None:
    counts = manifest(made)["counts"]
    fates = ("rejected", "deduplicated", "quarantined")
    assert counts["in"] == counts["kept"] + sum(sum(counts[fate].values()) for fate in fates)
    assert counts["kept"] == len(kept(made)) == len({row["id"] for row in kept(made)})
    rejects = (made / "rejected.jsonl").read_text().splitlines()
    aside = pq.read_table(made / "set_aside.parquet")
    dropped = counts["quarantined"]["privacy_us_ssn"]  # of these nothing may be written
    assert counts["in"] == counts["kept"] + len(rejects) + len(aside) + dropped


def test_each_broken_row_is_named_by_line_and_reason_with_its_start(made: Path) -> None:
    rejects = [json.loads(line) for line in (made / "rejected.jsonl").read_text().splitlines()]
    said = [(r["line"], r["reason"]) for r in rejects if r["source"] == "broken.jsonl"]
    assert said == [(line, reason) for line, (reason, _) in enumerate(BROKEN, 1)]
    assert [r["line"] for r in rejects if r["source"] == "shop.csv"] == [101, 102]
    assert max(len(r["start"]) for r in rejects) == 200


def test_personal_data_is_found_by_type_in_every_language(made: Path) -> None:
    found: Counter[tuple[str, str]] = Counter()
    starts = {sentence[:11]: language for language, sentence in LANGUAGES.items()}
    for row in kept(made):
        for note in json.loads(row["meta"]).get("pii", []):
            if note["entity"] != "secret":
                assert question(row)[note["start"] : note["end"]] == f"<{note['entity'].upper()}>"
                found[note["entity"], starts[question(row)[:11]]] += 1
    assert found == FOUND_IN


def test_nothing_that_was_to_go_is_left_in_any_file(made: Path) -> None:
    for path in made.iterdir():
        text = path.read_text("utf-8") if path.suffix != ".parquet" else json.dumps(
            pq.read_table(path).to_pylist(), ensure_ascii=False
        )  # fmt: skip
        assert not [(path.name, v) for v in [*PERSONAL.values(), *SECRETS] if v in text]
        assert not [(path.name, c) for c in "\u202e\u2066\x07\x1b\ufdd0\u200bÃ" if c in text]


def test_control_tokens_in_a_text_are_kept_as_the_text_they_are(made: Path) -> None:
    said = {question(row).split("\n")[0] for row in kept(made)}
    assert said.issuperset(f"Say {token}" for token in CONTROL_TOKENS)


def test_each_near_duplicate_names_the_row_of_its_cluster_that_was_kept(made: Path) -> None:
    aside = pq.read_table(made / "set_aside.parquet").to_pylist()
    leaders = Counter(row["kept"] for row in aside if row["reason"] == "near")
    assert sorted(leaders.values()) == [size - 1 for size in CLUSTERS]
    assert leaders.keys() < {row["id"] for row in kept(made)}


def test_no_question_is_on_two_sides_of_the_split(made: Path) -> None:
    sides: dict[str, set[str]] = {}
    for row in kept(made):
        sides.setdefault(question(row), set()).add(row["split"])
    assert all(len(side) == 1 for side in sides.values())
    assert set.union(*sides.values()) == set(SPLITS)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "timing.json"}


@pytest.mark.parametrize("workers", [2, 4])
def test_the_same_bytes_by_more_workers_from_another_place_in_another_order(
    made: Path, raw: Path, tmp_path: Path, workers: int
) -> None:
    elsewhere = Path(shutil.copytree(raw.parent, tmp_path / "deeper", symlinks=True)) / "raw"
    files = sorted((str(p) for p in elsewhere.rglob("*") if p.is_file()), reverse=True)
    more = [f"source=[{','.join(files)}]", f"workers={workers}"]
    assert main(arguments(elsewhere, tmp_path / "sets", *more)) == 0
    again = (tmp_path / "sets" / "support").resolve()
    assert again.name == made.name and tree(again) == tree(made)


def test_the_same_bytes_in_another_time_zone_and_locale(
    made: Path, raw: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tuneloom", *arguments(raw, tmp_path, f"source={raw}")]
    elsewhere = {"TZ": "Asia/Kathmandu", "LC_ALL": "C", "PYTHONHASHSEED": "7", "PYTHONUTF8": "0"}
    done = subprocess.run(command, env=os.environ | elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = (tmp_path / "support").resolve()
    assert again.name == made.name and tree(again) == tree(made)


@pytest.mark.parametrize("name", HOSTILE)
def test_one_hostile_file_among_the_others_stops_the_ingest_and_leaves_nothing(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    data, sentence = HOSTILE[name]
    here = Path(shutil.copytree(raw, tmp_path / "in" / "raw"))
    shutil.copy(raw.parent / "golden.jsonl", tmp_path / "in")
    (here / f"zz-{name}").write_bytes(data())
    assert main(arguments(here, tmp_path / "sets", f"source={here}")) == 3
    said = capsys.readouterr().err
    assert f"zz-{name}" in said and sentence in said and "Traceback" not in said
    assert list((tmp_path / "sets").iterdir()) == []
    assert not (tmp_path / "a.jsonl").exists()


def test_the_report_shows_every_count_and_runs_no_script(made: Path) -> None:
    page = (made / "report.html").read_text(encoding="utf-8")
    counts = EXPECTED["counts"]
    rejected = sum(counts["rejected"].values())
    crm = next(s for s in manifest(made)["created_from"] if s["name"] == "crm.jsonl")
    for text in (
        f"support@{manifest(made)['id']}",
        "deduplicated: near",
        "Example Ltd",
        "CC-BY-SA-4.0",
        "No source stands in the way",
        f"crm.jsonl ({crm['kept']:,} rows): consent ends on 2027-01-01 (as of 2026-06-01).",
        f"{rejected} rows ({rejected / counts['in']:.2%}) were no records",
        f"{counts['kept']:,}",
        '<td>us_ssn</td><td class="n">36</td><td>drop: these rows are left out</td>',
        "10 rows answer a question that another row answers differently; they are set aside.",
    ):
        assert text in page
    assert "<script" not in page and "src=" not in page and "url(" not in page


def test_hostile_rows_are_text_in_the_report(tmp_path: Path) -> None:
    (tmp_path / "raw.jsonl").write_text(
        chat("<script>alert(1)</script>", "<img src=x onerror=alert(2)>")
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
