"""No row of an evaluation set gets into training: itself, its question, a part, a near copy."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.data.dirty import chat
from tuneloom.config import build
from tuneloom.data.ingest import ingest
from tuneloom.data.recipe import IngestConfig
from tuneloom.errors import DataError

RNG = random.Random(4)
WORDS = [f"w{i}" for i in range(5000)]


def words(count: int) -> str:
    return " ".join(RNG.choices(WORDS, k=count))


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


BOILERPLATE = (
    "You are a helpful assistant of Example Ltd and answer every question in one short line please"
)
EXAM = [chat(f"{BOILERPLATE} {words(30)}", words(30)) for _ in range(200)]


def text_of(row: dict[str, Any], turn: int) -> str:
    return str(row["messages"][turn]["content"])


def near(row: dict[str, Any]) -> dict[str, Any]:
    """The question and answer with a word changed every 12, so that no run of 13 is shared."""
    changed = [
        " ".join("x" if i % 12 == 5 else w for i, w in enumerate(text_of(row, t).split()))
        for t in (0, 1)
    ]
    return chat(*changed)


CLEAN = [chat(f"{BOILERPLATE} {words(30)}", words(30)) for _ in range(300)]
LEAKS = {
    "exam:record": EXAM[:7],
    "exam:question": [chat(text_of(row, 0), words(12)) for row in EXAM[10:15]],
    "exam:words": [chat(f"As I read: {text_of(row, 1)}", words(9)) for row in EXAM[20:23]],
    "exam:near": [near(row) for row in EXAM[30:32]],
}


def run(tmp_path: Path, rows: list[dict[str, Any]], **against: Any) -> dict[str, Any]:
    sets = [{"name": "exam", "path": jsonl(tmp_path / "exam.jsonl", EXAM)}]
    data = {"name": "d", "against": {"sets": sets} | against, "near": {"threshold": 0.3}}
    mapping = {
        "data": data,
        "source": jsonl(tmp_path / "raw.jsonl", rows),
        "root": str(tmp_path / "ds"),
    }
    folder = ingest(build(IngestConfig, mapping))
    manifest = dict(json.loads((folder / "manifest.json").read_text()))
    assert "Compared with exam" in (folder / "report.html").read_text()
    aside = pq.read_table(folder / "set_aside.parquet").to_pylist()
    assert len([row for row in aside if row["reason"].startswith("leak_")]) == sum(
        n for why, n in manifest["counts"]["quarantined"].items() if why.startswith("leak_")
    )
    return manifest


def test_each_kind_of_leak_is_found_and_boilerplate_is_not(tmp_path: Path) -> None:
    rows = CLEAN + [row for group in LEAKS.values() for row in group]
    manifest = run(tmp_path, rows)
    assert manifest["leaks"] == {name: len(group) for name, group in sorted(LEAKS.items())}
    assert manifest["counts"]["quarantined"] == {f"leak_{n}": len(g) for n, g in LEAKS.items()}
    assert manifest["counts"]["kept"] == len(CLEAN)


def test_leaks_are_only_listed_when_that_is_asked_for(tmp_path: Path) -> None:
    manifest = run(tmp_path, CLEAN + LEAKS["exam:record"], action="list")
    assert manifest["leaks"] == {"exam:record": 7}
    assert manifest["counts"]["kept"] == len(CLEAN) + 7


def test_leaks_end_the_ingest_when_that_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="7 rows are known to an evaluation set") as caught:
        run(tmp_path, CLEAN + LEAKS["exam:record"], action="fail")
    assert caught.value.exit_code == 3


def test_clean_rows_are_said_to_be_clean(tmp_path: Path) -> None:
    assert run(tmp_path, CLEAN)["leaks"] == {}


def counts(
    tmp_path: Path, exam: list[dict[str, Any]], rows: list[dict[str, Any]], **data: Any
) -> dict[str, Any]:
    """What becomes of rows that are held against an exam."""
    sets = [{"name": "exam", "path": jsonl(tmp_path / "exam.jsonl", exam)}]
    mapping = {
        "data": {"name": "d", "against": {"sets": sets}} | data,
        "source": jsonl(tmp_path / "raw.jsonl", rows),
        "root": str(tmp_path / "ds"),
    }
    folder = ingest(build(IngestConfig, mapping))
    return dict(json.loads((folder / "manifest.json").read_text())["counts"])


def test_rows_that_share_a_system_prompt_with_a_test_are_no_leaks_of_it(tmp_path: Path) -> None:
    system = {"role": "system", "content": words(120)}
    chats = [{"messages": [system, *chat(words(30), words(30))["messages"]]} for _ in range(42)]
    found = counts(tmp_path, chats[:2], chats[1:], near={"action": "drop"})
    assert found["quarantined"] == {"leak_exam:record": 1}
    assert found["kept"] == 40 and found["deduplicated"] == {}


@pytest.mark.parametrize("place", ["reasoning_content", "tool_calls"])
def test_what_is_thought_or_called_is_compared_too(tmp_path: Path, place: str) -> None:
    secret, row = words(40), chat(words(9), words(9))
    call = {"function": {"name": "note", "arguments": {"text": secret}}}
    row["messages"][1][place] = secret if place == "reasoning_content" else [call]
    found = counts(tmp_path, [chat(f"sum up: {secret}", words(9))], [row, chat("a", "b")])
    assert found["quarantined"] == {"leak_exam:words": 1}


def test_a_chat_of_an_evaluation_set_that_has_no_answer_is_all_question(tmp_path: Path) -> None:
    asked = [{"messages": [{"role": "user", "content": "which city is in Japan?"}]}]
    rows = [chat("which city is in Japan?", "Kyoto"), chat("a", "b")]
    assert counts(tmp_path, asked, rows)["quarantined"] == {"leak_exam:question": 1}
