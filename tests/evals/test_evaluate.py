"""evaluate and generate through the command, on an adapter that was trained."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.evals.conftest import train_adapter, write_config
from tuneloom.cli import main
from tuneloom.evals import evaluation, gate
from tuneloom.evals.evaluation import Evaluation
from tuneloom.train.export import export


@pytest.fixture(scope="module")
def evaluated(trained: dict[str, Path]) -> Evaluation:
    code = main(
        ["evaluate", f"run={trained['run']}", f"data.path={trained['test']}", "task=kinds",
         "device=cpu"]
    )  # fmt: skip
    assert code == 0
    return evaluation.read(trained["run"] / "evals" / "kinds.json")


def changed(found: Evaluation, **values: Any) -> Evaluation:
    return found.model_copy(update=values)


def test_base_and_tuned_are_scored_on_the_same_rows(evaluated: Evaluation) -> None:
    assert evaluated.base is not None
    assert evaluated.n == 60 and evaluated.metric == "label_accuracy"
    assert evaluated.base.target_tokens == evaluated.tuned.target_tokens
    assert evaluated.tuned.label_accuracy is not None
    assert evaluated.base.label_accuracy is not None
    assert evaluated.tuned.label_accuracy.value > 0.4 > evaluated.base.label_accuracy.value
    assert evaluated.tuned.loss < evaluated.base.loss
    assert evaluated.seen_in_training == 0


def test_each_rows_answers_stand_beside_the_summary(
    evaluated: Evaluation, trained: dict[str, Path]
) -> None:
    lines = (trained["run"] / "evals" / "kinds.rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == evaluated.n
    right = sum(row["tuned"].strip() == row["answer"] for row in rows)
    assert evaluated.tuned.exact_match is not None
    assert right == evaluated.tuned.exact_match.correct
    loss = sum(row["tuned_loss"] for row in rows) / evaluated.tuned.target_tokens
    assert loss == pytest.approx(evaluated.tuned.loss, abs=1e-4)


def test_counts_by_label_add_up(evaluated: Evaluation) -> None:
    assert evaluated.tuned.label_accuracy is not None
    assert sum(label.n for label in evaluated.labels) == evaluated.n
    tuned = sum(label.tuned for label in evaluated.labels)
    assert tuned == evaluated.tuned.label_accuracy.correct


def test_the_baseline_is_printed_or_its_absence_explained(evaluated: Evaluation) -> None:
    assert (evaluated.baseline is None) == (evaluated.baseline_missing is not None)


def test_a_gain_beyond_the_noise_passes_the_gate(evaluated: Evaluation) -> None:
    verdict = gate.judge(evaluated)
    assert verdict.passed and "label accuracy changed by +0." in verdict.reason


def test_the_gate_refuses_noise_and_rows_that_were_trained_on(evaluated: Evaluation) -> None:
    gain = evaluated.difference["label_accuracy"]
    noise = gain.model_copy(update={"value": 0.02, "low": -0.03, "high": 0.07, "p_value": 0.5})
    thin = gain.model_copy(update={"p_value": 0.25})
    for difference in (noise, thin):
        found = changed(evaluated, difference={"label_accuracy": difference})
        assert "not better by more than the noise" in gate.judge(found).reason
    seen = gate.judge(changed(evaluated, seen_in_training=3))
    assert not seen.passed and "3 of 60 rows were trained on" in seen.reason


def test_one_answer_to_everything_does_not_pass_the_gate(evaluated: Evaluation) -> None:
    assert evaluated.constant is not None and evaluated.tuned.label_accuracy is not None
    level = evaluated.tuned.label_accuracy
    constant = evaluated.constant.model_copy(update={"label_accuracy": level})
    verdict = gate.judge(changed(evaluated, constant=constant))
    assert not verdict.passed and "but always answering" in verdict.reason


def test_a_loss_passes_when_it_falls(evaluated: Evaluation) -> None:
    assert gate.judge(changed(evaluated, metric="loss")).passed
    rise = evaluated.difference["loss"].model_copy(update={"value": 0.2, "low": 0.1, "high": 0.3})
    assert not gate.judge(changed(evaluated, metric="loss", difference={"loss": rise})).passed


@pytest.mark.parametrize(("rows", "passed"), [(1, False), (5, False), (6, True)])
def test_a_loss_that_falls_on_every_row_needs_six_of_them(
    evaluated: Evaluation, trained: dict[str, Path], rows: int, passed: bool
) -> None:
    import numpy as np

    from tuneloom.data.rows import open_rows
    from tuneloom.evals import score
    from tuneloom.evals.tasks import as_row

    record = open_rows(trained["test"])[0]
    one = score.Scored(as_row(record), np.zeros(4, np.int32), np.ones(4, np.bool_), [0])
    sheet = score.Sheet([one] * rows, (), 0, 8)
    nothing = np.zeros(rows, np.bool_)
    base, tuned = (
        score.Marks([], nothing, nothing, np.full(rows, loss), 0.0) for loss in (8.0, 4.0)
    )
    difference = score.difference(sheet, base, tuned, seed=0)
    assert difference["loss"].p_value == 2 / 2**rows
    found = changed(evaluated, metric="loss", difference=difference, n=rows)
    assert gate.judge(found).passed is passed


def test_a_whole_model_is_not_compared_with_a_base_it_was_not_trained_from(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tuneloom.registry.digests import weights_digest
    from tuneloom.testing import tiny_model

    run = Path(shutil.copytree(trained["run"], tmp_path / "labels-1"))
    export(run, merge=True)
    model = run / "export" / "model"
    other = tiny_model(tmp_path / "other", seed=1)
    ask = ["evaluate", f"adapter={model}", f"data.path={trained['test']}", "limit=2", "device=cpu"]
    assert main([*ask, f"base={other}"]) == 4
    message = capsys.readouterr().err
    assert "this model was trained on" in message
    assert weights_digest(other)[:16] in message
    assert weights_digest(trained["base"])[:16] in message
    assert main([*ask, f"base={trained['base']}"]) == 0


def test_training_rows_that_are_nowhere_are_an_error_and_no_pass(
    trained: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(
        ["evaluate", f"run={trained['run']}", f"data.path={trained['test']}", "limit=2",
         "data.train=trian.jsonl", "gate=true", "device=cpu"]
    )  # fmt: skip
    assert code == 3
    assert "data.train: 'trian.jsonl' is no file and no split of" in capsys.readouterr().err


def test_an_answer_that_is_no_label_of_training_is_right_when_it_is_given(
    trained: dict[str, Path],
) -> None:
    from tuneloom.data.rows import open_rows
    from tuneloom.evals import score
    from tuneloom.evals.model import load
    from tuneloom.evals.tasks import as_row

    adapter = trained["run"] / "export" / "adapter"
    loaded = load(str(trained["base"]), adapter=str(adapter), device="cpu")
    rows = open_rows(trained["train"])
    train = [
        row for row in map(as_row, (rows[i] for i in range(len(rows)))) if row.answer != "animal"
    ]
    sheet = score.prepare(open_rows(trained["test"]), train, loaded.renderer, limit=0, seed=0,
                          max_new_tokens=None)  # fmt: skip
    marks = score.mark(loaded, sheet, batch_tokens=None, advance=lambda count: None)
    animals = [i for i, row in enumerate(sheet.rows) if row.row.answer == "animal"]
    assert sorted(sheet.labels) == ["fruit", "metal"]
    assert score.unseen_answers(sheet) == len(animals) > 5
    right = [marks.answers[i].strip() == "animal" for i in animals]
    assert marks.label[animals].tolist() == right and any(right)


def test_right_answers_that_training_never_saw_count_when_given_and_are_told(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = trained["test"].read_text().splitlines()
    row = json.loads(lines[0])
    row["messages"][1]["content"] = "plant"
    (tmp_path / "odd.jsonl").write_text("\n".join([json.dumps(row), *lines[6:10]]))
    code = main(
        ["evaluate", f"run={trained['run']}", f"data.path={tmp_path / 'odd.jsonl'}", "task=odd",
         "device=cpu"]
    )  # fmt: skip
    assert code == 0
    assert "1 of the right answers are no label of training" in capsys.readouterr().out
    (trained["run"] / "evals" / "odd.json").unlink()


def thinking(folder: Path, base: Path, *, opens: bool) -> Path:
    """A copy of a base whose template writes a thought, as Qwen3's, or opens one, as R1's."""
    copy = Path(shutil.copytree(base, folder))
    template = copy / "chat_template.jinja"
    text = template.read_text()
    if opens:
        text = text.replace("<|assistant|>\n{% endif", "<|assistant|>\n<think>\n{% endif")
    else:
        empty = "{% if m['role'] == 'assistant' and '<think>' not in m['content'] %}"
        empty += "<think>\n\n</think>\n\n{% endif %}"
        text = text.replace("{{ m['content'] }}", empty + "{{ m['content'] }}")
    assert text != template.read_text()
    template.write_text(text)
    return copy


def answered_with(source: Path, path: Path, before: str) -> Path:
    """Rows whose answers begin with `before`."""
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    for line in lines:
        line["messages"][1]["content"] = before + line["messages"][1]["content"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_answers_after_a_thought_are_scored_as_what_they_say(
    trained: dict[str, Path], tmp_path: Path
) -> None:
    base = thinking(tmp_path / "base", trained["base"], opens=False)
    train = answered_with(trained["train"], tmp_path / "t.jsonl", "<think>\nwell\n</think>\n\n")
    run = tmp_path / "thinker"
    write_config(run, base, train)
    train_adapter(base, train, run / "weights", steps=60)
    export(run)
    arguments = [f"run={run}", f"data.path={trained['test']}", "limit=20", "max_new_tokens=40"]
    assert main(["evaluate", *arguments, "task=kinds", "device=cpu"]) == 0
    found = evaluation.read(run / "evals" / "kinds.json")
    answers = [json.loads(s) for s in (run / "evals" / "kinds.rows.jsonl").read_text().splitlines()]
    assert all(row["tuned"].startswith("<think>\nwell\n</think>") for row in answers)
    right = sum(row["tuned"].endswith(f"\n{row['answer']}") for row in answers)
    assert found.tuned.exact_match is not None and found.tuned.label_accuracy is not None
    assert found.tuned.exact_match.correct == found.tuned.label_accuracy.correct == right > 0


def test_answers_cut_inside_a_thought_are_counted_and_have_room_to_think(
    trained: dict[str, Path], tmp_path: Path
) -> None:
    from tuneloom.data.rows import open_rows
    from tuneloom.evals import score
    from tuneloom.evals.model import load

    loaded = load(str(thinking(tmp_path / "base", trained["base"], opens=True)), device="cpu")
    rows = answered_with(trained["test"], tmp_path / "t.jsonl", "<think>\nwell\n</think>\n\n")

    def sheet(max_new_tokens: int | None) -> score.Sheet:
        return score.prepare(open_rows(rows), [], loaded.renderer, limit=3, seed=0,
                             max_new_tokens=max_new_tokens)  # fmt: skip

    room = loaded.context_length() - max(len(row.prompt) for row in sheet(None).rows)
    assert sheet(None).max_new_tokens == min(score.MOST_NEW_TOKENS, room)
    short = sheet(4)
    marks = score.mark(loaded, short, batch_tokens=None, advance=lambda count: None)
    assert all(text.startswith("<think>") for text in marks.answers)
    assert score.side("base", short, marks).still_thinking == 3


def test_rows_that_were_trained_on_are_told_and_fail_the_gate_with_exit_6(
    trained: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(
        ["evaluate", f"run={trained['run']}", f"data.path={trained['train']}", "limit=40",
         f"data.train={trained['train']}", "task=seen", "baseline=off", "gate=true",
         "device=cpu"]
    )  # fmt: skip
    assert code == 6
    printed = capsys.readouterr()
    assert "40 of these rows were trained on" in printed.out
    assert "gate: seen: 40 of 40 rows were trained on" in printed.err


def test_an_adapter_on_another_base_is_refused_with_both_digests(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tuneloom.registry.digests import weights_digest
    from tuneloom.testing import tiny_model

    other = tiny_model(tmp_path / "other", seed=1)
    adapter = trained["run"] / "export" / "adapter"
    for verb in (
        ["generate", f"model.path={other}", "prompt=cat"],
        ["evaluate", f"base={other}", f"data.path={trained['test']}"],
    ):
        assert main([*verb, f"adapter={adapter}", "device=cpu"]) == 4
        message = capsys.readouterr().err
        assert weights_digest(other)[:16] in message
        assert weights_digest(trained["base"])[:16] in message


def test_a_changed_template_beside_the_adapter_is_refused(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = Path(shutil.copytree(trained["run"] / "export" / "adapter", tmp_path / "adapter"))
    template = adapter / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|end|>\n", "<|end|>"))
    code = main(
        ["generate", f"model.path={trained['base']}", f"adapter={adapter}", "prompt=cat",
         "device=cpu"]
    )  # fmt: skip
    assert code == 4
    assert "trained with a template of digest" in capsys.readouterr().err


def test_an_adapter_given_as_base_is_a_configuration_error(
    trained: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = trained["run"] / "export" / "adapter"
    assert main(["generate", f"model.path={adapter}", "prompt=cat"]) == 2
    assert "is an adapter, not a base" in capsys.readouterr().err


def test_a_foreign_adapter_runs_and_says_that_its_base_is_unchecked(
    trained: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = trained["run"] / "weights"
    code = main(
        ["generate", f"model.path={trained['base']}", f"adapter={weights}", "prompt=cat",
         "max_new_tokens=2", "device=cpu"]
    )  # fmt: skip
    assert code == 0
    assert "the base is not checked" in capsys.readouterr().err


def test_records_are_answered_in_their_order(trained: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    code = main(
        ["generate", f"run={trained['run']}", f"data.path={trained['test']}", "limit=7",
         f"out={out}", "max_new_tokens=6", "device=cpu"]
    )  # fmt: skip
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    scored = trained["run"] / "evals" / "kinds.rows.jsonl"
    assert code == 0 and len(answers) == 7
    if scored.exists():
        rows = [json.loads(line) for line in scored.read_text().splitlines()][:7]
        assert [a["id"] for a in answers] == [row["id"] for row in rows]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "prompt=hi"], "set run=runs/ID"),
        (["generate", "run=nowhere", "prompt=hi"], "no config.yaml"),
        (["generate", "run=a", "data.path=b", "out=no/such/a.jsonl"], "out: expected a file in"),
        (["report", "run=a", "out=no/such/a.html"], "out: expected a file in a folder that exists"),
        (["generate", "run=a", "prompt=hi", "data.path=b"], "exactly one of the two"),
        (["evaluate", "base=b"], "run: not set"),
        (["generate", "run=a", "prompt=hi", "model.revision=abc"], "drop them"),
        (["evaluate", "run=a", "base=b"], "drop them"),
        (["evaluate", "run=a", "revision=abc"], "drop them"),
        (["evaluate", "run=a", "task=../x"], "task: expected"),
        (["evaluate", "run=a", "limt=3"], "did you mean 'limit'"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "lacking"), [("run: {id: x}\n", "model.path"), ("run: x\n", "run.id")]
)
def test_a_torn_config_of_a_run_is_named(
    tmp_path: Path, text: str, lacking: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    for verb, *more in (["evaluate"], ["generate", "prompt=hi"], ["report"]):
        assert main([verb, f"run={tmp_path}", *more]) == 2
        assert f"/config.yaml lacks {lacking}" in capsys.readouterr().err


def test_answers_go_to_a_device_as_it_stands(trained: dict[str, Path], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True)
    code = main(
        ["generate", f"run={trained['run']}", f"data.path={trained['test']}", "limit=2",
         f"out={pipe}", "max_new_tokens=2", "device=cpu"]
    )  # fmt: skip
    said, _ = reader.communicate(timeout=60)
    assert code == 0 and said.count("\n") == 2 and pipe.is_fifo()


def test_a_run_on_a_raw_file_asks_for_held_out_rows(
    trained: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", f"run={trained['run']}"]) == 2
    assert "holds out no rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("cat, dog (x): what? {a} [b] ${c} \\n 50 % = 1/2", None),
        ("two\nlines", None),
        ('"quoted, as Hydra wants it"', "quoted, as Hydra wants it"),
        ('"Yes" or "No"', None),
    ],
)
def test_a_prompt_reaches_the_model_as_it_was_typed(
    trained: dict[str, Path], typed: str, meant: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuneloom.evals import decode

    seen: list[str] = []
    real = decode.stream

    def watch(loaded: Any, prompt: Any, **options: Any) -> str:
        seen.append(loaded.tokenizer.decode(prompt))
        return real(loaded, prompt, **options)

    monkeypatch.setattr(decode, "stream", watch)
    arguments = [f"run={trained['run']}", f"prompt={typed}", "max_new_tokens=2", "device=cpu"]
    assert main(["generate", *arguments]) == 0
    assert f"<|user|>\n{meant or typed}<|end|>" in seen[0]


def test_a_prompt_may_come_from_standard_input(
    trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("fox 1: which kind?\n"))
    arguments = [f"run={trained['run']}", "prompt=-", "max_new_tokens=6", "device=cpu"]
    assert main(["generate", *arguments]) == 0
    piped = capsys.readouterr().out
    arguments[1] = "prompt=fox 1: which kind?"
    assert main(["generate", *arguments]) == 0
    assert capsys.readouterr().out == piped != "\n"


def test_an_adapter_is_scored_without_a_run_and_unknown_training_rows_are_called_so(
    trained: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(
        ["evaluate", f"base={trained['base']}", f"adapter={trained['run'] / 'weights'}",
         f"data.path={trained['test']}", "limit=8", "device=cpu"]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert code == 0
    assert "test: 8 rows" in printed and "52 rows of the split were not scored" in printed
    assert "whether these rows were trained on is not known" in printed


@pytest.mark.parametrize("part", ["tokenizer", "chat template"])
def test_two_whole_models_that_read_other_tokens_are_not_compared(
    trained: dict[str, Path], tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from tuneloom.testing import tiny_tokenizer

    other = Path(shutil.copytree(trained["base"], tmp_path / "other"))
    ask = ["evaluate", f"base={trained['base']}", f"adapter={other}", "limit=2",
           f"data.path={trained['test']}", "device=cpu"]  # fmt: skip
    assert main(ask) == 0
    if part == "tokenizer":
        tiny_tokenizer(other, ["quite other words"], vocab_size=300)
    else:
        template = other / "chat_template.jinja"
        template.write_text(template.read_text().replace("<|end|>\n", "<|end|>"))
    capsys.readouterr()
    assert main(ask) == 2
    assert f"differ in their {part}" in capsys.readouterr().err


def test_a_pretrained_model_is_scored_by_its_loss_alone(
    pretrained: tuple[Path, Path],
) -> None:
    run, texts = pretrained
    assert "base_model" not in (run / "export" / "model" / "README.md").read_text()
    code = main(["evaluate", f"run={run}", f"data.path={texts}", "device=cpu"])
    found = evaluation.read(run / "evals" / "texts.json")
    assert code == 0 and found.metric == "loss" and found.base is None
    assert found.tuned.exact_match is None and found.difference == {}
    assert 5.0 < found.tuned.loss < 7.0  # untrained: ln 384 = 5.95
    assert not gate.judge(found).passed


def test_rows_seen_are_those_of_the_runs_own_record(
    trained: dict[str, Path], tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tuneloom.data.rows import open_rows
    from tuneloom.evals.training import count_seen

    test = open_rows(trained["test"])
    ids = [test[i].id for i in range(5)]
    pq.write_table(pa.table({"record_id": [*ids[:2], *ids[:2]]}), tmp_path / "exposure.parquet")
    train = open_rows(trained["train"])
    assert count_seen(set(ids), run=tmp_path, rows=train) == 2
    assert count_seen(set(ids), run=None, rows=train) == 0
    assert count_seen(set(ids), run=None, rows=test) == 5
    assert count_seen(set(ids), run=None, rows=None) is None


def test_a_run_is_scored_before_it_is_exported_against_the_base_it_recorded(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tuneloom.registry.digests import weights_digest

    run = tmp_path / "labels-1"
    shutil.copytree(trained["run"], run, ignore=shutil.ignore_patterns("export", "evals"))
    ask = ["generate", f"run={run}", "prompt=cat 1: which kind?", "device=cpu", "max_new_tokens=6"]
    assert main(ask) == 2
    assert "has no run.json" in capsys.readouterr().err
    facts: dict[str, Any] = {
        "run_id": "labels-1",
        "base": {"digest": weights_digest(trained["base"])},
        "dataset": {"renderer": "r"},
    }
    (run / "run.json").write_text(json.dumps(facts))
    assert main(ask) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() in ("animal", "fruit", "metal") and printed.err == ""
    arguments = [f"run={run}", f"data.path={trained['test']}", "limit=6", "device=cpu"]
    assert main(["evaluate", *arguments]) == 0
    facts["base"]["digest"] = "0" * 64
    (run / "run.json").write_text(json.dumps(facts))
    assert main(["evaluate", *arguments]) == 4
    assert "0" * 16 in capsys.readouterr().err


def test_the_closing_lines_say_what_was_measured_and_end_with_the_gates_code(
    evaluated: Evaluation, trained: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from tuneloom.evals import verdict

    run = trained["run"]
    evaluation.write(run, evaluated)  # the newest of the run's evaluations
    assert verdict.main([str(run), "83.4"]) == 0
    printed = capsys.readouterr().out
    assert "in 1 min 23 s" in printed and "60 held-out rows" in printed
    assert "better than its base: label accuracy changed by +" in printed
    assert f'tuneloom generate run={run} prompt="..."' in printed
    evaluation.write(run, changed(evaluated, task="seen-again", seen_in_training=1))
    assert verdict.main([str(run)]) == 6
    (run / "evals" / "seen-again.json").unlink()
    assert verdict.main([str(run / "nowhere")]) == 2
