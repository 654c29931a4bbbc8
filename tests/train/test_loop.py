"""The loop refuses what is not finite, stops when told to, loses no step, accounts for its time."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tuneloom.config import build
from tuneloom.data.ingest import ingest
from tuneloom.data.recipe import IngestConfig
from tuneloom.errors import ConfigError, DataError, TrainingError
from tuneloom.testing import Gang, chat_rows, cut_back, metrics, small_config, tiny_model
from tuneloom.train import distributed
from tuneloom.train.config import TrainConfig
from tuneloom.train.distributed import ALONE
from tuneloom.train.evaluation import Validation
from tuneloom.train.loop import fit
from tuneloom.train.metrics import Metrics
from tuneloom.train.session import Session

ROOT = Path(__file__).parent.parent.parent


def run_json(lab: Path, run_id: str) -> dict[str, object]:
    facts: dict[str, object] = json.loads((lab / "runs" / run_id / "run.json").read_text())
    return facts


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lab whose base has NaN in the embedding of one token that one row holds."""
    lab = tmp_path_factory.mktemp("poisoned")
    tiny_model(lab / "base", tied=False)
    chat_rows(lab / "rows.jsonl", 40)
    row = [{"role": "user", "content": "\x7f"}, {"role": "assistant", "content": "answer 1"}]
    with (lab / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"messages": row}) + "\n")
    from transformers import AutoTokenizer

    token = AutoTokenizer.from_pretrained(lab / "base")("\x7f", add_special_tokens=False).input_ids
    state = load_file(lab / "base" / "model.safetensors")
    state["model.embed_tokens.weight"][token[0]] = math.nan
    save_file(state, lab / "base" / "model.safetensors", metadata={"format": "pt"})
    return lab


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_bad_step_is_refused_on_all_ranks_and_the_weights_stay_finite(
    poisoned: Path, two: Gang, stage: int
) -> None:
    run_id = f"nan{stage}"
    two.fit(
        small_config(
            poisoned, run_id, epochs=1.0, steps=None, zero__stage=stage, train__probe=False,
            batch__packing=False, batch__sequences=2,
        )
    )  # fmt: skip
    losses, skipped = metrics(poisoned, run_id), metrics(poisoned, run_id, "train/skipped")
    assert sum(skipped) == 1
    assert [math.isfinite(loss) for loss in losses] == [not skip for skip in skipped]
    adapter = load_file(poisoned / "runs" / run_id / "weights" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in adapter.values())


def test_a_run_of_bad_steps_ends_the_run_and_names_the_key(lab: Path, one: Gang) -> None:
    with pytest.raises(TrainingError, match=r"train\.max_bad_steps: 3 steps in a row"):
        one.fit(small_config(lab, "diverged", steps=40, optim__lr=1e30, train__max_bad_steps=2))
    assert run_json(lab, "diverged")["state"] == "failed"


def test_epochs_end_the_run_with_every_row_seen_exactly_once(lab: Path, two: Gang) -> None:
    two.fit(small_config(lab, "epoch", epochs=1.0, steps=None, zero__stage=2))
    table = pq.read_table(lab / "runs/epoch/exposure.parquet")
    assert table.num_rows == 48
    assert len(set(table["record_id"].to_pylist())) == 48
    assert table["target_tokens"].to_numpy().sum() == sum(
        metrics(lab, "epoch", "train/target_tokens")
    )
    assert set(table["rank"].to_pylist()) == {0, 1}


def test_an_epoch_of_one_step_has_its_receipts(lab: Path, one: Gang) -> None:
    one.fit(small_config(lab, "brief", epochs=0.1, steps=None))
    assert metrics(lab, "brief", "step") == [1]
    assert json.loads((lab / "runs/brief/effects.json").read_text())["step"] == 1


def test_the_last_step_is_saved_whatever_the_interval(lab: Path, one: Gang) -> None:
    one.fit(small_config(lab, "last", steps=5, checkpoint__every=3, checkpoint__keep=2))
    saved = sorted(p.name for p in (lab / "runs/last/checkpoints").iterdir())
    assert saved == ["step-000003", "step-000005"]
    assert (lab / "runs/last/latest").read_text() == "step-000005\n"


