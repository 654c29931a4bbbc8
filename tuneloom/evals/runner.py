"""`tuneloom evaluate run=runs/ID`: base against tuned on the same held-out rows, with intervals.

Or without a run: `base=FOLDER adapter=FOLDER data.path=FILE`. Writes runs/ID/evals/TASK.json, and
each row's answers beside it; `gate=true` ends with exit 6 unless tuned is better beyond the noise.
"""

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tuneloom.config import Config
from tuneloom.data.records import Format
from tuneloom.errors import DONE, ConfigError, DataError, GateError
from tuneloom.evals import baseline, evaluation, gate, score
from tuneloom.evals.evaluation import Baseline, Evaluation
from tuneloom.evals.model import Device, Dtype, Loaded, load
from tuneloom.evals.runs import open_run, weights_of
from tuneloom.evals.score import Marks, Sheet
from tuneloom.evals.tasks import Row
from tuneloom.evals.terminal import progress, summary
from tuneloom.evals.training import count_seen, drawn, open_training
from tuneloom.redact import redact, redacted
from tuneloom.registry.adapters import is_adapter
from tuneloom.registry.contract import Contract, check_base
from tuneloom.registry.digests import template_digest, tokenizer_digest

SAFE = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


class EvaluateData(Config):
    path: str | None = None
    """Dataset folder or JSONL with the rows to score; with `run`, its dataset unless set."""
    split: str = "test"
    """Split of a dataset folder that is scored."""
    train: str | None = None
    """Split or JSONL that was trained on: for labels, baseline and the check for rows seen in
    training. By default what `run` was trained on, else the split `train` of a dataset folder."""
    format: Format = "auto"


class EvaluateConfig(Config):
    """Score what a run exported, or any adapter, against its base."""

    run: str | None = None
    base: str | None = None
    """Folder or hub id of the base; with `run`, the one it was trained on."""
    revision: str | None = None
    """Commit of a hub id."""
    adapter: str | None = None
    """What is compared with the base: an adapter folder, or a whole tuned model's."""
    data: EvaluateData = EvaluateData()
    task: str | None = None
    """Name of the result; by default dataset and split."""
    limit: Annotated[int, Field(ge=0)] = 0
    """Score this many rows, drawn by the seed; 0 is all."""
    seed: Annotated[int, Field(ge=0)] = 0
    max_new_tokens: Annotated[int, Field(gt=0)] | None = None
    """By default two more than the longest right answer has; 512 where the template thinks."""
    batch_tokens: Annotated[int, Field(gt=0)] | None = None
    """Padded tokens of one batch: by default 1,024 on a CPU, 16,384 on a GPU."""
    baseline: Literal["auto", "on", "off"] = "auto"
    """TF-IDF and logistic regression: `auto` where scikit-learn is there, else says it is not."""
    gate: bool = False
    """Exit 6 unless tuned is better than base by more than the noise."""
    device: Device = "auto"
    dtype: Dtype = "auto"
    """`auto`: that of training."""

    @model_validator(mode="after")
    def says_what_to_score(self) -> "EvaluateConfig":
        alone = (self.base, self.adapter)
        if self.run is None and None in (*alone, self.data.path):
            raise ValueError("run: not set, so base=, adapter= and data.path= must all be")
        if self.run is not None and any((*alone, self.revision)):
            raise ValueError(
                "run, base, revision, adapter: a run brings its own base and export; drop them"
            )
        if self.task is not None and not set(self.task) <= SAFE:
            raise ValueError("task: expected letters, digits, dots, dashes and underscores")
        return self


CONFIG = EvaluateConfig


@dataclass(frozen=True)
class Subject:
    """What is scored against what, on which rows."""

    base: str | None
    revision: str | None
    tuned: str
    contract: Contract | None
    run: Path | None
    data: str
    train: str | None
    train_holder: str
    """Dataset that `train` is a split of, where it is no file."""


def main(config: EvaluateConfig) -> int:
    """Score, print, write, and judge when asked to."""
    subject = find(config)
    found, lines = evaluate(config, subject)
    print(redact(summary(found)))
    if subject.run is not None:
        path = evaluation.write(subject.run, found)
        rows = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in redacted(lines))
        path.with_suffix(".rows.jsonl").write_text(rows, encoding="utf-8")
        print(f"written to {path}")
    if config.gate:
        verdict = gate.judge(found)
        if not verdict.passed:
            raise GateError(f"gate: {found.task}: {verdict.reason}")
        print(f"gate: {found.task} passed: {verdict.reason}")
    return DONE


def find(config: EvaluateConfig) -> Subject:
    """Base, tuned weights and rows, from the run's own record where there is one."""
    if config.run is None:
        assert config.adapter is not None and config.data.path is not None
        return Subject(
            base=config.base,
            revision=config.revision,
            tuned=config.adapter,
            contract=None,
            run=None,
            data=config.data.path,
            train=config.data.train,
            train_holder=config.data.path,
        )
    run, trained = open_run(config.run)
    model, data = trained["model"], trained["data"]
    path = config.data.path or data["path"]
    if config.data.path is None and not Path(path).is_dir():
        raise ConfigError(
            f"data.path: {config.run} was trained on the file {path}, which holds out no rows; "
            "set data.path= to rows that were not trained on"
        )
    train, holder = config.data.train, path
    if train is None:  # what the run itself was trained on, whatever is scored
        holder = data["path"]
        if Path(holder).exists():
            train = data["split"] if Path(holder).is_dir() else holder
    left = weights_of(run, trained)
    return Subject(
        base=model["path"] if model["init"] == "pretrained" else None,
        revision=model["revision"],
        tuned=str(left.folder),
        contract=left.contract,
        run=run,
        data=path,
        train=train,
        train_holder=holder,
    )


