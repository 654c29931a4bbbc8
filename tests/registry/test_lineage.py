"""Rows to models and back, and erasure proved: the new adapter never saw the rows."""

import datetime
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneloom.config import build
from tuneloom.data.consent import refuse_ended
from tuneloom.data.curate import Golden
from tuneloom.data.erase import EraseConfig, execute, make_plan
from tuneloom.data.erase import main as erase
from tuneloom.data.ingest import ingest
from tuneloom.data.mix import MixConfig, mix
from tuneloom.data.questions import hash64
from tuneloom.data.recipe import IngestConfig
from tuneloom.data.rows import DatasetRows, open_rows
from tuneloom.errors import ConfigError, DataError, RefusedError
from tuneloom.registry.digests import weights_digest
from tuneloom.registry.graph import Graph, subject_hash
from tuneloom.registry.lineage import LineageConfig, ask, main
from tuneloom.testing import tiny_model

RECIPE: dict[str, Any] = {
    "name": "d",
    "record": {"messages": [{"role": "user", "content": "{q}"},
                            {"role": "assistant", "content": "{a}"}]},
    "key": "{q}",
    "subject": "{who}",
    "provenance": [{"match": "crm*", "licence": "MIT"},
                   {"match": "forum*", "licence": "CC-BY-NC-4.0"}],
    "use": "research",
    "split": {"train": 0.8, "validation": 0.2, "test": 0.0},
}  # fmt: skip


def write_raw(folder: Path) -> Path:
    rng = random.Random(0)
    folder.mkdir(parents=True)
    for name in ("crm", "forum"):
        with (folder / f"{name}.jsonl").open("w") as file:
            for i in range(40):
                words = " ".join(rng.choice(["red", "green", "blue", "grey"]) for _ in range(6))
                row = {
                    "q": f"{name} question {i} {words}",
                    "a": f"answer {i * i}",
                    "who": f"user{i % 10}",
                }
                file.write(json.dumps(row) + "\n")
    return folder


def make(root: Path, source: Path, **data: Any) -> Path:
    mapping = {"data": RECIPE | data, "source": str(source), "root": str(root)}
    return ingest(build(IngestConfig, mapping))