def test_patience_stops_a_run_whose_validation_gets_no_better(lab: Path, one: Gang) -> None:
    settings = small_config(
        lab, "patient", steps=30, optim__lr=0.5, train__validate_every=1, train__patience=1,
        checkpoint__every=1, checkpoint__keep=99,
        data__validation=str(lab / "validation.jsonl"),
    )  # fmt: skip
    one.fit(settings)
    ended = len(metrics(lab, "patient"))
    assert ended < 30 and run_json(lab, "patient")["state"] == "done"
    best = run_json(lab, "patient")["weights_step"]  # and not those that validated worse since
    losses = metrics(lab, "patient", "eval/loss")
    assert best == losses.index(min(losses)) + 1 == ended - 1
    kept = lab / f"runs/patient/best-step-{best:06d}"
    adapter = (lab / "runs/patient/weights/adapter_model.safetensors").read_bytes()
    assert (kept / "adapter_model.safetensors").read_bytes() == adapter
    one.fit(settings)  # it has ended, and stays so
    assert len(metrics(lab, "patient")) == ended == run_json(lab, "patient")["steps"]
    again = lab / "runs/patient/weights/adapter_model.safetensors"
    assert run_json(lab, "patient")["weights_step"] == best and again.read_bytes() == adapter
    shutil.rmtree(kept)
    one.fit(settings)  # also without its second copy
    assert run_json(lab, "patient")["weights_step"] == best and again.read_bytes() == adapter
    newest = sorted((lab / "runs/patient/checkpoints").glob("step-*"))[-1]
    one.fit(settings | {"run": {"root": f"{lab}/runs", "id": "impatient"}, "resume": str(newest)})
    # Neither the end of another run nor its best loss is this one's.
    assert run_json(lab, "impatient")["steps"] >= ended + 2
    cut_back(lab, "patient", best)  # to before its end: the best weights are not there any more
    one.fit(settings)
    assert run_json(lab, "patient")["weights_step"] > best


def test_patience_that_is_set_at_a_resume_counts_from_there(lab: Path, one: Gang) -> None:
    settings = small_config(
        lab, "late-patience", steps=6, optim__lr=0.5, train__validate_every=1, checkpoint__every=1,
        checkpoint__keep=99, data__validation=str(lab / "validation.jsonl"),
    )  # fmt: skip
    patient = settings | {"train": {**dict(settings["train"]), "patience": 2}}  # type: ignore[call-overload]
    one.fit(settings)
    assert len(metrics(lab, "late-patience")) == 6
    one.fit(patient)  # it has ended, with the weights of its last step
    assert run_json(lab, "late-patience")["weights_step"] == 6
    cut_back(lab, "late-patience", 3)
    one.fit(patient)
    assert len(metrics(lab, "late-patience")) >= 5
    best = run_json(lab, "late-patience")["weights_step"]
    losses = metrics(lab, "late-patience", "eval/loss")[3:]
    assert best == losses.index(min(losses)) + 4


def test_validation_loss_is_that_of_the_rows_whatever_the_ranks(
    lab: Path, one: Gang, two: Gang
) -> None:
    settings = {
        "steps": 2,
        "batch__packing": False,
        "data__validation": str(lab / "validation.jsonl"),
    }
    one.fit(small_config(lab, "eval1", batch__sequences=8, **settings))
    two.fit(small_config(lab, "eval2", batch__sequences=4, zero__stage=3, **settings))
    assert metrics(lab, "eval2", "eval/loss") == pytest.approx(
        metrics(lab, "eval1", "eval/loss"), rel=1e-5
    )


