"""A golden row does not get into training: neither raw rows nor a dataset made without the set."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.dirty import chat
from tuneloom.config import build
from tuneloom.data.guard import refuse_golden
from tuneloom.data.ingest import ingest
from tuneloom.data.recipe import IngestConfig
from tuneloom.data.rows import open_rows
from tuneloom.errors import ConfigError, DataError
from tuneloom.testing import Gang, small_config

LONG = " ".join(f"word{i}" for i in range(60))
GOLDEN = [chat("which city is in Japan?", "Kyoto"), chat(f"sum up: {LONG}", "many words")]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "golden/g/golden.jsonl", GOLDEN)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (GOLDEN[0], "record"),
        (chat("which city is in Japan?", "Oslo"), "question"),
        (chat(f"please {LONG}", "other"), "words"),
    ],
)
def test_a_row_that_a_golden_set_knows_is_refused_by_place_and_kind(
    tmp_path: Path, golden: Path, row: dict[str, Any], kind: str
) -> None:
    rows = open_rows(jsonl(tmp_path / "rows.jsonl", [chat("q", "a"), row]))
    with pytest.raises(DataError, match=rf"1 of 2 training rows .*rows\.jsonl:2 \({kind}, "):
        refuse_golden(rows, [str(golden)])


def test_clean_rows_pass_and_the_sets_are_named(tmp_path: Path, golden: Path) -> None:
    rows = open_rows(jsonl(tmp_path / "rows.jsonl", [chat("q", "a")]))
    assert refuse_golden(rows, [str(golden)]) == [str(golden)]
    assert refuse_golden(rows, [f"{tmp_path}/golden/*/golden.jsonl"]) == [str(golden)]
    assert refuse_golden(rows, [f"{tmp_path}/*/none.jsonl"]) == []
    with pytest.raises(ConfigError, match=r"data\.golden: no file"):
        refuse_golden(rows, [str(tmp_path / "none.jsonl")])


def test_a_dataset_made_against_the_set_is_believed_and_one_made_without_it_is_read(
    tmp_path: Path, golden: Path
) -> None:
    source = jsonl(
        tmp_path / "raw.jsonl", [*(chat(f"q {i}", f"a {i}") for i in range(40)), *GOLDEN]
    )

    def made(name: str, against: dict[str, Any]) -> Path:
        config = {"source": str(source), "root": str(tmp_path / "sets"),
                  "data": {"name": name, "source": str(source), "against": against}}  # fmt: skip
        return Path(ingest(build(IngestConfig, config)))

    sets = [{"name": "g", "path": str(golden)}]
    kept = made("guarded", {"sets": sets})
    assert refuse_golden(open_rows(kept), [str(golden)]) == [str(golden)]
    listed = made("listed", {"sets": sets, "action": "list"})
    bare = made("bare", {})
    for dataset in (listed, bare):
        with pytest.raises(DataError, match="training rows are known to a golden set"):
            refuse_golden(open_rows(dataset), [str(golden)])


def test_a_run_on_a_golden_row_ends_before_its_first_step(
    lab: Path, tmp_path: Path, one: Gang
) -> None:
    first = json.loads((lab / "rows.jsonl").read_text().splitlines()[0])
    golden = jsonl(tmp_path / "golden.jsonl", [first])
    with pytest.raises(DataError, match=r"data\.golden: 1 of 48 training rows"):
        one.fit(small_config(lab, "on-golden", data__golden=[str(golden)]))
    assert not (lab / "runs/on-golden/metrics.jsonl").exists()