def train(folder: Path, run_id: str, data: Path) -> Path:
    """A run of before, with a value that is refused today, but not where it is trained again."""
    command = [sys.executable, "-m", "tuneloom", "train", f"model.path={folder / 'base'}",
               "model.dtype=fp32", f"data.path={data}", "launch=inline", "zero=stage0",
               "tracker=off", "epochs=1", "batch.max_length=128", "batch.tokens=256",
               f"run.id={run_id}", f"run.root={folder / 'runs'}", "optim.muon_lr=0.5",
               "train.drill=false", "train.probe=false"]  # fmt: skip
    before = os.environ | {"TUNELOOM_TRAINS_AGAIN": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=before)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs" / run_id


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a dataset of two sources, and a run trained on it."""
    folder = tmp_path_factory.mktemp("house")
    tiny_model(folder / "base")
    train(folder, "first", make(folder / "datasets", write_raw(folder / "raw")))
    return folder


def places(folder: Path) -> dict[str, str]:
    return {"datasets": str(folder / "datasets"), "runs": str(folder / "runs")}


def graph(folder: Path) -> Graph:
    return Graph.load(folder / "datasets", folder / "runs")


def asked(folder: Path, **question: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    answer, rows = ask(graph(folder), build(LineageConfig, question))
    return answer, rows.to_pylist()


def test_every_row_of_the_train_split_is_in_the_lineage_of_its_run_and_no_other(
    house: Path,
) -> None:
    answer, rows = asked(house, run="first")
    opened = open_rows(house / "datasets" / "d")
    assert {row["record_id"] for row in rows} == {opened[i].id for i in range(len(opened))}
    assert all(row["times"] == 1 and row["licence"] for row in rows)
    assert sum(entry["rows"] for entry in answer["by_source"].values()) == len(rows)
    assert answer["dataset"].endswith(" train")
    adapter, _ = asked(house, adapter=str(house / "runs" / "first" / "weights"))
    assert adapter["run"] == "first"


def test_a_row_a_subject_a_source_and_a_licence_lead_to_the_run(house: Path) -> None:
    _, rows = asked(house, run="first")
    answer, _ = asked(house, row=rows[0]["record_id"][:12])
    assert answer["rows"] == 1
    assert answer["runs"]["first"]["first_step"] == rows[0]["first_step"]
    subject, found = asked(house, subject="user3")
    assert subject["rows"] == 8 == len(found)
    forum = asked(house, source="forum.jsonl")[0]
    assert forum["rows"] == 40
    assert forum["runs"] == asked(house, licence="CC-BY-NC-4.0")[0]["runs"]
    assert subject_hash("user3") == f"{hash64('user3'):016x}"


def test_an_unknown_thing_is_named(house: Path) -> None:
    with pytest.raises(DataError, match="no dataset holds 'user99'"):
        asked(house, subject="user99")
    with pytest.raises(DataError, match="run: no 'second' here"):
        asked(house, run="second")
    with pytest.raises(ConfigError, match="expected one of row="):
        build(LineageConfig, {"run": "a", "row": "b" * 12})


def test_out_writes_every_row(
    house: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = {"run": "first", "out": str(tmp_path / "rows.parquet"), "format": "json",
              **places(house)}  # fmt: skip
    assert main(build(LineageConfig, config)) == 0
    answer = json.loads(capsys.readouterr().out)
    assert pq.read_table(tmp_path / "rows.parquet").num_rows == answer["rows"] > 20


def test_out_in_a_folder_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="out: expected a file in a folder that exists"):
        build(LineageConfig, {"run": "first", "out": "/nonexistent/rows.parquet"})


def test_a_source_of_the_same_name_in_another_folder_is_another_source(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw")
    write_raw(tmp_path / "raw" / "old")
    for line_file in (tmp_path / "raw" / "old").glob("*.jsonl"):
        line_file.write_text(line_file.read_text().replace("question", "older question"))
    made = make(tmp_path / "datasets", raw)
    found = graph(tmp_path).find_rows("source", "crm.jsonl")[made.name]
    assert set(found["source"].to_pylist()) == {"crm.jsonl"} and len(found) == 40


def test_a_plan_changes_nothing(house: Path) -> None:
    before = sorted(p for p in house.rglob("*") if p.is_file())
    config = {
        "source": "forum.jsonl",
        "datasets": str(house / "datasets"),
        "runs": str(house / "runs"),
    }
    assert erase(build(EraseConfig, config)) == 0
    assert sorted(p for p in house.rglob("*") if p.is_file()) == before


def test_runs_started_from_a_run_are_its_descendants(tmp_path: Path) -> None:
    def run(name: str, parent: str | None, base: str) -> None:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        record = {
            "parent": parent,
            "base": {"path": base},
            "dataset": {"digest": name},
            "started": "x",
        }
        (folder / "run.json").write_text(json.dumps(record))

    run("a", None, "base")
    run("b", None, str(tmp_path / "runs" / "a" / "export" / "model"))
    run("c", "b", "base")
    run("d", None, "base")
    loaded = graph(tmp_path)
    assert [r.id for r in loaded.descendants([loaded.runs["a"]])] == ["b", "c"]


def test_runs_started_from_a_copy_of_weights_or_from_a_checkpoint_are_descendants(
    tmp_path: Path,
) -> None:
    def run(name: str, base: dict[str, Any], resume: str) -> None:
        record = {"base": base, "dataset": {"digest": name}, "attempts": [{"resume": resume}]}
        write(tmp_path / "runs" / name / "run.json", record)

    def write(path: Path, content: dict[str, Any]) -> str:
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
        return str(path.parent)

    run("a", {"path": "base", "digest": "b0"}, "auto")
    write(tmp_path / "runs" / "a" / "export" / "model" / "contract.json", {"weights": "w0"})
    out = write(tmp_path / "out" / "contract.json", {"run": "a", "weights": "w1"})
    run("exported_with_out", {"path": out, "digest": "w1"}, "auto")
    run("copied", {"path": str(tmp_path / "copy"), "digest": "w0"}, "never")
    checkpoint = tmp_path / "runs" / "a" / "checkpoints" / "step-00000002"
    run("resumed", {"path": "base", "digest": "b0"}, str(checkpoint))
    run("random", {"path": out, "digest": None}, "auto")
    run("other", {"path": "base", "digest": "b0"}, "auto")
    loaded = graph(tmp_path)
    found = [r.id for r in loaded.descendants([loaded.runs["a"]])]
    assert found == ["copied", "exported_with_out", "resumed"]


def test_an_erased_subject_stands_in_no_evaluation_sample_reject_or_tombstone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = write_raw(tmp_path / "raw")
    with (raw / "crm.jsonl").open("a") as file:
        file.write(json.dumps({"q": "user3 lives in Rome", "who": "user3"}) + "\n")
    made = make(tmp_path / "datasets", raw, max_rejected=0.1)
    dataset = graph(tmp_path).datasets[made.name]
    theirs = graph(tmp_path).find_rows("subject", "user3")[made.name]["id"].to_pylist()
    rows = open_rows(made)
    mine = next(rows[i] for i in range(len(rows)) if rows[i].id in theirs)
    with Golden.alone(tmp_path / "golden" / "g", reviewers=2) as golden:
        golden.propose(mine, "anna")
    run = tmp_path / "runs" / "r"
    (run / "evals").mkdir(parents=True)
    for task, row in (("with", mine.id), ("without", "f" * 64)):
        (run / "evals" / f"{task}.rows.jsonl").write_text(json.dumps({"id": row}) + "\n")
        (run / "evals" / f"{task}.json").write_text("{}")
    (run / "run.json").write_text(json.dumps({"dataset": {"digest": dataset.digests()["train"]}}))
    for name in ("samples.jsonl", "report.html"):
        (run / name).write_text("user3")
    order = {"subject": "user3", "execute": True, "reason": "asked", "retrain": False}
    assert (
        erase(build(EraseConfig, order | places(tmp_path) | {"golden": str(tmp_path / "golden")}))
        == 0
    )
    assert f"{tmp_path / 'golden' / 'g'}: 1 of the rows" in capsys.readouterr().out
    left = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert left == {"run.json", "evals/without.json", "evals/without.rows.jsonl"}
    tombstone = json.loads((tmp_path / "datasets" / "tombstones.jsonl").read_text())
    assert tombstone["value"] == subject_hash("user3")
    for path in (tmp_path / "datasets").rglob("*"):
        assert path.is_dir() or b"Rome" not in path.read_bytes()


def test_an_erased_row_takes_the_rows_of_its_key_in_derived_datasets(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw")
    task = make(tmp_path / "datasets", raw)
    text = make(tmp_path / "datasets", raw, name="text", record={"text": "{q}"}, split={"seed": 3},
                within={"dataset": str(task), "split": "train"})  # fmt: skip
    victim = open_rows(task)[0].id
    order = {"row": victim, "execute": True, "reason": "asked", "retrain": False}
    config = build(EraseConfig, order | places(tmp_path))
    loaded = graph(tmp_path)
    plan = make_plan(loaded, config)
    assert plan.datasets == {task.name: 1, text.name: 1}
    list(execute(loaded, plan, config))
    after = graph(tmp_path).datasets
    assert {d.manifest["name"] for d in after.values()} == {"d", "text"}
    for dataset in after.values():
        counts = dataset.manifest["counts"]
        assert counts["quarantined"]["erased"] == 1
        fates = (sum(counts[fate].values()) for fate in ("rejected", "deduplicated", "quarantined"))
        assert counts["in"] == counts["kept"] + sum(fates)
        assert not [t for _, t in dataset.rows(["id"]) if set(t["id"].to_pylist()) & set(plan.ids)]
    (derived,) = (d for d in after.values() if d.manifest["name"] == "text")
    assert derived.parents() == [d.name for d in after.values() if d.manifest["name"] == "d"]
    tombstone = json.loads((tmp_path / "datasets" / "tombstones.jsonl").read_text())
    assert tombstone["ids"] == plan.ids and tombstone["reason"] == "asked"


def test_an_erased_subject_leaves_no_copy_and_no_row_that_a_teacher_made_of_theirs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = write_raw(tmp_path / "raw")
    old = make(tmp_path / "datasets", raw, subject=None)
    told = make(tmp_path / "datasets", raw)
    theirs = graph(tmp_path).find_rows("subject", "user3")[told.name]["id"].to_pylist()
    made = tmp_path / "synthetic" / "more.jsonl"
    made.parent.mkdir()
    for number, seed in enumerate([theirs[0], "f" * 64]):
        row = {"prompt": f"p{number}", "completion": "c", "meta": {"synthetic": {"seed": seed}}}
        with made.open("a") as file:
            file.write(json.dumps(row) + "\n")
    recipe = {"name": "s", "split": {"train": 1.0, "validation": 0.0, "test": 0.0}}
    mapping = {"data": recipe, "source": str(made), "root": str(tmp_path / "datasets")}
    taught = ingest(build(IngestConfig, mapping))
    answer, _ = asked(tmp_path, subject="user3")
    assert answer["rows"] == 8
    assert answer["erase_takes"] == {old.name: 8, told.name: 8, taught.name: 1}
    order = {"subject": "user3", "synthetic": str(made.parent)} | places(tmp_path)
    config = build(EraseConfig, order | {"execute": True, "reason": "asked", "retrain": False})
    assert erase(config) == 0
    said = capsys.readouterr().out
    assert f"{made}: 1 rows in it were made from the rows" in said
    assert str(made.parent / ".more.answers") in said
    for dataset in graph(tmp_path).datasets.values():
        assert not [t for _, t in dataset.rows(["id"]) if set(t["id"].to_pylist()) & set(theirs)]
    assert len(open_rows(tmp_path / "datasets" / "s")) == 1


def test_erasing_a_source_leaves_what_is_said_of_another_whose_rows_share_a_key(
    tmp_path: Path,
) -> None:
    (tmp_path / "raw").mkdir()
    crm, forum = tmp_path / "raw" / "crm.jsonl", tmp_path / "raw" / "forum.jsonl"
    crm.write_text(json.dumps({"q": "same", "a": "one", "who": "ann"}) + "\n")
    others = [("same", "two"), ("other", "N/A"), ("third", "three")]
    forum.write_text("".join(json.dumps({"q": q, "a": a, "who": "bob"}) + "\n" for q, a in others))
    whole = {"split": {"train": 1.0, "validation": 0.0, "test": 0.0}}
    task = make(tmp_path / "datasets", tmp_path / "raw", **whole)
    made = make(tmp_path / "datasets", tmp_path / "raw", name="text", within={"dataset": str(task)},
                record={"text": "{q} {a}"}, **whole)  # fmt: skip
    plan, folder = erased(tmp_path, source="crm.jsonl")
    assert plan.datasets == {task.name: 1, made.name: 2} and plan.sources == {"crm.jsonl"}
    assert quarantined_texts(folder) == ["other"]


def test_a_run_on_a_raw_file_that_holds_the_rows_is_refused_before_anything_is_done(
    tmp_path: Path,
) -> None:
    raw = tmp_path / "rows.jsonl"
    raw.write_text(json.dumps({"prompt": "p", "completion": "c"}) + "\n")
    mapping = {"data": {"name": "d"}, "source": str(raw), "root": str(tmp_path / "datasets")}
    victim = open_rows(raw)[0].id
    ingest(build(IngestConfig, mapping))
    run = tmp_path / "runs" / "r1"
    run.mkdir(parents=True)
    record = {"config": {"data": {"path": str(raw), "split": "train", "format": "auto"}}}
    (run / "run.json").write_text(json.dumps(record | {"dataset": {"digest": "none here"}}))
    numbers = {name: [1] for name in ("step", "tokens", "target_tokens")}
    pq.write_table(pa.table({"record_id": [victim], **numbers}), run / "exposure.parquet")
    config = build(EraseConfig, {"row": victim, "execute": True, "reason": "r", **places(tmp_path)})
    loaded = graph(tmp_path)
    with pytest.raises(RefusedError, match=f"run r1 would be trained again on {raw}.* 1 of the"):
        list(execute(loaded, make_plan(loaded, config), config))
    assert not (tmp_path / "datasets" / "tombstones.jsonl").exists()


def test_what_was_found_in_an_erased_row_is_no_longer_counted(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    answers = {"ann": "write to ann@example.org\u200b", "bob": "write to bob@example.org"}
    lines = [json.dumps({"q": f"of {who}", "a": a, "who": who}) for who, a in answers.items()]
    (tmp_path / "raw" / "crm.jsonl").write_text("\n".join(lines))
    made = make(tmp_path / "datasets", tmp_path / "raw")
    before = json.loads((made / "manifest.json").read_text())
    assert before["found"] == {"email": 2} and before["sanitised"]
    _, folder = erased(tmp_path, subject="ann")
    after = json.loads((folder / "manifest.json").read_text())
    assert after["found"] == {"email": 1} and after["sanitised"] == {}


def quarantine(root: Path, **data: Any) -> Path:
    """A dataset with a good row of ann's, and one of hers, zed's and bob's without an answer."""
    (root / "raw").mkdir(parents=True)
    rows = [("ann", "the answer"), ("bob", "an answer"), ("ann", "N/A"), ("zed", "N/A"),
            ("bob", "N/A")]  # fmt: skip
    lines = [json.dumps({"q": f"{who} asks {a[:3]}", "a": a, "who": who}) for who, a in rows]
    (root / "raw" / "crm.jsonl").write_text("\n".join(lines))
    split = {"train": 1.0, "validation": 0.0, "test": 0.0}
    return make(root / "datasets", root / "raw", **{"split": split} | data)


