"""Score models on the same rows: answers, losses, and what they come to, with intervals."""

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneloom.data.render import Renderer
from tuneloom.data.rows import Rows
from tuneloom.errors import DataError
from tuneloom.evals import baseline, decode
from tuneloom.evals.decode import Advance
from tuneloom.evals.evaluation import (
    Baseline,
    Constant,
    Difference,
    Example,
    Label,
    Metric,
    Proportion,
    Side,
    proportion,
)
from tuneloom.evals.intervals import mcnemar, paired_difference, paired_loss_difference
from tuneloom.evals.model import Loaded
from tuneloom.evals.tasks import (
    OPEN,
    Row,
    as_row,
    choose,
    exact,
    labels_of,
    named_label,
    said,
    still_thinking,
)

EXAMPLES = 12
SLACK_TOKENS = 2
"""Room after the longest right answer: enough to see that a wrong one goes on."""
MOST_NEW_TOKENS = 512
"""Also what a base may take whose template thinks, since the right answers hold no thoughts."""


@dataclass(frozen=True)
class Scored:
    """One row with its tokens: ids (L,) int32, target (L,) bool; the prompt where there is one."""

    row: Row
    ids: NDArray[np.int32]
    target: NDArray[np.bool_]
    prompt: list[int]


@dataclass(frozen=True)
class Sheet:
    """What all sides are scored on."""

    rows: list[Scored]
    labels: tuple[str, ...]
    left_out: int
    max_new_tokens: int

    @property
    def answered(self) -> bool:
        """True when there are answers to compare, False for plain text."""
        return bool(self.rows) and all(scored.row.answer is not None for scored in self.rows)

    @property
    def metric(self) -> Metric:
        """The figure the verdict goes by."""
        if self.labels:
            return "label_accuracy"
        return "exact_match" if self.answered else "loss"


@dataclass(frozen=True)
class Marks:
    """One model's results a row: answers, right or wrong by either measure, summed loss (N,)."""

    answers: list[str]
    exact: NDArray[np.bool_]
    label: NDArray[np.bool_]
    loss: NDArray[np.float64]
    seconds: float


def prepare(
    rows: Rows,
    train: Sequence[Row],
    renderer: Renderer,
    *,
    limit: int,
    seed: int,
    max_new_tokens: int | None,
) -> Sheet:
    """Render the rows to be scored; over-length ones are left out and counted."""
    chosen = choose(len(rows), limit=limit, seed=seed)
    kept = []
    for index in chosen:
        row = as_row(rows[index])
        example = renderer.render(row.record)
        if example.dropped:
            continue
        prompt = [] if row.answer is None else renderer.prompt_ids(row.record)
        kept.append(Scored(row, example.ids, example.target, prompt))
    if any(scored.row.answer is not None for scored in kept):
        kept = [scored for scored in kept if scored.row.answer is not None]
    if not kept:
        raise DataError(
            f"data.path: none of {len(chosen)} rows can be scored; see tuneloom inspect"
        )
    return Sheet(
        rows=kept,
        labels=labels_of(train),
        left_out=len(rows) - len(kept),
        max_new_tokens=max_new_tokens or _room(kept, renderer),
    )


def _room(rows: Sequence[Scored], renderer: Renderer) -> int:
    """Tokens for an answer: SLACK_TOKENS more than the longest right one; where the template
    thinks, MOST_NEW_TOKENS as far as the model's context holds them.
    """
    longest = max(_answer_tokens(scored) for scored in rows)
    room = min(longest + SLACK_TOKENS, MOST_NEW_TOKENS)
    if any(scored.row.record.kind == "messages" for scored in rows) and OPEN in (
        renderer.template.source
    ):
        prompt = max(len(scored.prompt) for scored in rows)
        room = max(room, min(MOST_NEW_TOKENS, (renderer.max_length or 1 << 20) - prompt))
    return room


def _answer_tokens(scored: Scored) -> int:
    """Tokens of the last answer with its end of turn; of all after the prompt where none is
    trained.
    """
    start = len(scored.prompt)
    return int(scored.target[start:].sum()) or len(scored.ids) - start


