"""Golden rows: two people, no way to edit, never in training."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.dirty import chat
from tuneloom.config import build
from tuneloom.data.curate import Golden, Row
from tuneloom.data.ingest import ingest
from tuneloom.data.recipe import IngestConfig
from tuneloom.data.records import parse
from tuneloom.data.review import GoldenConfig, main
from tuneloom.data.review_page import text_of
from tuneloom.data.rows import open_rows
from tuneloom.errors import ConfigError, DataError, RefusedError


def golden(tmp_path: Path) -> Golden:
    folder = tmp_path / "golden" / "g"
    folder.mkdir(parents=True, exist_ok=True)
    return Golden(folder, reviewers=2)


def act(tmp_path: Path, action: str, **config: Any) -> None:
    assert (
        main(
            build(
                GoldenConfig,
                {"action": action, "name": "g", "root": str(tmp_path / "golden"), **config},
            )
        )
        == 0
    )


@pytest.fixture
def source(tmp_path: Path) -> str:
    rows = [chat(f"question {i} <b>bold</b>", f"answer {i}") for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "rows.jsonl")


def test_a_row_is_golden_after_two_others_approved_it(tmp_path: Path) -> None:
    record = parse(chat("q", "a"), source="s")
    store = golden(tmp_path)
    assert store.propose(record, "anna") is True
    assert store.propose(record, "bob") is False
    with pytest.raises(RefusedError, match="anna proposed"):
        store.decide(record.id, "approve", "anna")
    store.decide(record.id[:10], "approve", "bob")
    assert [row.record.id for row in store.of("reviewed")] == [record.id]
    with pytest.raises(RefusedError, match="another must"):
        store.decide(record.id, "approve", "bob")
    store.decide(record.id, "approve", "carla")
    store.write()
    assert [row.record.id for row in golden(tmp_path).of("golden")] == [record.id]
    with pytest.raises(RefusedError, match="is golden and cannot change"):
        golden(tmp_path).decide(record.id, "refuse", "dora")
    store.retire(record.id, "anna", "the price changed")
    store.write()
    assert golden(tmp_path).of("golden") == []
    assert golden(tmp_path).of("retired")[0].notes == ["anna: the price changed"]


def test_one_refusal_keeps_a_row_out(tmp_path: Path) -> None:
    record = parse(chat("q", "a"), source="s")
    store = golden(tmp_path)
    store.propose(record, "anna")
    store.decide(record.id, "approve", "bob")
    store.decide(record.id, "refuse", "carla", "wrong answer")
    assert store.of("golden") == [] and len(store.of("refused")) == 1


def test_an_edited_log_is_refused(tmp_path: Path) -> None:
    store = golden(tmp_path)
    for i in range(3):
        store.propose(parse(chat(f"q{i}", "a"), source="s"), "anna")
    store.write()
    whole = store.log.read_text()
    store.log.write_text(whole.replace('"q0"', '"qx"'))
    with pytest.raises(DataError, match=r"events\.jsonl:2: the log was edited"):
        golden(tmp_path)
    store.log.write_text("\n".join(whole.splitlines()[1:]) + "\n")
    with pytest.raises(DataError, match=r"events\.jsonl:1: the log was edited"):
        golden(tmp_path)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_line_separator_in_a_row_or_a_note_is_no_line_end(tmp_path: Path, separator: str) -> None:
    record, note = parse(chat(f"a{separator}b", "c"), source="s"), f"x{separator}y"
    store = golden(tmp_path)
    store.propose(record, "anna")
    store.write()
    decision = {"id": record.id, "decision": "approve", "by": "bob", "note": note}
    (tmp_path / "d.jsonl").write_text(json.dumps(decision, ensure_ascii=False), encoding="utf-8")
    act(tmp_path, "decide", decisions=str(tmp_path / "d.jsonl"))
    assert golden(tmp_path).rows[record.id].notes == [f"bob: {note}"]


def decisions(path: Path, ids: list[str], by: str) -> str:
    path.write_text(
        "".join(json.dumps({"id": i, "decision": "approve", "by": by}) + "\n" for i in ids)
    )
    return str(path)


def test_a_file_of_decisions_is_entered_whole_or_not_at_all(tmp_path: Path, source: str) -> None:
    act(tmp_path, "propose", source=source, by="anna")
    log = golden(tmp_path).log
    before, ids = log.read_text(), sorted(golden(tmp_path).rows)
    file = decisions(tmp_path / "d.jsonl", [*ids, "f" * 64], "bob")
    with pytest.raises(DataError, match="0 rows begin with"):
        act(tmp_path, "decide", decisions=file)
    assert log.read_text() == before


def test_decisions_on_rows_that_are_closed_are_skipped_and_counted(
    tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    act(tmp_path, "propose", source=source, by="anna")
    ids = sorted(golden(tmp_path).rows)
    act(tmp_path, "decide", id=ids[0], decision="refuse", by="bob")
    act(tmp_path, "decide", decisions=decisions(tmp_path / "d.jsonl", ids, "carla"))
    assert "skipped 1 decisions on rows that were golden, refused or retired" in (
        capsys.readouterr().out
    )
    approved = [row.approved_by for row in golden(tmp_path).rows.values()]
    assert sorted(approved) == [[], ["carla"], ["carla"]]


def test_a_set_without_a_golden_row_is_not_sealed(tmp_path: Path, source: str) -> None:
    act(tmp_path, "propose", source=source, by="anna")
    with pytest.raises(RefusedError, match="seal: no row of g is golden; a row needs 2 approvals"):
        act(tmp_path, "seal")
    assert not (tmp_path / "golden" / "g" / "golden.jsonl").exists()


def test_a_set_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    (tmp_path / "golden" / "g" / ".lock").mkdir(parents=True)
    with pytest.raises(RefusedError, match="g: cannot be written"):
        act(tmp_path, "status")
    assert not (tmp_path / "golden" / "g" / "events.jsonl").exists()


def test_reviewers_at_work_at_once_write_one_log(tmp_path: Path, source: str) -> None:
    act(tmp_path, "propose", source=source, by="anna")
    ids = sorted(golden(tmp_path).rows)
    people = [f"person{i}" for i in range(4)]
    for person in people:
        decisions(tmp_path / f"{person}.jsonl", ids, person)
    code = (
        "import sys; from tuneloom.config import build; from tuneloom.data.review import *\n"
        "main(build(GoldenConfig, {'action': 'decide', 'name': 'g', 'reviewers': 9,"
        " 'root': sys.argv[1], 'decisions': sys.argv[2]}))"
    )
    words = [str(tmp_path / "golden")]
    at_work = [
        subprocess.Popen([sys.executable, "-c", code, *words, str(tmp_path / f"{person}.jsonl")])
        for person in people
    ]
    assert [process.wait(timeout=120) for process in at_work] == [0] * 4
    rows = golden(tmp_path).rows.values()  # an event that follows none before it would raise
    assert [sorted(row.approved_by) for row in rows] == [people] * 3


def test_from_proposal_to_a_sealed_set_that_training_data_may_not_hold(
    tmp_path: Path, source: str
) -> None:
    act(tmp_path, "propose", source=source, by="anna")
    act(tmp_path, "queue")
    folder = tmp_path / "golden" / "g"
    ids = [json.loads(line)["id"] for line in (folder / "queue.jsonl").read_text().splitlines()]
    assert len(ids) == 3
    for person in ("bob", "carla"):
        act(tmp_path, "decide", decisions=decisions(tmp_path / "d.jsonl", ids[:2], person))
    act(tmp_path, "seal")
    sealed = open_rows(folder / "golden.jsonl")
    assert {sealed[i].id for i in range(len(sealed))} == set(ids[:2])

    against = {"sets": [{"name": "golden", "path": str(folder / "golden.jsonl")}]}
    mapping = {
        "data": {"name": "d", "against": against},
        "source": source,
        "root": str(tmp_path / "ds"),
    }
    made = ingest(build(IngestConfig, mapping))
    counts = json.loads((made / "manifest.json").read_text())["counts"]
    assert counts["kept"] == 1
    assert counts["quarantined"] == {"leak_golden:record": 2}


def test_decisions_of_label_studio_are_read(tmp_path: Path, source: str) -> None:
    act(tmp_path, "propose", source=source, by="anna")
    act(tmp_path, "queue")
    tasks = json.loads((tmp_path / "golden" / "g" / "labelstudio.json").read_text())
    for task in tasks:
        task["annotations"] = [
            {"completed_by": {"email": f"{who}@example.com"},
             "result": [{"type": "choices", "value": {"choices": ["approve"]}}]}
            for who in ("bob", "carla")
        ]  # fmt: skip
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    act(tmp_path, "decide", decisions=str(tmp_path / "export.json"))
    assert len(golden(tmp_path).of("golden")) == 3


def test_users_of_label_studio_known_by_a_number_need_a_name(tmp_path: Path, source: str) -> None:
    act(tmp_path, "propose", source=source, by="anna")
    ids = sorted(golden(tmp_path).rows)
    chosen = [{"type": "choices", "value": {"choices": ["approve"]}}]
    tasks = [{"data": {"id": ids[0]}, "annotations": [{"completed_by": 7, "result": chosen}]}]
    path = tmp_path / "export.json"
    path.write_text(json.dumps(tasks))
    with pytest.raises(DataError, match=r"user 7 has no name; set 'people=\{7: NAME\}'"):
        act(tmp_path, "decide", decisions=str(path))
    with pytest.raises(RefusedError, match="Anna  proposed"):
        act(tmp_path, "decide", decisions=str(path), people={7: "Anna "})
    act(tmp_path, "decide", decisions=str(path), people={7: "bob"})
    with pytest.raises(RefusedError, match="has reviewed"):
        act(tmp_path, "decide", decisions=str(path), people={7: " BOB"})


@pytest.mark.parametrize("wrong", [{"by": 7}, {"note": None}, {"id": 12345678}])
def test_a_decision_that_is_no_text_is_refused(
    tmp_path: Path, source: str, wrong: dict[str, Any]
) -> None:
    act(tmp_path, "propose", source=source, by="anna")
    entry = {"id": next(iter(golden(tmp_path).rows)), "decision": "approve", "by": "bob"}
    (tmp_path / "d.jsonl").write_text(json.dumps(entry | {"note": ""} | wrong))
    with pytest.raises(DataError, match="expected texts as id, by and note"):
        act(tmp_path, "decide", decisions=str(tmp_path / "d.jsonl"))


def test_a_reviewer_reads_all_that_is_approved(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "look_up", "arguments": '{"city": "Rome"}'}}
    turn = {"role": "assistant", "content": "I look.", "tool_calls": [call],
            "reasoning_content": "I do not know.", "train": False}  # fmt: skip
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    last = [{"role": "tool", "content": "17"}, {"role": "assistant", "content": "17 degrees"}]
    content = {"messages": [{"role": "user", "content": "Weather?"}, turn, *last], "tools": tools}
    read = text_of(Row(parse(content), "anna"))
    assert read.startswith("user: Weather?\n\nassistant: I look.\n\n")
    for part in ('"Rome', "assistant reasoning_content: I do not", "assistant train: false",
                 'tools: [{"function"'):  # fmt: skip
        assert part in read.replace("\\", "")


def test_a_set_whose_last_row_is_retired_is_sealed_to_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Golden.alone(tmp_path / "golden" / "g", reviewers=2) as held:
        held.propose(parse(chat("q", "a")), "anna")
        (row_id,) = held.rows
        for who in ("bob", "carla"):
            held.decide(row_id, "approve", who)
    act(tmp_path, "seal")
    act(tmp_path, "retire", id=row_id, by="anna")
    assert "seal the set again" in capsys.readouterr().out
    act(tmp_path, "seal")
    assert not (tmp_path / "golden" / "g" / "golden.jsonl").exists()
    assert "all its rows are retired" in capsys.readouterr().out


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="source: required for this action"):
        act(tmp_path, "propose", by="anna")
    with pytest.raises(ConfigError, match="decision: required"):
        act(tmp_path, "decide", id="abcdefgh", by="anna")


@pytest.mark.browser
def test_the_page_saves_what_decide_reads(tmp_path: Path, source: str) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    act(tmp_path, "propose", source=source, by="anna")
    act(tmp_path, "queue")
    page = (tmp_path / "golden" / "g" / "review.html").read_text()
    assert "<b>bold" not in page and "&lt;b&gt;bold" in page
    # Decide on two rows as a person would, and show the file's text in the page.
    drive = """<script>
      document.getElementById("by").value = "bob";
      rows.slice(0, 2).forEach(a => a.querySelector("input[value=approve]").click());
      document.title = JSON.stringify(chosen());
      document.body.dataset.out = chosen().map(d => JSON.stringify(d)).join("|");
    </script></html>"""
    (tmp_path / "driven.html").write_text(page.replace("</html>", drive))
    dom = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{tmp_path}/driven.html"],
        check=True, capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    assert "2 of 3 decided" in dom
    out = re.search(r'data-out="([^"]*)"', dom)
    assert out
    lines = out[1].replace("&quot;", '"').split("|")
    (tmp_path / "d.jsonl").write_text("\n".join(lines) + "\n")
    act(tmp_path, "decide", decisions=str(tmp_path / "d.jsonl"))
    assert [row.approved_by for row in golden(tmp_path).of("reviewed")] == [["bob"], ["bob"]]