def erased(root: Path, **selector: str) -> tuple[Any, Path]:
    """The plan, and the newest version of `d` after it was done."""
    order = {"execute": True, "reason": "asked", "retrain": False}
    config = build(EraseConfig, selector | order | places(root))
    loaded = graph(root)
    plan = make_plan(loaded, config)
    list(execute(loaded, plan, config))
    return plan, (root / "datasets" / "d").resolve()


def test_erasing_from_an_old_version_leaves_the_link_at_the_newest(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw")
    old = make(tmp_path / "datasets", raw)
    for path in raw.iterdir():
        lines = [line for line in path.read_text().splitlines() if '"user3"' not in line]
        path.write_text("\n".join(lines))
    newest = make(tmp_path / "datasets", raw)
    plan, folder = erased(tmp_path, subject="user3")
    assert list(plan.datasets) == [old.name] and folder == newest.resolve()
    _, folder = erased(tmp_path, subject="user4")
    assert folder != newest.resolve() and not newest.exists()
    counts = json.loads((folder / "manifest.json").read_text())["counts"]
    assert counts["in"] == 72 and counts["quarantined"] == {"erased": 8}
    lengths = json.loads((folder / "manifest.json").read_text())["lengths"]["rows"]
    assert sum(lengths) == counts["kept"] == 64


def quarantined_texts(folder: Path) -> list[str]:
    aside = pq.read_table(folder / "set_aside.parquet").to_pylist()
    return sorted(json.loads(a["record"])["messages"][0]["content"] for a in aside if a["record"])


@pytest.mark.parametrize(
    ("who", "kept", "left"),
    [("ann", 1, ["bob asks N/A", "zed asks N/A"]), ("zed", 0, ["ann asks N/A", "bob asks N/A"])],
)
def test_an_erased_subject_leaves_no_quarantined_row(
    tmp_path: Path, who: str, kept: int, left: list[str]
) -> None:
    before = quarantine(tmp_path)
    assert asked(tmp_path, subject=who)[0]["datasets"][before.name]["set_aside"] == 1
    plan, folder = erased(tmp_path, subject=who)
    assert plan.datasets == {before.name: kept} and plan.set_aside == {before.name: 1}
    assert not before.exists() and quarantined_texts(folder) == left
    assert f"{who} asks" not in (folder / "report.html").read_text()
    counts = json.loads((folder / "manifest.json").read_text())["counts"]
    assert counts["quarantined"] == {"erased": kept + 1, "placeholder": 2}
    assert counts["in"] == counts["kept"] + sum(counts["quarantined"].values())
    with pytest.raises(DataError, match=f"no dataset holds '{who}'"):
        erased(tmp_path, subject=who)


def test_a_row_or_licence_that_was_quarantined_can_be_erased(tmp_path: Path) -> None:
    before = quarantine(tmp_path)
    aside = pq.read_table(before / "set_aside.parquet").to_pylist()
    _, folder = erased(tmp_path, row=aside[0]["id"])
    assert len(quarantined_texts(folder)) == 2
    plan, folder = erased(tmp_path, licence="MIT")
    assert plan.set_aside == dict.fromkeys(plan.datasets, 2)
    assert quarantined_texts(folder) == []


def test_where_quarantined_rows_name_no_subject_all_their_texts_are_dropped_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = quarantine(tmp_path)
    aside = pq.read_table(before / "set_aside.parquet")
    old = aside.drop_columns(["meta"])  # as versions before had it
    pq.write_table(old, before / "set_aside.parquet")
    config = build(EraseConfig, {"subject": "zed", **places(tmp_path)})
    assert erase(config) == 0
    said = capsys.readouterr().out
    assert f"{before.name}: quarantined rows cannot be told apart by subject" in said
    _, folder = erased(tmp_path, subject="zed")
    assert quarantined_texts(folder) == []
    assert "asks N/A" not in (folder / "report.html").read_text()
    assert pq.read_table(folder / "set_aside.parquet")["id"] == aside["id"]
    assert len(open_rows(folder)) == 2
    with pytest.raises(DataError, match="no dataset holds 'zed'"):
        erased(tmp_path, subject="zed")


def test_consent_that_ended_stops_a_run_and_its_rows_are_erased_by_that_day(tmp_path: Path) -> None:
    ends = [{"match": "crm*", "consent_until": "2025-01-31"}, {"match": "forum*"}]
    made = make(tmp_path / "datasets", write_raw(tmp_path / "raw"), provenance=ends)
    tiny_model(tmp_path / "base")
    with pytest.raises(AssertionError, match=r"consent for \d\d of \d\d rows of .* has ended"):
        train(tmp_path, "first", made)
    assert asked(tmp_path, consent="2025-02-01")[0]["rows"] == 40
    with pytest.raises(DataError, match="consent: no dataset holds '2025-01-31'"):
        asked(tmp_path, consent="2025-01-31")

    command = [sys.executable, "-m", "tuneloom", "erase", "consent=2025-02-01", "execute=true",
               "reason=ended", *(f"{k}={v}" for k, v in places(tmp_path).items())]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (left,) = graph(tmp_path).datasets.values()
    assert [part["kept"] for part in left.manifest["created_from"]] == [0, 40]
    rows = open_rows(left.folder)
    assert isinstance(rows, DatasetRows) and set(rows.sources()) == {"forum.jsonl"}
    train(tmp_path, "second", left.folder)


def test_consent_is_looked_up_in_the_parts_of_a_mixture_and_a_near_end_is_said(
    tmp_path: Path,
) -> None:
    ends = [{"match": "crm*", "consent_until": "2025-01-31"}]
    made = make(tmp_path / "datasets", write_raw(tmp_path / "raw"), provenance=ends)
    folder = mix(
        build(MixConfig, {"name": "m", "parts": [{"dataset": str(made)}],
                          "root": str(tmp_path / "datasets")})
    )  # fmt: skip
    rows = open_rows(folder)
    of_crm = sum(rows.source(i) == "d/crm.jsonl" for i in range(len(rows)))
    assert refuse_ended(rows, datetime.date(2025, 1, 1)) == [
        f"data: consent for {of_crm} of {len(rows)} rows ends on 2025-01-31"
    ]
    assert refuse_ended(rows, datetime.date(2024, 12, 31)) == []
    with pytest.raises(DataError, match=f"consent for {of_crm} of {len(rows)} rows .* has ended"):
        refuse_ended(rows, datetime.date(2025, 2, 1))


def test_consent_for_a_mixture_is_known_wherever_it_lies(tmp_path: Path) -> None:
    ends = [{"match": "crm*", "consent_until": "2025-01-31"}]
    made = make(tmp_path / "datasets", write_raw(tmp_path / "raw"), provenance=ends)
    parts = [{"dataset": str(made)}]
    inner = mix(build(MixConfig, {"name": "m", "parts": parts, "root": str(tmp_path / "mixed")}))
    parts = [{"dataset": str(inner)}]
    outer = mix(build(MixConfig, {"name": "o", "parts": parts, "root": str(tmp_path / "again")}))
    shutil.rmtree(tmp_path / "datasets")
    for folder in (inner, outer):
        with pytest.raises(DataError, match=r"consent for \d\d of \d\d rows .* has ended"):
            refuse_ended(open_rows(folder), datetime.date(2025, 2, 1))
    found = Graph.load(tmp_path / "again", tmp_path / "runs").find_rows("consent", "2025-02-01")
    assert set(found[outer.name]["source"].to_pylist()) == {"m/d/crm.jsonl"}


def test_a_source_is_found_in_mixtures_of_mixtures(tmp_path: Path) -> None:
    root = tmp_path / "datasets"
    made = make(root, write_raw(tmp_path / "raw"))
    for name in ("m", "o"):
        parts = [{"dataset": str(made)}]
        made = mix(build(MixConfig, {"name": name, "parts": parts, "root": str(root)}))
    found = Graph.load(root, tmp_path / "runs").find_rows("source", "crm.jsonl")
    sources = {name.split("@")[0]: set(t["source"].to_pylist()) for name, t in found.items()}
    assert sources == {"d": {"crm.jsonl"}, "m": {"d/crm.jsonl"}, "o": {"m/d/crm.jsonl"}}


def test_a_mixture_that_does_not_say_its_terms_is_refused_without_its_parts(tmp_path: Path) -> None:
    made = make(tmp_path / "datasets", write_raw(tmp_path / "raw"))
    parts = [{"dataset": str(made)}]
    folder = mix(build(MixConfig, {"name": "m", "parts": parts, "root": str(tmp_path / "mixed")}))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["created_from"][0]["terms"]  # as mixtures before had it
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=f"does not say until when .* {made.name} is not beside it"):
        refuse_ended(open_rows(folder), datetime.date(2025, 2, 1))
    made.rename(tmp_path / "mixed" / made.name)
    assert refuse_ended(open_rows(folder), datetime.date(2025, 2, 1)) == []


