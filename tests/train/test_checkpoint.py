"""Checkpoints: exact resume, other layouts, damage found before use, nothing of the base inside."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.train.test_damage import SHAPES
from tuneloom.config import build
from tuneloom.errors import (
    ConfigError,
    DiskError,
    RefusedError,
    Stopped,
    TrainingError,
    TuneloomError,
)
from tuneloom.testing import (
    Gang,
    cramped_files,
    cut_back,
    exposures,
    free_port,
    metrics,
    small_config,
    tiny_model,
    went_on,
)
from tuneloom.train import checkpoint, copies, runs, samples, universal, weights
from tuneloom.train.config import TrainConfig
from tuneloom.train.distributed import ALONE
from tuneloom.train.session import Session
from tuneloom.train.signals import StopFlag

STEPS = 8


def config(lab: Path, run_id: str, **dotted: object) -> dict[str, object]:
    shared = {
        "steps": STEPS,
        "method__dropout": 0.1,
        "batch__accumulation": 2,
        "checkpoint__keep": 9,
    }
    return small_config(lab, run_id, **(shared | dotted))


def witnessed(lab: Path, run_id: str) -> tuple[int, list[str]]:
    """The step of effects.json and the options that it lists."""
    found = json.loads((lab / "runs" / run_id / "effects.json").read_text())
    return found["step"], [receipt["option"] for receipt in found["receipts"]]


def interrupted(lab: Path, gang: Gang, run_id: str, **dotted: object) -> None:
    """Run `run_id` to step 4 and no further: a copy of a whole run, cut back to its checkpoint."""
    gang.fit(config(lab, run_id, checkpoint__every=4, **dotted))
    cut_back(lab, run_id, 4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resuming_gives_the_same_bits_as_never_stopping(lab: Path, two: Gang, stage: int) -> None:
    whole, cut = f"whole{stage}", f"cut{stage}"
    two.fit(config(lab, whole, zero__stage=stage))
    interrupted(lab, two, cut, zero__stage=stage)
    two.fit(config(lab, cut, zero__stage=stage, checkpoint__every=4))
    assert went_on(lab, cut, 4) and witnessed(lab, cut)[0] == 2
    assert metrics(lab, cut) == metrics(lab, whole)
    assert exposures(lab, cut) == exposures(lab, whole)


MOVES = {"lora": [(2, 2), (2, 3), (3, 1), (0, 2), (3, 0)],
         "full": [(2, 3), (3, 1), (1, 2), (0, 3), (2, 0)]}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "before", "after"), [(kind, *move) for kind in MOVES for move in MOVES[kind]]
)
def test_a_run_resumes_on_one_rank_and_another_stage_with_its_global_batch(
    lab: Path, one: Gang, two: Gang, kind: str, before: int, after: int
) -> None:
    whole, cut = f"whole-{kind}{before}", f"moved-{kind}{before}{after}"
    settings = {"method__kind": kind, "method__dropout": 0.0, "optim__weight_decay": 0.1}
    two.fit(config(lab, whole, zero__stage=before, **settings))
    interrupted(lab, two, cut, zero__stage=before, **settings)
    one.fit(config(lab, cut, zero__stage=after, batch__accumulation=4, **settings))
    assert went_on(lab, cut, 4)
    step, options = witnessed(lab, cut)
    assert f"zero.stage={after}" in options and step == (2 if after == before else 6)
    assert metrics(lab, cut) == pytest.approx(metrics(lab, whole), rel=1e-5)
    assert exposures(lab, cut) == exposures(lab, whole)


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (0, 3)])
def test_under_bf16_the_fp32_masters_move_to_the_other_stage(
    lab: Path, two: Gang, before: int, after: int
) -> None:
    whole, cut = f"whole-half{before}", f"moved-half{before}{after}"
    settings = {"model__dtype": "bf16", "method__dropout": 0.0}
    two.fit(config(lab, whole, zero__stage=before, **settings))
    interrupted(lab, two, cut, zero__stage=before, **settings)
    two.fit(config(lab, cut, zero__stage=after, **settings))
    assert went_on(lab, cut, 4)
    # The first step after the move computes with the very weights of the run that never moved.
    assert metrics(lab, cut)[:5] == metrics(lab, whole)[:5]
    assert metrics(lab, cut) == pytest.approx(metrics(lab, whole), rel=5e-3)


def test_muon_state_does_not_move_from_zero_0_and_the_refusal_says_so(lab: Path, two: Gang) -> None:
    settings: dict[str, object] = {
        "optim__name": "muon", "optim__clip": 0.0, "method__kind": "full", "method__dropout": 0.0,
    }  # fmt: skip
    interrupted(lab, two, "muon-stays", zero__stage=0, **settings)
    with pytest.raises(ConfigError, match=r"zero\.stage: .* only AdamW's can; keep zero\.stage"):
        two.fit(config(lab, "muon-stays", zero__stage=2, **settings))


def test_a_lora_checkpoint_holds_adapters_and_their_state_and_nothing_of_the_base(
    lab: Path, two: Gang
) -> None:
    two.fit(config(lab, "small", zero__stage=2, method__rank=32))
    folder = lab / "runs/small/checkpoints" / checkpoint.name(STEPS)
    trainable = json.loads((lab / "runs/small/effects.json").read_text())["receipts"][0][
        "evidence"
    ]["trainable_parameters"]
    wanted = trainable * 4 * 4  # the weights and fp32 master, first and second moment
    engine = sum(f.stat().st_size for f in (folder / "engine").iterdir())
    assert engine < 1.1 * wanted + 100_000


def test_a_flipped_bit_is_found_and_the_checkpoint_before_is_used(
    lab: Path, one: Gang, capfd: pytest.CaptureFixture[str]
) -> None:
    one.fit(config(lab, "flipped", checkpoint__every=4))
    root = lab / "runs/flipped/checkpoints"
    shard = max(
        (root / checkpoint.name(STEPS) / "engine").iterdir(), key=lambda p: p.stat().st_size
    )
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    said: list[str] = []
    found = checkpoint.newest(root, say=said.append)
    assert found is not None and found.step == 4
    assert "xxh3_128" in said[0] and checkpoint.name(STEPS) in said[0]


def test_a_damaged_checkpoint_named_by_the_user_is_refused(lab: Path, one: Gang) -> None:
    one.fit(config(lab, "named", checkpoint__every=4))
    folder = lab / "runs/named/checkpoints" / checkpoint.name(4)
    (folder / "trainer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"trainer\.json has 2 bytes"):
        checkpoint.opened(folder)


def test_a_stop_file_saves_the_step_on_all_ranks_and_the_same_command_goes_on(
    lab: Path, two: Gang
) -> None:
    two.fit(config(lab, "never-asked", zero__stage=2))
    folder = lab / "runs/asked-to-stop"
    folder.mkdir(parents=True)
    (folder / "stop").touch()
    with pytest.raises(Stopped, match="after step 1"):
        two.fit(config(lab, "asked-to-stop", zero__stage=2))
    two.fit(config(lab, "asked-to-stop", zero__stage=2))
    assert metrics(lab, "asked-to-stop") == metrics(lab, "never-asked")


def test_a_request_to_stop_that_a_lost_rank_left_is_heard_by_the_next_attempt(
    lab: Path, one: Gang
) -> None:
    settings = config(lab, "asked-and-lost")
    folder = lab / "runs/asked-and-lost"
    folder.mkdir(parents=True)
    for error, left in ((TrainingError("of its own"), False), (RuntimeError("lost"), True)):
        session = Session(build(TrainConfig, settings), ALONE, {})
        session.stop = StopFlag(folder, first=True)
        (folder / "stop").touch()
        session.abandon(error)
        session.close()
        assert (folder / "stop").exists() == left
    with pytest.raises(Stopped, match="after step 1"):
        one.fit(settings)
    assert not (folder / "stop").exists()


def test_another_config_under_the_same_run_id_is_refused_by_key(lab: Path, one: Gang) -> None:
    one.fit(config(lab, "mine"))
    with pytest.raises(ConfigError, match=r"optim\.lr: 0.005 -> 0.1"):
        one.fit(config(lab, "mine", optim__lr=0.1))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_record_or_metrics_in_any_wrong_shape_are_written_anew_and_the_run_goes_on(
    lab: Path, one: Gang, shape: str
) -> None:
    run_id = f"damaged-{list(SHAPES).index(shape)}"
    interrupted(lab, one, run_id)
    folder = lab / "runs" / run_id
    for name in ("run.json", "metrics.jsonl"):
        whole, content = (folder / name).read_bytes(), SHAPES[shape]
        (folder / name).write_bytes(whole[:200] if content is None else content)
    one.fit(config(lab, run_id, checkpoint__every=4))
    facts = json.loads((folder / "run.json").read_text())
    assert (facts["state"], facts["resumed_from"]) == ("done", checkpoint.name(4))
    assert metrics(lab, run_id, "step") == [5, 6, 7, 8]
    assert sorted({step for step, *_ in exposures(lab, run_id)}) == list(range(1, 9))


def test_a_lost_record_does_not_let_another_config_or_other_rows_in(
    lab: Path, tmp_path: Path, one: Gang
) -> None:
    rows = tmp_path / "rows.jsonl"
    shutil.copyfile(lab / "rows.jsonl", rows)
    interrupted(lab, one, "recordless", data__path=str(rows))
    record = lab / "runs/recordless/run.json"
    for content in (b"", b"[]", None):
        record.write_bytes(content) if content is not None else record.unlink(missing_ok=True)
        with pytest.raises(RefusedError, match=r"run\.id: the checkpoints .* another config"):
            one.fit(config(lab, "recordless", data__path=str(rows), optim__lr=0.1))
    rows.write_text(rows.read_text().replace("answer", "Answer", 1))
    with pytest.raises(RefusedError, match=r"data\.path: .* has digest"):
        one.fit(config(lab, "recordless", data__path=str(rows), checkpoint__every=4))


def test_a_damaged_exposure_ends_the_run_and_names_the_file(lab: Path, one: Gang) -> None:
    interrupted(lab, one, "unexposed")
    (lab / "runs/unexposed/exposure.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(
        TrainingError, match=r"exposure.*which rows were trained on is not readable"
    ):
        one.fit(config(lab, "unexposed", checkpoint__every=4))


def test_rows_that_changed_since_the_run_began_are_refused(
    lab: Path, tmp_path: Path, one: Gang
) -> None:
    rows = tmp_path / "rows.jsonl"
    shutil.copyfile(lab / "rows.jsonl", rows)
    settings = {"data__path": str(rows), "checkpoint__every": 4}
    one.fit(config(lab, "edited", **settings))
    rows.write_text(rows.read_text().replace("answer", "Answer", 1))
    cut_back(lab, "edited", 4)
    with pytest.raises(RefusedError, match=r"data\.path: .* has digest"):
        one.fit(config(lab, "edited", **settings))


def test_a_chat_template_that_changed_since_the_run_began_is_refused(
    lab: Path, tmp_path: Path, one: Gang
) -> None:
    base = shutil.copytree(lab / "base", tmp_path / "base")
    interrupted(lab, one, "templated", model__path=str(base))
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|end|>", "<|end|>\n"))
    with pytest.raises(RefusedError, match=r"other tokens of its rows.*batch\.max_length"):
        one.fit(config(lab, "templated", checkpoint__every=4, model__path=str(base)))


def test_resume_never_refuses_a_folder_that_holds_a_run(lab: Path, one: Gang) -> None:
    one.fit(config(lab, "taken"))
    with pytest.raises(ConfigError, match="holds a run already"):
        one.fit(config(lab, "taken", resume="never"))


def test_a_restart_goes_on_under_resume_never_and_a_second_command_does_not(
    lab: Path, one: Gang, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(lab, "fresh", resume="never")
    one.fit(settings)
    again = build(TrainConfig, settings)
    assert runs.earlier(again) is None
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert runs.earlier(again) is None
    monkeypatch.setenv("TUNELOOM_ATTEMPT", "1")
    assert runs.earlier(again) == {"named_step": None}
    monkeypatch.delenv("TUNELOOM_ATTEMPT")
    record = lab / "runs/fresh/run.json"  # as a job of Slurm's writes it
    facts = json.loads(record.read_text())
    facts["attempts"][-1] |= {"job": "7", "requeues": 0}
    record.write_text(json.dumps(facts))
    assert runs.earlier(again) is None  # a second command in the job
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert runs.earlier(again) == {"named_step": None}


def test_a_checkpoint_named_by_resume_is_taken_up_once(lab: Path, one: Gang) -> None:
    """And what the run saved after it is set aside, whatever `keep` says."""
    settings = {"checkpoint__every": 2, "checkpoint__keep": 2}
    one.fit(config(lab, "back", **settings))
    folder = lab / "runs/back/checkpoints"
    whole = metrics(lab, "back")
    assert sorted(f.name for f in folder.iterdir()) == ["step-000006", "step-000008"]
    older = shutil.copytree(folder / "step-000006", lab / "copied" / "step-000006")
    named = config(lab, "back", **settings | {"checkpoint__every": 1, "resume": str(older)})
    one.fit(named)
    assert sorted(f.name for f in folder.iterdir()) == [
        "step-000007", "step-000008", "superseded-step-000008"
    ]  # fmt: skip
    assert metrics(lab, "back") == whole
    shutil.rmtree(folder / "step-000008")  # as if it had been lost before it was saved
    one.fit(named)
    attempts = json.loads((lab / "runs/back/run.json").read_text())["attempts"]
    assert [a["resumed_from"] for a in attempts] == [None, "step-000006", "step-000007"]
    assert metrics(lab, "back") == whole
    for step in (7, 8):  # lost before anything was saved: what is named is taken up again
        shutil.rmtree(folder / checkpoint.name(step))
    one.fit(named)
    attempts = json.loads((lab / "runs/back/run.json").read_text())["attempts"]
    assert attempts[-1]["resumed_from"] == "step-000006" and metrics(lab, "back") == whole


def test_going_back_twice_leaves_what_was_set_aside_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for steps, back in [((2, 4, 6), 2), ((3, 5), 2), ((), 2)]:
        for step in steps:
            (tmp_path / checkpoint.name(step) / "engine").mkdir(parents=True)
            with (tmp_path / checkpoint.name(step) / "engine/shard.pt").open("wb") as file:
                file.truncate(3 * 2**29)
        checkpoint.supersede(tmp_path, back)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "step-000002", "superseded-step-000003", "superseded-step-000005"
    ]  # fmt: skip
    assert "set aside as superseded-step-000005 (1.5 GiB)" in capsys.readouterr().out


def test_a_run_that_starts_anew_has_each_step_once(lab: Path, one: Gang) -> None:
    """It was lost before its first checkpoint, but after what a save writes before that."""
    settings: dict[str, object] = {
        "train__sample_every": 3, "train__samples": 1, "train__sample_tokens": 2,
        "data__validation": str(lab / "validation.jsonl"),
    }  # fmt: skip
    one.fit(config(lab, "from-zero", **settings))
    run, sampled = lab / "runs/from-zero", lab / "runs/from-zero/samples.jsonl"
    rows, said = exposures(lab, "from-zero"), sampled.read_text()
    shutil.rmtree(run / "checkpoints")
    (run / "exposure").mkdir()
    (run / "exposure.parquet").rename(run / "exposure/step-000003.parquet")
    with sampled.open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "prom')
    one.fit(config(lab, "from-zero", **settings))
    assert exposures(lab, "from-zero") == rows and sampled.read_text() == said


@pytest.mark.parametrize("other", ["base", "dataset"])
def test_another_runs_checkpoint_is_not_taken_up_on_another_base_or_other_rows(
    lab: Path, one: Gang, other: str
) -> None:
    one.fit(config(lab, f"taken-{other}", checkpoint__every=4))
    changes: dict[str, object] = {"model__path": str(tiny_model(lab / "other-base", seed=5))}
    if other == "dataset":
        rows = (lab / "rows.jsonl").read_text()
        (lab / "other.jsonl").write_text(rows.replace("answer", "reply"))
        changes = {"data__path": str(lab / "other.jsonl")}
    path = lab / f"runs/taken-{other}/checkpoints" / checkpoint.name(4)
    with pytest.raises(RefusedError, match=f"resume: .* trained with a {other} of digest"):
        one.fit(config(lab, f"takes-{other}", resume=str(path), **changes))


def test_another_runs_checkpoint_is_converted_in_the_run_that_takes_it_up(
    lab: Path, two: Gang, one: Gang
) -> None:
    settings: dict[str, object] = {"method__dropout": 0.0}
    two.fit(config(lab, "source", checkpoint__every=4, zero__stage=2, **settings))
    folder = lab / "runs/source/checkpoints"
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}
    named = str(folder / checkpoint.name(4))
    one.fit(config(lab, "taker", resume=named, zero__stage=1, batch__accumulation=4, **settings))
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))} == before
    assert [f.name for f in (lab / "runs/taker/checkpoints").iterdir()] == [checkpoint.name(STEPS)]
    assert metrics(lab, "taker") == pytest.approx(metrics(lab, "source")[4:], rel=1e-5)


@pytest.mark.parametrize(
    ("stage", "before", "after"), [(0, "fp32", "bf16"), (0, "bf16", "fp32"), (1, "fp32", "bf16")]
)
def test_another_runs_checkpoint_is_taken_up_in_another_dtype(
    lab: Path, one: Gang, stage: int, before: str, after: str
) -> None:
    source, taker = f"from-{before}-{stage}", f"to-{after}-{stage}"
    settings = {"method__dropout": 0.0, "zero__stage": stage}
    one.fit(config(lab, source, checkpoint__every=4, model__dtype=before, **settings))
    named = str(lab / "runs" / source / "checkpoints" / checkpoint.name(4))
    one.fit(config(lab, taker, resume=named, model__dtype=after, **settings))
    assert metrics(lab, taker) == pytest.approx(metrics(lab, source)[4:], rel=5e-3)
    step, options = witnessed(lab, taker)
    assert f"model.dtype={after}" in options and step == 6


@pytest.fixture(scope="module")
def forked(lab: Path, one: Gang) -> Path:
    """A run's checkpoint of step 4, for others to take up."""
    one.fit(config(lab, "forked", checkpoint__every=4))
    return lab / "runs/forked/checkpoints" / checkpoint.name(4)


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "steps": ({"steps": 3}, r"steps: 3 counts from the start .* is of step 4"),
    "seed": ({"seed": 7}, r"made with seed=0, this run has 7"),
    "tokens": ({"batch__tokens": 256}, r"made with tokens=512, this run has 256"),
    "rank": ({"method__rank": 4}, r"method\.rank: 4, but the checkpoint of .*/forked .* with 8"),
    "optimizer": ({"optim__name": "adamw8bit"}, r"optim\.name: adamw8bit, but .* with adamw;"),
    "length": ({"batch__max_length": 64}, r"other tokens of its rows.*batch\.max_length"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_checkpoint_that_a_run_cannot_take_up_does_not_use_up_its_name(
    lab: Path, one: Gang, forked: Path, key: str
) -> None:
    changes, message = REFUSED[key]
    run_id = f"refused-{key}"
    with pytest.raises(TuneloomError, match=message):
        one.fit(config(lab, run_id, resume=str(forked), **changes))
    assert not (lab / "runs" / run_id / "run.json").exists()
    one.fit(config(lab, run_id, resume=str(forked)))
    assert metrics(lab, run_id, "step") == [5, 6, 7, 8]


def test_a_checkpoint_of_before_is_what_the_record_beside_it_says(
    forked: Path, tmp_path: Path
) -> None:
    """It does not say itself what it was made with."""
    old = shutil.copytree(forked, tmp_path / "old/checkpoints" / forked.name)
    trainer = json.loads((old / checkpoint.TRAINER).read_text())
    wanted = trainer.pop("made_with")
    (old / checkpoint.TRAINER).write_text(json.dumps(trainer))
    manifest = checkpoint.unsealed((old / checkpoint.MANIFEST).read_text())
    manifest["files"][checkpoint.TRAINER] = checkpoint.facts_of(old / checkpoint.TRAINER)
    (old / checkpoint.MANIFEST).write_text(checkpoint.sealed(manifest))
    layout = {"world_size": 1, "stage": 0}
    assert checkpoint.opened(old).same_layout(**layout, dtype="bf16")  # nothing says otherwise
    shutil.copyfile(forked.parent.parent / "run.json", tmp_path / "old/run.json")
    assert checkpoint.opened(old).made_with == wanted
    assert not checkpoint.opened(old).same_layout(**layout, dtype="bf16")


def test_a_run_that_takes_up_a_checkpoint_has_its_own_batch_and_rows(
    lab: Path, one: Gang, forked: Path, tmp_path: Path
) -> None:
    """Rows that lay in memory as the other run was lost are the other's, too."""
    rescued = shutil.copytree(forked, tmp_path / forked.name)
    shutil.copyfile(lab / "runs/forked/exposure.parquet", rescued / copies.EXPOSURE)
    manifest = checkpoint.unsealed((rescued / checkpoint.MANIFEST).read_text())
    manifest["files"][copies.EXPOSURE] = checkpoint.facts_of(rescued / copies.EXPOSURE)
    (rescued / checkpoint.MANIFEST).write_text(checkpoint.sealed(manifest))
    one.fit(config(lab, "own-batch", resume=str(rescued), batch__accumulation=4, steps=6))
    facts = json.loads((lab / "runs/own-batch/run.json").read_text())
    assert facts["accumulation"] == 4 and metrics(lab, "own-batch", "step") == [5, 6]
    assert witnessed(lab, "own-batch")[0] == 6
    assert {step for step, *_ in exposures(lab, "own-batch")} == {5, 6}


def test_a_resumed_run_says_that_it_keeps_its_batch(
    lab: Path, forked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = checkpoint.opened(forked)
    for asked, said in (
        (2, ""),
        (4, "batch.accumulation: 2 is used, not 4, as forked keeps its 2"),
    ):
        settings = build(TrainConfig, config(lab, "forked", batch__accumulation=asked))
        assert Session(settings, ALONE, {})._accumulation(found) == 2
        assert said in (line := capsys.readouterr().out) and bool(line) == bool(said)


def test_a_refused_command_leaves_what_the_run_says_of_its_end(lab: Path, one: Gang) -> None:
    one.fit(config(lab, "ended-well"))
    record = (lab / "runs/ended-well/run.json").read_bytes()
    with pytest.raises(ConfigError, match="step-000099 cannot be used: there is none"):
        one.fit(config(lab, "ended-well", resume=str(lab / "runs/ended-well/step-000099")))
    assert (lab / "runs/ended-well/run.json").read_bytes() == record


def test_a_refused_restart_of_a_lost_attempt_is_the_end_of_the_run(lab: Path, one: Gang) -> None:
    """Or `tuneloom erase` would wait for a run that nobody trains."""
    one.fit(config(lab, "lost-then-refused", checkpoint__every=4))
    record = lab / "runs/lost-then-refused/run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"state": "running"}))
    damaged = lab / "runs/lost-then-refused/checkpoints/step-000099"
    with pytest.raises(ConfigError, match="there is none"):
        one.fit(config(lab, "lost-then-refused", checkpoint__every=4, resume=str(damaged)))
    assert json.loads(record.read_text())["state"] == "failed"


def test_samples_with_line_separators_in_them_outlive_a_resume(tmp_path: Path) -> None:
    rows = [{"prompt": "a\u2028b", "answer": "c\x85d", "expected": ""}]
    for step in (1, 2, 3):
        samples.append(tmp_path / samples.FILE, step, rows)
    samples.rewind(tmp_path / samples.FILE, 2)
    left = (tmp_path / samples.FILE).read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in left[:-1]] == [{"step": n, **rows[0]} for n in (1, 2)]


def test_a_run_resumed_after_its_last_step_keeps_its_loss_and_is_drilled(
    lab: Path, one: Gang
) -> None:
    settings = config(lab, "ended", train__drill=True)
    one.fit(settings)
    run, drilled = lab / "runs/ended/run.json", lab / "runs/ended/drill/drill.json"
    loss = json.loads(run.read_text())["loss"]
    for text in ('{"ok": false}', ""):  # it failed, or was cut off
        drilled.write_text(text)
        one.fit(settings)
        assert json.loads(drilled.read_text())["ok"]
    assert json.loads(run.read_text())["loss"] == loss == metrics(lab, "ended")[-1]
    before = drilled.stat().st_mtime_ns
    one.fit(settings)  # drilled already
    assert drilled.stat().st_mtime_ns == before


def test_a_second_writer_of_one_run_is_refused(lab: Path, one: Gang) -> None:
    folder = lab / "runs/locked"
    folder.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c",
         "import fcntl,sys,time; f=open(sys.argv[1],'a+'); fcntl.flock(f, fcntl.LOCK_EX);"
         "print('held', flush=True); time.sleep(60)", str(folder / "lock")],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(RefusedError, match="is being written by"):
        one.fit(config(lab, "locked"))
    holder.kill()


