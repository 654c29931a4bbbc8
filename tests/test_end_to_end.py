"""The main job through its commands, on the shipped data and base: records to a scored adapter."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tuneloom.data.rows import open_rows

ROOT = Path(__file__).parent.parent
Command = Callable[..., str]


@pytest.fixture(scope="module")
def tuneloom() -> Command:
    def call(*arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "tuneloom", *arguments], capture_output=True, text=True,
            cwd=ROOT,
            timeout=400, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == code, f"{arguments}: exit {done.returncode}\n{done.stderr}"
        return done.stdout + done.stderr

    return call


@pytest.fixture(scope="module")
def job(tuneloom: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/e2e after ingest and 120 steps of two Ray workers."""
    folder = tmp_path_factory.mktemp("job")
    tuneloom("ingest", "data=debian", f"root={folder}/datasets")
    tuneloom(
        "train", "experiment=demo",
        f"data.path={folder}/datasets/debian", f"run.root={folder}/runs",
        "run.id=e2e", "steps=120", "train.validation_rows=64",
    )  # fmt: skip
    return folder / "runs" / "e2e"


def test_the_tuned_model_is_better_than_its_base_on_rows_neither_saw(
    tuneloom: Command, job: Path
) -> None:
    tuneloom("evaluate", f"run={job}", "limit=160", "gate=true")
    found = json.loads((job / "evals" / "debian-test.json").read_text())
    assert found["n"] == 160
    assert found["base"]["label_accuracy"]["value"] < 0.05
    assert found["tuned"]["label_accuracy"]["value"] > 0.4


def test_the_exported_adapter_answers_in_a_fresh_process(tuneloom: Command, job: Path) -> None:
    tuneloom("export", f"run={job}")
    contract = json.loads((job / "export" / "adapter" / "contract.json").read_text())
    assert contract["golden"] and contract["base"]["digest"]
    said = tuneloom(
        "generate", "model.path=examples/tiny-base", f"adapter={job}/export/adapter",
        "prompt=Package: libmath-calc-perl\nDescription: Perl module to calculate\nWhich section?",
    )  # fmt: skip
    assert "perl" in said.lower()


def test_an_adapter_on_another_base_is_refused(tuneloom: Command, job: Path, lab: Path) -> None:
    said = tuneloom(
        "generate", f"model.path={lab}/base", f"adapter={job}/export/adapter", "prompt=x", code=4
    )
    assert "digest" in said


def test_the_report_is_one_page_that_names_the_figures(tuneloom: Command, job: Path) -> None:
    tuneloom("report", f"run={job}")
    page = (job / "report.html").read_text()
    assert "debian" in page and not re.search(r'(src|href)="https?://', page)


def test_nothing_held_out_was_in_the_text_the_base_was_made_of(
    tuneloom: Command, tmp_path: Path
) -> None:
    tuneloom("ingest", "data=debian", f"root={tmp_path}")
    tuneloom(
        "ingest", "data=debian_text", f"root={tmp_path}", f"data.within.dataset={tmp_path}/debian"
    )

    def packages(name: str, split: str) -> set[str]:
        rows = open_rows(tmp_path / name, split)
        texts = (json.dumps(rows[i].content) for i in range(len(rows)))
        return {re.search(r"Package: ([^\\]+)", text).group(1) for text in texts}  # type: ignore[union-attr]

    seen = packages("debian_text", "train") | packages("debian_text", "validation")
    assert len(seen) == 6800
    assert not seen & (packages("debian", "test") | packages("debian", "validation"))