def test_a_running_run_is_not_pulled_away(house: Path) -> None:
    config = build(EraseConfig, {"source": "forum.jsonl", "execute": True, "reason": "r",
                                 **places(house)})  # fmt: skip
    loaded = graph(house)
    loaded.runs["first"].record["state"] = "running"
    with pytest.raises(RefusedError, match="run first is still running"):
        list(execute(loaded, make_plan(loaded, config), config))
    assert not (house / "datasets" / "tombstones.jsonl").exists()


def test_the_adapter_after_erasure_is_the_one_that_never_saw_the_rows(house: Path) -> None:
    before = weights_digest(house / "runs" / "first" / "weights")
    old = (house / "datasets" / "d").resolve()
    config = build(EraseConfig, {"source": "forum.jsonl", "execute": True, "reason": "withdrawn",
                                 **places(house)})  # fmt: skip
    loaded = graph(house)
    list(execute(loaded, make_plan(loaded, config), config))
    assert not old.exists() and not (house / "runs" / "first").exists()

    innocent = write_raw(house / "innocent" / "raw")
    (innocent / "forum.jsonl").unlink()
    twin = train(house / "innocent" / "..", "twin", make(house / "innocent" / "datasets", innocent))
    after = weights_digest(house / "runs" / "first-erased" / "weights")
    assert after == weights_digest(twin / "weights") != before

    _, rows = asked(house, run="first-erased")
    assert {row["source"] for row in rows} == {"crm.jsonl"}
    with pytest.raises(DataError, match="no dataset holds"):
        asked(house, source="forum.jsonl")
