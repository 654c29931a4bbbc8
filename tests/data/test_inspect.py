"""inspect: the mask and the cuts as a person and as a program see them, with no torch."""

import datetime
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuneloom.config import build, compose
from tuneloom.data.ingest import ingest
from tuneloom.data.inspect import CONFIG, main
from tuneloom.data.recipe import IngestConfig

Maker = Callable[..., Any]
HOSTILE = "\x1b]0;owned\x07\x1b[2Jhidden\rshown\x9b31m"


@pytest.fixture
def folder(tmp_path: Path, make_tokenizer: Maker) -> Path:
    make_tokenizer("chatml").save_pretrained(tmp_path / "tok")
    with (tmp_path / "rows.jsonl").open("w") as out:
        for i in range(10):
            messages = [
                {"role": "user", "content": f"question {i}"},
                {"role": "assistant", "content": "answer " * (1 + 9 * (i == 1))},
            ]
            out.write(json.dumps({"messages": messages}) + "\n")
    return tmp_path


def inspect(folder: Path, *overrides: str) -> int:
    paths = [f"data.path={folder / 'rows.jsonl'}", f"model.path={folder / 'tok'}"]
    return main(build(CONFIG, compose("inspect", [*paths, *overrides])))


def test_json_holds_masks_counts_cuts_and_the_template(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect(folder, "rows=2", "json=true", "batch.max_length=30") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["template"]["kind"] == "prefix"
    assert found["template"]["end_of_turn"] == "<|im_end|>"
    first, second = found["rows"]
    assert [s["text"] for s in first["segments"]] == [
        "<|im_start|>user\nquestion 0<|im_end|>\n<|im_start|>assistant\n",
        "answer <|im_end|>",
        "\n",
    ]
    assert [s["state"] for s in first["segments"]] == ["masked", "trained", "masked"]
    assert sum(s["tokens"] for s in first["segments"]) == first["tokens"]
    assert first["trained"] == first["segments"][1]["tokens"]
    assert second["dropped"] == "over_length" and second["cut"] == second["tokens"] > 30
    assert found["scan"]["over_length"] == 1 and found["scan"]["rows"] == 10
    assert 0 < found["scan"]["lost_targets"] < found["scan"]["targets"]


@pytest.mark.parametrize(
    ("days", "said"),
    [(-1, "10 of 10 rows ended on {day}; tuneloom erase"), (29, "10 of 10 rows ends on {day}"),
     (40, None)],
)  # fmt: skip
def test_consent_that_ends_within_a_month_or_has_ended_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], days: int, said: str | None
) -> None:
    day = datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(days=days)
    recipe = {"name": "d", "split": {"train": 1.0, "validation": 0.0, "test": 0.0},
              "provenance": [{"match": "*", "consent_until": str(day)}]}  # fmt: skip
    mapping = {"data": recipe, "source": str(folder / "rows.jsonl"), "root": str(folder / "sets")}
    made = ingest(build(IngestConfig, mapping))
    assert inspect(folder, f"data.path={made}") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("consent")]
    assert len(lines) == (said is not None) and (said or "").format(day=day) in "".join(lines)
    assert inspect(folder, f"data.path={made}", "json=true") == 0
    assert json.loads(capsys.readouterr().out)["consent"] == lines


def test_truncation_shows_where_it_cuts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(folder, "rows=2", "json=true", "batch.max_length=30", "batch.over_length=truncate")
    second = json.loads(capsys.readouterr().out)["rows"][1]
    assert [s["state"] for s in second["segments"]] == ["masked", "trained", "cut"]
    assert second["dropped"] == "" and second["tokens"] - second["cut"] == 30


def test_text_is_shown_under_pretrain(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "rows.jsonl").write_text('{"text": "hello world"}\n')
    assert inspect(folder, "objective=pretrain", "json=true") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["template"] == {
        "kind": "text",
        "name": None,
        "serves_what_it_trains": True,
        "end_of_turn": "<|im_end|>",
    }
    assert [s["state"] for s in found["rows"][0]["segments"]] == ["masked", "trained"]


def test_a_person_sees_trained_tokens_in_green(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert inspect(folder, "rows=1", "batch.max_length=30") == 0
    out = capsys.readouterr().out
    assert "\x1b[32manswer <|im_end|>\x1b[0m" in out
    assert "rows.jsonl:1" in out and "10.00% longer than 30 tokens" in out


def test_a_rows_control_characters_do_not_reach_the_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    turns = [{"role": "user", "content": "q\tq\nq"}, {"role": "assistant", "content": HOSTILE}]
    (folder / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    assert inspect(folder, "rows=1") == 0
    out = capsys.readouterr().out
    assert r"\x1b]0;owned\x07\x1b[2Jhidden\x0dshown\x9b31m<|im_end|>" in out and r"\x09" not in out
    assert not set("\x07\r\x9b") & set(out) and "\x1b]" not in out and "\x1b[2J" not in out
    assert inspect(folder, "rows=1", "json=true") == 0
    segments = json.loads(capsys.readouterr().out)["rows"][0]["segments"]
    assert HOSTILE in "".join(segment["text"] for segment in segments)


def test_the_command_runs_without_torch_and_ends_with_the_right_code(folder: Path) -> None:
    program = (
        "import sys; from tuneloom.cli import main; code = main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", program, "inspect", f"model.path={folder / 'tok'}"]
    good = subprocess.run([*command, f"data.path={folder / 'rows.jsonl'}", "rows=1"])
    assert good.returncode == 0
    missing = subprocess.run(
        [*command, f"data.path={folder / 'none.jsonl'}"], capture_output=True, text=True
    )
    assert missing.returncode == 3
    assert missing.stderr.count("\n") == 1 and "no such file or folder" in missing.stderr
    (folder / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "q"}]}\n')
    bad = subprocess.run(
        [*command, f"data.path={folder / 'bad.jsonl'}"], capture_output=True, text=True
    )
    assert bad.returncode == 3 and "bad.jsonl:1: no token to train on" in bad.stderr