KILLER = """
import os, signal, sys, json
from tuneloom.config import build
from tuneloom.train import checkpoint
from tuneloom.train.config import TrainConfig
from tuneloom.train.loop import fit
rank, config = os.environ["RANK"], json.loads(sys.argv[1])
real = checkpoint._hash_share
def die(folder, world):
    if folder.name.startswith(".torn-step-000008") and rank == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(folder, world)
checkpoint._hash_share = die
fit(build(TrainConfig, config))
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_killed_inside_a_save_resumes_from_the_one_before_with_the_same_bits(
    lab: Path, two: Gang, rank: str
) -> None:
    run_id, settings = f"killed{rank}", {"zero__stage": 2, "checkpoint__every": 4, "steps": 10}
    two.fit(config(lab, f"alive{rank}", **settings))
    environment = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", KILLER, json.dumps(config(lab, run_id, **settings)), rank],
            env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.DEVNULL,
        )
        for r in range(2)
    ]  # fmt: skip
    assert ranks[int(rank)].wait(120) == -9
    assert ranks[1 - int(rank)].wait(120) != 0
    left = sorted(p.name for p in (lab / "runs" / run_id / "checkpoints").iterdir())
    assert len(left) == 2 and left[0].startswith(".torn-step-000008-")
    assert left[1] == "step-000004"
    cut_back(lab, run_id, 4)
    two.fit(config(lab, run_id, **settings))
    assert went_on(lab, run_id, 4)
    assert metrics(lab, run_id) == metrics(lab, f"alive{rank}")
    assert exposures(lab, run_id) == exposures(lab, f"alive{rank}")


CRAMPED = """
import json, os, resource, sys
from tuneloom.config import build
from tuneloom.errors import TrainingError
from tuneloom.train import checkpoint, weights
from tuneloom.train.config import TrainConfig
from tuneloom.train.loop import fit
if sys.argv[2] == "weights" and os.environ["RANK"] == "0":
    written = weights._write
    def cramped_weights(*arguments, **more):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        try:
            return written(*arguments, **more)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    weights._write = cramped_weights