class Leaking(nn.Module):
    """A stand-in for an engine whose model lets every position see all before it, packed or not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(512, 512, generator=torch.Generator().manual_seed(0)))
        self.rows: list[int] = []

    def get_output_embeddings(self) -> nn.Module:
        return nn.Identity()

    def forward(
        self, input_ids: torch.Tensor, logits_to_keep: Any = slice(None), **_: object
    ) -> object:
        self.rows.append(len(input_ids))

        class Output:
            logits = self.weight[input_ids].cumsum(1)[:, logits_to_keep]

        return Output()


def test_a_run_without_packs_validates_without_packs(lab: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(lab / "base")
    losses, rows = [], []
    world = distributed.start()
    try:
        for sequences in (1, 3):
            settings = {"batch__packing": False, "batch__sequences": sequences}
            settings |= {"data__validation": str(lab / "validation.jsonl")}
            config = build(TrainConfig, small_config(lab, "padded-eval", **settings))
            validation, engine = Validation(config, tokenizer, world), Leaking()
            losses.append(validation.loss(engine))
            rows.append(engine.rows)
            validation.close()
    finally:
        distributed.stop()
    assert rows == [[1] * 8, [3, 3, 2]]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("before", [None, "eth7"])
def test_a_run_in_this_process_leaves_no_interface_to_jobs_that_start_after_it(
    lab: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    """`lo` went to ranks on other machines, which then met nobody."""
    for name in distributed.ONE_MACHINE:
        if before is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, before)
    seen = []
    start = Validation.__init__

    def look(*arguments: Any) -> None:
        seen.append({name: os.environ[name] for name in distributed.ONE_MACHINE})
        start(*arguments)

    monkeypatch.setattr(Validation, "__init__", look)
    fit(build(TrainConfig, small_config(lab, f"after-{before or 0}", steps=1)))
    assert seen == [distributed.ONE_MACHINE]
    assert [os.environ.get(name) for name in distributed.ONE_MACHINE] == [before] * 2


OPENED = """
import json, sys
from transformers import AutoTokenizer
from tuneloom.config import build
from tuneloom.train.config import TrainConfig
from tuneloom.train.distributed import start
from tuneloom.train.evaluation import Validation
world = start()
for config in map(json.loads, sys.argv[1:]):
    tokenizer = AutoTokenizer.from_pretrained(config["model"]["path"])
    print(Validation(build(TrainConfig, config), tokenizer, world).rows.where(0))
