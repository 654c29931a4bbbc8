"""What an evaluation found, as it stands in runs/<id>/evals/<task>.json: only what was measured."""

import json
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from tuneloom.config import Config
from tuneloom.errors import DataError
from tuneloom.evals.intervals import wilson
from tuneloom.redact import redacted

Metric = Literal["label_accuracy", "exact_match", "loss"]


class Proportion(Config):
    """Right answers out of n, with Wilson's 95 % interval."""

    value: float
    low: float
    high: float
    correct: int
    n: int


class Side(Config):
    """One model on the rows; a figure that does not apply to the task is null."""

    name: str
    exact_match: Proportion | None
    """The answer, stripped of white space at its ends, is the reference, letter for letter."""
    label_accuracy: Proportion | None
    """The label that the answer names is the right one; case and punctuation do not count."""
    loss: float
    """Summed cross-entropy over target tokens, divided by their number."""
    target_tokens: int
    seconds: float
    still_thinking: int = 0
    """Answers that max_new_tokens cut inside a thought; they count as wrong."""


class Difference(Config):
    """tuned - base on the same rows, with a 95 % interval."""

    value: float
    low: float
    high: float
    p_value: float | None
    """McNemar's exact test; of a loss the sign test, which is the same over rows that differ."""
    only_base: int | None
    """Rows that base alone has right, or on which its loss is the smaller one."""
    only_tuned: int | None


class Baseline(Config):
    """What a classifier that knows nothing of language reaches on the same rows."""

    method: str
    train_rows: int
    label_accuracy: Proportion
    seconds: float


class Constant(Config):
    """What always giving the training rows' most frequent answer gets right: the floor."""

    answer: str
    label_accuracy: Proportion


class Label(Config):
    label: str
    n: int
    base: int | None
    tuned: int


class Example(Config):
    id: str
    question: str
    answer: str
    base: str | None
    tuned: str


class Evaluation(Config):
    """The whole file. `base` is null where there is none: a model trained from random weights."""

    task: str
    n: int
    metric: Metric
    """The figure that the verdict and the gate go by: the first of those that the task has."""
    base: Side | None
    tuned: Side
    difference: dict[Metric, Difference]
    baseline: Baseline | None
    baseline_missing: str | None
    """Why there is no baseline, where there is none."""
    constant: Constant | None
    labels: list[Label]
    unseen_answers: int = 0
    """Scored rows whose answer is none of the training rows' labels."""
    seen_in_training: int | None
    """Scored rows whose id is among those trained on; more than 0 voids the figures, null is
    unknown."""
    left_out: int
    """Rows of the split that were not scored: over-length, or beyond `limit`."""
    data: dict[str, str]
    models: dict[str, str]
    device: str
    examples: list[Example]


def proportion(correct: int, n: int) -> Proportion:
    """A count out of n with its interval."""
    interval = wilson(correct, n)
    return Proportion(
        value=interval.value, low=interval.low, high=interval.high, correct=correct, n=n
    )


def write(run: Path, evaluation: Evaluation) -> Path:
    """Write evals/<task>.json into a run folder, in one move, without the secrets of its rows."""
    path = run / "evals" / f"{evaluation.task}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    content = redacted(evaluation.model_dump())
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    partial.replace(path)
    return path


def read(path: Path) -> Evaluation:
    """An evaluation file; raises DataError for what is none."""
    try:
        return Evaluation.model_validate(json.loads(path.read_text("utf-8")))
    except (ValueError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise DataError(f"{path}: not an evaluation ({first}); evaluate again") from error