def mark(loaded: Loaded, sheet: Sheet, *, batch_tokens: int | None, advance: Advance) -> Marks:
    """Answer every row and take its loss."""
    start = time.perf_counter()
    reading = decode.read(
        loaded,
        [(scored.ids, scored.target) for scored in sheet.rows],
        prompt_lengths=[len(scored.prompt) for scored in sheet.rows],
        batch_tokens=batch_tokens,
        advance=advance,
    )
    texts: list[str] = []
    if sheet.answered:
        texts = _answers(loaded, sheet, reading, batch_tokens=batch_tokens, advance=advance)
    pairs = [
        (text, scored.row.answer or "") for text, scored in zip(texts, sheet.rows, strict=False)
    ]
    return Marks(
        answers=texts,
        exact=np.array([exact(said(text), answer) for text, answer in pairs], np.bool_),
        label=np.array([_names(said(t), answer, sheet.labels) for t, answer in pairs], np.bool_),
        loss=reading.loss,
        seconds=time.perf_counter() - start,
    )


def _answers(
    loaded: Loaded,
    sheet: Sheet,
    reading: decode.Reading,
    *,
    batch_tokens: int | None,
    advance: Advance,
) -> list[str]:
    """Greedy answers: the right one where the reading followed it, else generated."""
    texts = [scored.row.answer or "" for scored in sheet.rows]
    astray = [i for i, followed in enumerate(reading.followed) if not followed]
    found = decode.answers(
        loaded,
        [sheet.rows[i].prompt for i in astray],
        max_new_tokens=sheet.max_new_tokens,
        batch_tokens=batch_tokens,
        advance=advance,
    )
    for index, text in zip(astray, found, strict=True):
        prompt = loaded.tokenizer.decode(sheet.rows[index].prompt[-16:])
        texts[index] = OPEN + text if prompt.rstrip().endswith(OPEN) else text
    advance(len(sheet.rows) - len(astray))
    return texts


def _names(text: str, answer: str, labels: Sequence[str]) -> bool:
    """True when the text is the answer, which may be no label, or names the label that it is."""
    return exact(text, answer) or named_label(text, labels) == answer.strip()


def side(name: str, sheet: Sheet, marks: Marks) -> Side:
    """A model's figures."""
    n, tokens = len(sheet.rows), int(target_tokens(sheet).sum())
    labelled = proportion(int(marks.label.sum()), n) if sheet.labels and sheet.answered else None
    return Side(
        name=name,
        exact_match=proportion(int(marks.exact.sum()), n) if sheet.answered else None,
        label_accuracy=labelled,
        loss=float(marks.loss.sum() / tokens),
        target_tokens=tokens,
        seconds=round(marks.seconds, 3),
        still_thinking=sum(map(still_thinking, marks.answers)),
    )


def target_tokens(sheet: Sheet) -> NDArray[np.int64]:
    """Target tokens a row, (N,)."""
    return np.array([int(scored.target.sum()) for scored in sheet.rows], np.int64)


def difference(sheet: Sheet, base: Marks, tuned: Marks, *, seed: int) -> dict[Metric, Difference]:
    """tuned - base for each figure that the task has."""
    found: dict[Metric, Difference] = {}
    if sheet.labels and sheet.answered:
        found["label_accuracy"] = _of_proportions(base.label, tuned.label)
    if sheet.answered:
        found["exact_match"] = _of_proportions(base.exact, tuned.exact)
    gain = paired_loss_difference(base.loss, tuned.loss, target_tokens(sheet), seed=seed)
    rises, falls = int((tuned.loss > base.loss).sum()), int((tuned.loss < base.loss).sum())
    found["loss"] = Difference(
        value=gain.value,
        low=gain.low,
        high=gain.high,
        p_value=mcnemar(rises, falls),  # over rows that differ it is the sign test
        only_base=rises,
        only_tuned=falls,
    )
    return found