"""


def test_a_split_of_the_dataset_goes_before_a_folder_of_its_name(lab: Path, tmp_path: Path) -> None:
    """Where the dataset has no such split, the folder is taken."""
    split, source = {"train": 0, "validation": 1, "test": 0}, str(lab / "rows.jsonl")
    mapping = {"data": {"name": "d", "split": split}, "source": source, "root": str(tmp_path)}
    dataset = ingest(build(IngestConfig, mapping))
    mapping["data"] = {"name": "other", "split": split | {"train": 1, "validation": 0}}
    other = ingest(build(IngestConfig, mapping))
    (tmp_path / "validation").symlink_to(other)
    configs = [
        small_config(lab, "split", data__path=str(dataset), data__validation=name)
        for name in ("validation", "other")
    ]
    said = subprocess.run(
        [sys.executable, "-c", OPENED, *map(json.dumps, configs)], cwd=tmp_path, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    ).stdout.splitlines()  # fmt: skip
    assert [Path(line).parent for line in said] == [dataset, Path("other")]


def test_samples_are_written_with_what_was_expected(lab: Path, two: Gang) -> None:
    two.fit(
        small_config(
            lab, "sampled", steps=2, zero__stage=3, train__samples=2, train__sample_tokens=4,
            data__validation=str(lab / "validation.jsonl"),
        )
    )  # fmt: skip
    rows = [json.loads(r) for r in (lab / "runs/sampled/samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 2]
    assert all(row["expected"].startswith("answer") and row["prompt"] for row in rows)


def validating(lab: Path, run_id: str, *rows: dict[str, Any]) -> dict[str, object]:
    """A short run that validates on these rows."""
    file = lab / f"{run_id}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return small_config(
        lab,
        run_id,
        steps=2,
        train__samples=9,
        train__sample_tokens=2,
        data__validation=str(file),
        batch__max_lost_answer_tokens=1.0,
    )


def turns(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]}


def test_validation_rows_that_are_all_too_long_are_refused(lab: Path, one: Gang) -> None:
    with pytest.raises(DataError, match=r"all of the first 1 rows .* longer than batch"):
        one.fit(validating(lab, "all-long", turns("question", "answer 9 " * 99)))


def test_a_validation_loss_that_is_not_finite_is_said_and_does_not_count(
    lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class NotFinite:
        rows, loss = (0,), staticmethod(lambda engine: math.nan)

    session = Session(
        build(
            TrainConfig,
            small_config(
                lab,
                "nan",
                train__patience=1,
                train__validate_every=1,
                data__validation=str(lab / "validation.jsonl"),
            ),
        ),
        ALONE,
        {},
    )
    session.engine, session.validation = None, NotFinite()  # type: ignore[assignment]
    session.step, session.metrics = 1, Metrics(lab, None)  # type: ignore[arg-type]
    session.validate()
    assert "validation loss is nan: not recorded" in capsys.readouterr().out
    assert not session.ended_early and not (lab / "metrics.jsonl").exists()


def test_a_validation_file_of_another_kind_is_refused(lab: Path, one: Gang) -> None:
    settings = small_config(lab, "not-jsonl", data__validation=str(lab / "base/config.json"))
    with pytest.raises(ConfigError, match=r"data\.validation: expected a \.jsonl .*config\.json;"):
        one.fit(settings)


def test_a_chat_that_ends_with_a_question_is_answered_and_one_too_long_is_not(
    lab: Path, one: Gang
) -> None:
    rows = turns("question 1", "answer 1", "question 2"), turns("question 3", "answer 9 " * 99)
    one.fit(validating(lab, "open-ended", *rows))
    lines = (lab / "runs/open-ended/samples.jsonl").read_text().splitlines()
    (row,) = map(json.loads, lines)
    assert row["expected"] is None and "question 2" in row["prompt"]


def test_a_validation_row_that_cannot_be_rendered_is_refused_before_the_first_step(
    lab: Path, one: Gang
) -> None:
    with pytest.raises(DataError, match=r"bad-row\.jsonl:2: no token to train on"):
        one.fit(validating(lab, "bad-row", turns("question", "answer"), turns("question")))
    assert not (lab / "runs/bad-row/metrics.jsonl").exists()


def test_a_dataset_whose_validation_split_has_no_rows_trains_without(
    lab: Path, one: Gang, tmp_path: Path
) -> None:
    data = {"name": "whole", "split": {"train": 1, "validation": 0, "test": 0}}
    mapping = {"data": data, "source": str(lab / "rows.jsonl"), "root": str(tmp_path)}
    dataset = str(ingest(build(IngestConfig, mapping)))
    settings = {"data__path": dataset, "data__validation": "validation", "steps": 2}
    one.fit(small_config(lab, "unvalidated", **settings))
    assert metrics(lab, "unvalidated", "eval/loss") == [] and len(metrics(lab, "unvalidated")) == 2
    with pytest.raises(ConfigError, match=r"data\.validation: .* has no rows in such a split"):
        one.fit(small_config(lab, "unvalidatable", train__validate_every=1, **settings))


def test_time_is_accounted_for_to_the_last_second(lab: Path, one: Gang) -> None:
    one.fit(small_config(lab, "timed", steps=4, checkpoint__every=2))
    shares = run_json(lab, "timed")["time"]
    assert isinstance(shares, dict)
    assert sum(shares.values()) == pytest.approx(1.0, abs=0.005)
    assert shares["checkpoint"] > 0 and shares["productive"] > 0


def test_a_packed_run_reports_no_padding_and_a_padded_one_does(lab: Path, one: Gang) -> None:
    one.fit(small_config(lab, "packed", steps=3))
    one.fit(small_config(lab, "padded", steps=3, batch__packing=False, batch__sequences=8))
    assert metrics(lab, "packed", "speed/padding") == [0.0] * 3
    assert min(metrics(lab, "padded", "speed/padding")) > 0.05