if os.environ["RANK"] == sys.argv[2]:
    real = checkpoint.write_share
    def cramped(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        try:
            return real(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    checkpoint.write_share = cramped
try:
    fit(build(TrainConfig, json.loads(sys.argv[1])))
except TrainingError as error:
    print(error, file=sys.stderr, flush=True)
    os._exit(1)  # as train/__main__.py leaves
"""


def cramped(settings: dict[str, object], where: str) -> list[str]:
    """What two ranks say whose disk is full at `where`; both end."""
    environment = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", CRAMPED, json.dumps(settings), where],
            env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE,
        )
        for r in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[1].decode() for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1], said
    return said


@pytest.mark.parametrize(("stage", "rank"), [(2, "1"), (3, "0")])
def test_a_rank_that_cannot_write_ends_the_save_on_all_ranks_and_leaves_no_torn_folder(
    lab: Path, stage: int, rank: str
) -> None:
    """DeepSpeed has barriers inside a save, so raising on one rank left the other there."""
    run_id = f"cramped{stage}"
    settings = config(lab, run_id, zero__stage=stage, checkpoint__every=4, steps=4)
    said = cramped(settings, rank)
    assert all("step 4 could not be saved" in text for text in said), said
    assert list((lab / "runs" / run_id / "checkpoints").iterdir()) == []


def test_weights_that_cannot_be_written_end_the_run_on_all_ranks_and_leave_none(lab: Path) -> None:
    said = cramped(config(lab, "cramped-weights", steps=2, zero__stage=2), "weights")
    assert all("cramped-weights/weights: " in text for text in said), said
    left = sorted(path.name for path in (lab / "runs/cramped-weights").glob("*weights*"))
    assert left == []


@pytest.mark.parametrize("file", ["metrics.jsonl", ".effects.json.tmp"])
def test_what_rank_0_alone_cannot_write_ends_the_run_on_all_ranks(
    lab: Path, two: Gang, file: str
) -> None:
    run_id = f"unwritable-{file.strip('.')}"
    (lab / "runs" / run_id / file).mkdir(parents=True)
    with pytest.raises(TrainingError, match=f"{run_id}.*Is a directory"):
        two.fit(config(lab, run_id, zero__stage=2), timeout_seconds=60)


def test_a_checkpoint_that_cannot_be_converted_leaves_nothing(forked: Path, tmp_path: Path) -> None:
    found = checkpoint.opened(forked)
    said = r"could not be converted to another layout in .*: (RuntimeError|disk full)"
    with cramped_files(1000), pytest.raises(TrainingError, match=said):
        universal.convert(found, tmp_path, world_size=2, stage=2, dtype="fp32")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_cannot_be_copied_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best/model.safetensors").write_bytes(bytes(2000))
    with cramped_files(1000), pytest.raises(OSError, match="File too large"):
        weights.copy(tmp_path / "best", tmp_path / "weights")
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_an_error_says_which_steps_go_with_the_copies_in_memory(
    lab: Path, forked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class InMemory:
        step, base = 11, Path("memory")

        def forget(self) -> None:
            print("forgotten")

        def keep(self) -> bool:
            print("kept")
            return True

    session = Session(build(TrainConfig, config(lab, "forked")), ALONE, {})
    session.step, session.copies = 11, InMemory()  # type: ignore[assignment]
    session.abandon(TrainingError("train.max_bad_steps: 4 steps in a row were not finite"))
    said = capsys.readouterr().out
    assert said.startswith("forgotten\n") and "the 3 steps after step-000008 are lost" in said
    session.abandon(DiskError("checkpoint: step 11 could not be saved"))
    said = capsys.readouterr().out
    assert said.startswith("kept\ncopies: step-000011 stays in memory, in memory; with room on")


def test_resuming_does_not_validate_the_same_step_twice(lab: Path, two: Gang) -> None:
    settings: dict[str, object] = {
        "data__validation": str(lab / "validation.jsonl"), "train__validate_every": 4,
        "checkpoint__every": 4,
    }  # fmt: skip
    two.fit(config(lab, "validated", **settings))
    interrupted(lab, two, "revalidated", **{k: v for k, v in settings.items() if "every" not in k},
                train__validate_every=4)  # fmt: skip
    two.fit(config(lab, "revalidated", **settings))
    assert went_on(lab, "revalidated", 4)
    losses = metrics(lab, "revalidated", "eval/loss")
    assert losses == metrics(lab, "validated", "eval/loss") and len(losses) == 2


def test_a_run_that_another_process_has_taken_over_commits_nothing(lab: Path, two: Gang) -> None:
    """As where a network's file system has given the lock away (F17)."""
    run = lab / "runs/taken-over"

    def take() -> None:
        while not (run / "metrics.jsonl").exists():
            time.sleep(0.01)
        (run / "lock").write_text("process 7 on elsewhere\n")

    taker = threading.Thread(target=take)
    taker.start()
    with pytest.raises(TrainingError, match="another process has taken this run over"):
        two.fit(config(lab, "taken-over", steps=2000, checkpoint__every=500, zero__stage=2))
    taker.join()
    assert list((run / "checkpoints").iterdir()) == []