def _of_proportions(base: NDArray[np.bool_], tuned: NDArray[np.bool_]) -> Difference:
    interval = paired_difference(base, tuned)
    only_base, only_tuned = int((base & ~tuned).sum()), int((tuned & ~base).sum())
    return Difference(
        value=interval.value,
        low=interval.low,
        high=interval.high,
        p_value=mcnemar(only_base, only_tuned),
        only_base=only_base,
        only_tuned=only_tuned,
    )


def classical(sheet: Sheet, train: Sequence[Row]) -> Baseline:
    """TF-IDF and logistic regression on the training rows, scored on the same rows."""
    start = time.perf_counter()
    learnt = [(row.question, row.answer.strip()) for row in train if row.answer is not None]
    found = baseline.predict(
        [question for question, _ in learnt],
        [answer for _, answer in learnt],
        asked=[scored.row.question for scored in sheet.rows],
    )
    right = sum(
        exact(text, scored.row.answer or "") for text, scored in zip(found, sheet.rows, strict=True)
    )
    return Baseline(
        method=baseline.METHOD,
        train_rows=len(learnt),
        label_accuracy=proportion(right, len(sheet.rows)),
        seconds=round(time.perf_counter() - start, 3),
    )


def unseen_answers(sheet: Sheet) -> int:
    """Rows whose answer is none of the labels: right only letter for letter."""
    if not (sheet.labels and sheet.answered):
        return 0
    known = set(sheet.labels)
    return sum((scored.row.answer or "").strip() not in known for scored in sheet.rows)


def constant(sheet: Sheet) -> Constant | None:
    """The most frequent training label, and how many rows it answers right."""
    if not (sheet.labels and sheet.answered):
        return None
    first = sheet.labels[0]
    right = sum(exact(first, scored.row.answer or "") for scored in sheet.rows)
    return Constant(answer=first, label_accuracy=proportion(right, len(sheet.rows)))


def by_label(sheet: Sheet, base: Marks | None, tuned: Marks) -> list[Label]:
    """How many rows of each label there are, and how many each side has right."""
    if not (sheet.labels and sheet.answered):
        return []
    truth = [(scored.row.answer or "").strip() for scored in sheet.rows]
    before = _right_by_label(truth, base) if base else None
    after = _right_by_label(truth, tuned)
    return [
        Label(label=label, n=n, base=None if before is None else before[label], tuned=after[label])
        for label, n in sorted(Counter(truth).items())
    ]


def _right_by_label(truth: Sequence[str], marks: Marks) -> Counter[str]:
    return Counter(t for t, right in zip(truth, marks.label, strict=True) if right)


def examples(sheet: Sheet, base: Marks | None, tuned: Marks, *, seed: int) -> list[Example]:
    """A few rows drawn by the seed, right or wrong as they fall."""
    if not sheet.answered:
        return []
    drawn = random.Random(seed).sample(range(len(sheet.rows)), min(EXAMPLES, len(sheet.rows)))
    return [
        Example(
            id=sheet.rows[i].row.record.id,
            question=sheet.rows[i].row.question,
            answer=sheet.rows[i].row.answer or "",
            base=None if base is None else base.answers[i],
            tuned=tuned.answers[i],
        )
        for i in sorted(drawn)
    ]


def row_lines(sheet: Sheet, base: Marks | None, tuned: Marks) -> list[dict[str, Any]]:
    """One object a row: its id, the right answer, both answers, both losses."""
    lines = []
    for i, scored in enumerate(sheet.rows):
        line: dict[str, Any] = {"id": scored.row.record.id, "answer": scored.row.answer}
        for name, marks in (("base", base), ("tuned", tuned)):
            if marks is not None:
                line[name] = marks.answers[i] if marks.answers else None
                line[f"{name}_loss"] = round(float(marks.loss[i]), 6)
        lines.append(line)
    return lines


def shown(value: Proportion | None) -> str:
    """`0.853 [0.827, 0.876]`, or a dash for what does not apply."""
    return "-" if value is None else f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"
