"""One ingest of a dirty export, as typed: each count is known in advance and met exactly."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.data import dirty
from tests.data.dirty import chat
from tuneloom import cli
from tuneloom.config import build
from tuneloom.data.ingest import ingest
from tuneloom.data.recipe import IngestConfig


def words(*more: str) -> list[str]:
    return ["ingest", "--config-dir", "recipes", "data=dirty", *more]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dirty")
    dirty.write(folder)
    return folder


@pytest.fixture(scope="module")
def made(export: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(export)
        assert cli.main(words("source=raw", "workers=1")) == 0
    return export / "datasets" / "support"


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


def tree(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "timing.json"}


def test_every_count_is_the_one_that_was_planted(made: Path) -> None:
    said = manifest(made)
    assert said["counts"] == dirty.COUNTS
    assert said["found"] == dirty.FOUND
    assert said["sanitised"] == dict.fromkeys(dirty.SANITISED, 2)
    counts = said["counts"]
    fates = (counts["rejected"], counts["deduplicated"], counts["quarantined"])
    assert counts["in"] == counts["kept"] + sum(sum(fate.values()) for fate in fates)


def test_every_reject_has_its_line_and_every_copy_the_row_that_was_kept(
    made: Path, export: Path
) -> None:
    lines = (export / "raw" / "crm.jsonl").read_bytes().split(b"\n")
    rejected = [json.loads(line) for line in (made / "rejected.jsonl").open()]
    assert {(r["source"], r["reason"], lines[r["line"] - 1]) for r in rejected} == {
        ("crm.jsonl", reason, line) for reason, line in dirty.SHAPES
    }
    aside = pq.read_table(made / "set_aside.parquet").to_pylist()
    copies = [row for row in aside if row["reason"] == "exact"]
    assert {row["source"] for row in copies} == {"forum.jsonl.gz"}, "crm is the more trusted"
    ids = {row["id"] for split in ("train", "validation", "test")
           for row in pq.read_table(made / f"{split}-00000.parquet").to_pylist()}  # fmt: skip
    near = [row for row in aside if row["reason"] == "near"]
    assert len({row["kept"] for row in near}) == dirty.CLUSTERS
    assert {row["kept"] for row in near} <= ids and len(ids) == dirty.COUNTS["kept"]


@pytest.mark.parametrize(
    ("workers", "order", "more"),
    [
        (2, ["forum.jsonl.gz", "more.zip", "crm.jsonl"], {"TZ": "Asia/Kathmandu", "LC_ALL": "C"}),
        (4, ["more.zip", "crm.jsonl", "forum.jsonl.gz"], {"PYTHONHASHSEED": "7", "LANG": "tr_TR"}),
    ],
)
def test_the_same_bytes_whatever_the_workers_the_order_the_time_zone_and_the_locale(
    made: Path, export: Path, workers: int, order: list[str], more: dict[str, str]
) -> None:
    source = ",".join(f"raw/{name}" for name in order)
    typed = words(f"source=[{source}]", f"workers={workers}", f"root=again{workers}")
    done = subprocess.run(
        [sys.executable, "-m", "tuneloom", *typed], cwd=export, env=os.environ | more,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    again = export / f"again{workers}" / "support"
    assert again.resolve().name == made.resolve().name
    assert tree(again) == tree(made)


def test_a_bomb_among_the_files_stops_the_ingest_and_leaves_nothing(
    export: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(export / "raw", tmp_path / "raw")
    shutil.copytree(export / "recipes", tmp_path / "recipes")
    shutil.copy(export / "exam.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    bomb = tmp_path / "raw" / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", bytes(1 << 26))
    assert cli.main(words("source=raw")) == 3
    assert "bomb.zip" in capsys.readouterr().err
    bomb.unlink()
    (tmp_path / "raw" / "bomb.jsonl.gz").write_bytes(gzip.compress(bytes(1 << 28)))
    assert cli.main(words("source=raw")) == 3
    assert "bomb.jsonl.gz" in capsys.readouterr().err
    assert not list((tmp_path / "datasets").iterdir())


def test_nothing_that_was_to_go_is_left_in_any_file(made: Path) -> None:
    values = [value.encode() for value in (*dirty.PERSONAL.values(), *dirty.SECRETS)]
    values += [b"23456789", b"4111 1111", b"111222333", b"44051401359", b"\xe2\x80\xae"]
    for path in made.iterdir():
        texts = [path.read_bytes()]
        if path.suffix == ".parquet":
            texts = [
                json.dumps(row, ensure_ascii=False).encode()
                for row in pq.read_table(path).to_pylist()
            ]
        assert not [(path.name, v) for v in values for text in texts if v in text]


def test_no_question_and_no_text_is_on_two_sides_of_the_split(made: Path) -> None:
    sides: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        for row in pq.read_table(made / f"{split}-00000.parquet").to_pylist():
            record = json.loads(row["record"])
            question = record["prompt"] if "prompt" in record else record["messages"][0]["content"]
            sides.setdefault(question, set()).add(split)
    assert all(len(side) == 1 for side in sides.values())


def test_the_report_shows_every_count_and_runs_no_script(made: Path) -> None:
    page = (made / "report.html").read_text(encoding="utf-8")
    assert f"support@{manifest(made)['id']}" in page
    for text in (
        "deduplicated: near",
        "Example Ltd",
        "CC-BY-SA-4.0",
        "No source stands in the way",
        "crm.jsonl (569 rows): consent ends on 2027-01-01 (as of 2026-06-01).",
        f"17 rows ({17 / dirty.COUNTS['in']:.2%}) were no records; the recipe allows 2.00%.",
        "Compared with exam",
        f"{dirty.COUNTS['kept']:,}",
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