def evaluate(config: EvaluateConfig, subject: Subject) -> tuple[Evaluation, list[dict[str, Any]]]:
    """The evaluation and its rows."""
    from tuneloom.data.rows import open_rows

    rows = open_rows(subject.data, split=config.data.split, format=config.data.format)
    trained_on = open_training(subject.train_holder, subject.train, format=config.data.format)
    train = drawn(trained_on, seed=config.seed)
    tuned, base = load_both(config, subject)
    sheet = score.prepare(
        rows,
        train,
        tuned.renderer,
        limit=config.limit,
        seed=config.seed,
        max_new_tokens=config.max_new_tokens,
    )
    after, before = mark_both(tuned, base, sheet, batch_tokens=config.batch_tokens)
    known, missing = classical(config, sheet, train)
    ids = {scored.row.record.id for scored in sheet.rows}
    tuned_name, base_name = subject.tuned, subject.base
    found = Evaluation(
        task=config.task or task_name(subject.data, config.data.split),
        n=len(sheet.rows),
        metric=sheet.metric,
        base=score.side(base_name, sheet, before) if before and base_name else None,
        tuned=score.side(tuned_name, sheet, after),
        difference=score.difference(sheet, before, after, seed=config.seed) if before else {},
        baseline=known,
        baseline_missing=missing,
        constant=score.constant(sheet),
        labels=score.by_label(sheet, before, after),
        unseen_answers=score.unseen_answers(sheet),
        seen_in_training=count_seen(ids, run=subject.run, rows=trained_on),
        left_out=sheet.left_out,
        data={"path": subject.data, "split": config.data.split, "digest": rows.digest},
        models=digests(tuned, base),
        device=f"{tuned.device.type} {platform.machine()} {tuned.dtype}",
        examples=score.examples(sheet, before, after, seed=config.seed),
    )
    return found, score.row_lines(sheet, before, after)


def load_both(config: EvaluateConfig, subject: Subject) -> tuple[Loaded, Loaded | None]:
    """The tuned model, and its base where that is another one; an adapter brings its base along."""
    options: dict[str, Any] = {"device": config.device, "dtype": config.dtype}
    if is_adapter(subject.tuned):
        assert subject.base is not None, "an adapter was trained on a pretrained base"
        loaded = load(
            subject.base,
            adapter=subject.tuned,
            revision=subject.revision,
            key="base",
            contract=subject.contract,
            **options,
        )
        return loaded, None
    tuned = load(subject.tuned, key="adapter", **options)
    if subject.base is None:
        return tuned, None
    options["dtype"] = tuned.dtype
    base = load(subject.base, revision=subject.revision, key="base", **options)
    if tuned.contract is not None:
        check_base(tuned.contract, subject.tuned, digest=base.digest, given=subject.base)
    _refuse_other_tokens(tuned.folder, base.folder)
    return tuned, base


def _refuse_other_tokens(tuned: Path, base: Path) -> None:
    """Both answer the same token ids, the tuned model's: to another vocabulary they are noise."""
    for part, digest in (("tokenizer", tokenizer_digest), ("chat template", template_digest)):
        if digest(tuned) != digest(base):
            raise ConfigError(
                f"base, adapter: {base} and {tuned} differ in their {part}, so no rows are the "
                "same to both; give the base that the model was tuned from"
            )


def mark_both(
    tuned: Loaded, base: Loaded | None, sheet: Sheet, *, batch_tokens: int | None
) -> tuple[Marks, Marks | None]:
    """Marks of tuned and of base; with an adapter both are one model, the adapter on and off."""
    models = 2 if base is not None or tuned.adapter is not None else 1
    advance = progress(models * len(sheet.rows) * (2 if sheet.answered else 1))
    after = score.mark(tuned, sheet, batch_tokens=batch_tokens, advance=advance)
    if base is not None:
        return after, score.mark(base, sheet, batch_tokens=batch_tokens, advance=advance)
    if tuned.adapter is None:
        return after, None
    with tuned.without_adapter():
        return after, score.mark(tuned, sheet, batch_tokens=batch_tokens, advance=advance)


def classical(
    config: EvaluateConfig, sheet: Sheet, train: list[Row]
) -> tuple[Baseline | None, str | None]:
    """The baseline, or why there is none."""
    if config.baseline == "off":
        return None, "baseline=off"
    if not sheet.labels or not sheet.answered:
        return None, "the answers are no labels of the training rows"
    if baseline.available():
        try:
            return score.classical(sheet, train), None
        except DataError as error:  # nothing to learn from; what was scored stays
            return None, str(error)
    if config.baseline == "on":
        raise ConfigError(f"baseline: on, but {baseline.MISSING}")
    return None, baseline.MISSING


def digests(tuned: Loaded, base: Loaded | None) -> dict[str, str]:
    """Which weights were scored: digests of base, tuned weights and renderer."""
    found = {"renderer": tuned.renderer.digest}
    if tuned.adapter is not None:
        found["base"] = tuned.digest
        if tuned.contract is not None:
            found["tuned"] = tuned.contract.weights
        return found
    found["tuned"] = tuned.digest
    if base is not None:
        found["base"] = base.digest
    return found


def task_name(data: str, split: str) -> str:
    """`debian-test` for datasets/debian@1f2e and split test; the stem of a JSONL."""
    path = Path(data)
    name = f"{path.name.split('@')[0]}-{split}" if path.is_dir() else path.stem
    return "".join(c if c in SAFE else "-" for c in name)
