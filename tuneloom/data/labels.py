"""Labels that the words of their own row speak against: confident learning, by cleanlab.

A classifier guesses each row's label without having seen the row; cleanlab finds the rows whose
given label the guesses contradict, class by class. Needs cleanlab, imported nowhere else:
pip install 'tuneloom[labels]'.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from tuneloom.config import Config
from tuneloom.data.linear import held_out_probabilities
from tuneloom.errors import ConfigError, DataError

FOLDS = 5
"""A label needs as many rows to be judged at all."""
MOST_ROWS = 100_000
"""Labelled rows judged together."""


class LabelIssuesConfig(Config):
    action: Literal["off", "list", "quarantine"] = "off"
    """`list` counts rows whose label looks wrong, `quarantine` sets them aside for a person."""
    max_odds: Annotated[float, Field(gt=0.0, le=1.0)] = 0.05
    """A row is suspected only if its label has less than this part of the likeliest's chance. Of
    5 % flipped labels in examples/debian 0.05 finds 86 to 90 %, and 79 to 80 % of what it suspects
    was flipped; 0.02 finds 77 to 83 % with 85 to 88 % (benchmarks/results/labels.json)."""


@dataclass(frozen=True)
class Issues:
    """`rows`: the suspected, rising; `notes`: what each was given, and what its words say;
    `checked`: rows that have a label of five rows or more."""

    rows: np.ndarray
    notes: list[str]
    checked: int


def refuse_too_many(rows: int) -> None:
    """Raise DataError where a model of all rows would not fit beside the rest of an ingest."""
    if rows > MOST_ROWS:
        raise DataError(
            f"data.label_issues.action: {rows:,} labelled rows, at most {MOST_ROWS:,} are judged "
            "together, as their features lie in memory; set it to off, or ingest sources apart"
        )


def find_issues(
    rows: np.ndarray,
    labels: np.ndarray,
    names: list[str],
    inputs: Callable[[np.ndarray], list[str]],
    config: LabelIssuesConfig,
) -> Issues:
    """Suspected rows among those with a label.

    rows: (N,) int64, rising; labels: (N,) int32, index into `names`; `inputs` reads their texts.
    """
    counted = np.bincount(labels, minlength=len(names))
    judged = np.flatnonzero(counted >= FOLDS)
    if len(judged) < 2:
        raise DataError(
            f"data.label_issues.action: {len(judged)} labels have {FOLDS} rows or more, and two "
            "are needed; set data.label, or data.label_issues.action=off"
        )
    chosen = np.isin(labels, judged)
    rows, labels = rows[chosen], labels[chosen]
    classes = np.searchsorted(judged, labels)
    chances = held_out_probabilities(inputs(rows), classes, folds=FOLDS).round(6)
    given = chances[np.arange(len(rows)), classes]
    wrong = np.flatnonzero(
        _contradicted(classes, chances) & (given < config.max_odds * chances.max(axis=1))
    )
    likely = [names[judged[best]] for best in chances[wrong].argmax(axis=1)]
    notes = [
        f"given {names[label]} ({given[i]:.2f}), likely {best} ({chances[i].max():.2f})"
        for i, label, best in zip(wrong, labels[wrong], likely, strict=True)
    ]
    return Issues(rows[wrong], notes, len(rows))


def _contradicted(classes: np.ndarray, chances: np.ndarray) -> Any:
    """(N,) bool: of each class, as many of its least likely rows as are estimated to be wrong."""
    try:
        from cleanlab.filter import find_label_issues
    except ImportError:
        raise ConfigError(
            "data.label_issues: cleanlab is not installed; pip install 'tuneloom[labels]'"
        ) from None
    return find_label_issues(classes, chances, filter_by="prune_by_class", n_jobs=1)
