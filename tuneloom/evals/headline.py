"""The top of the report: is the tuned model better than its base, and by how much?"""

from typing import Any

from markupsafe import Markup

from tuneloom.evals import charts, gate
from tuneloom.evals.charts import Range
from tuneloom.evals.evaluation import Difference, Evaluation, Metric, Proportion, Side

NAMES: dict[Metric, str] = {
    "label_accuracy": "label accuracy",
    "exact_match": "exact match",
    "loss": "loss per target token",
}


def verdict(found: Evaluation | None, *, facts: dict[str, Any], folder: str) -> dict[str, str]:
    """Tone and sentence that lead the page."""
    if facts.get("state") == "failed":
        reason = " ".join(facts.get("error") or ["no reason was recorded"])
        return {"tone": "bad", "word": "Run failed", "sentence": reason}
    if found is None:
        return {
            "tone": "none",
            "word": "Not evaluated",
            "sentence": f"No rows were scored yet: tuneloom evaluate run={folder}",
        }
    judged = gate.judge(found)
    if judged.passed:
        return {"tone": "good", "word": "Better than its base", "sentence": _gain(found)}
    if found.base is None:
        return {"tone": "none", "word": "Nothing to compare with", "sentence": judged.reason}
    return {"tone": "bad", "word": "Not shown to be better", "sentence": judged.reason}


def _gain(found: Evaluation) -> str:
    """The difference in words."""
    difference = found.difference[found.metric]
    if found.metric == "loss":
        return (
            f"Loss per target token fell by {-difference.value:.3f} "
            f"(95 % interval {-difference.high:.3f} to {-difference.low:.3f})."
        )
    return (
        f"{100 * difference.value:+.1f} points of {NAMES[found.metric]} on the same rows "
        f"(95 % interval {100 * difference.low:+.1f} to {100 * difference.high:+.1f})."
    )


def headline(found: Evaluation | None) -> dict[str, Any] | None:
    """The two large numbers with their intervals, the chart, and what the baseline says."""
    if found is None:
        return None
    sides = [("base", found.base), ("tuned", found.tuned)]
    numbers = [{"name": name, **_number(found.metric, one)} for name, one in sides if one]
    return {
        "numbers": numbers,
        "metric": NAMES[found.metric],
        "chart": _interval_chart(found),
        "baseline": _baseline_sentence(found),
    }


def _number(metric: Metric, one: Side) -> dict[str, str]:
    """A large number and its interval."""
    if metric == "loss":
        return {"value": f"{one.loss:.3f}", "interval": ""}
    value = one.label_accuracy if metric == "label_accuracy" else one.exact_match
    assert value is not None, metric
    return _proportion(value)


def _proportion(value: Proportion) -> dict[str, str]:
    return {
        "value": f"{100 * value.value:.1f} %",
        "interval": f"{100 * value.low:.1f} to {100 * value.high:.1f} %",
    }


def _interval_chart(found: Evaluation) -> Markup:
    """Base, tuned and baseline on one scale; nothing for a loss."""
    ranges = []
    for name, one, css in (("base", found.base, "c-base"), ("tuned", found.tuned, "c-tuned")):
        value = one and (
            one.label_accuracy if found.metric == "label_accuracy" else one.exact_match
        )
        if value:
            ranges.append(Range(name, value.value, value.low, value.high, css))
    if found.baseline is not None and found.metric == "label_accuracy":
        value = found.baseline.label_accuracy
        ranges.append(Range("baseline", value.value, value.low, value.high, "c-other"))
    if found.constant is not None and found.metric == "label_accuracy":
        value = found.constant.label_accuracy
        ranges.append(Range("one answer", value.value, value.low, value.high, "c-5"))
    if not ranges or found.metric == "loss":
        return Markup()
    text = ", ".join(f"{r.name} {100 * r.value:.1f} %" for r in ranges)
    return charts.interval_chart(ranges, title=NAMES[found.metric].capitalize(), description=text)


def _baseline_sentence(found: Evaluation) -> str:
    """How the tuned model stands to a classifier that costs seconds; said either way."""
    if found.baseline is None or found.tuned.label_accuracy is None:
        return f"No baseline: {found.baseline_missing}." if found.baseline_missing else ""
    baseline, tuned = found.baseline.label_accuracy, found.tuned.label_accuracy
    text = (
        f"Baseline: {found.baseline.method}, {found.baseline.seconds:.0f} s on the same "
        f"{found.baseline.train_rows:,} training rows."
    )
    if baseline.low > tuned.high:
        return f"{text} It does better than the tuned model: for this task alone, use it."
    if tuned.low > baseline.high:
        return f"{text} The tuned model does better."
    return f"{text} The two intervals overlap."


def scores(found: Evaluation | None) -> list[dict[str, str]]:
    """The table of every figure, side by side."""
    if found is None:
        return []
    rows = []
    for metric in NAMES:
        if metric == "loss":
            base = None if found.base is None else f"{found.base.loss:.4f}"
            tuned = f"{found.tuned.loss:.4f}"
        else:
            value = getattr(found.tuned, metric)
            if value is None:
                continue
            tuned = _with_interval(value)
            base = None if found.base is None else _with_interval(getattr(found.base, metric))
        difference = found.difference.get(metric)
        rows.append(
            {
                "metric": NAMES[metric],
                "base": base or "none",
                "tuned": tuned,
                "difference": _difference(metric, difference) if difference else "none",
                "p": ""
                if difference is None or difference.p_value is None
                else f"{difference.p_value:.2g}",
            }
        )
    return rows


def _with_interval(value: Proportion) -> str:
    return f"{100 * value.value:.1f} % ({100 * value.low:.1f} to {100 * value.high:.1f})"


def _difference(metric: Metric, one: Difference) -> str:
    factor, digits = (1, 3) if metric == "loss" else (100, 1)
    value, low, high = (f"{factor * v:+.{digits}f}" for v in (one.value, one.low, one.high))
    return f"{value} ({low} to {high})"


def label_rows(found: Evaluation | None) -> list[dict[str, Any]]:
    """Recall of each label, the weakest of the tuned model first."""
    if found is None:
        return []
    rows = [
        {
            "label": one.label,
            "n": one.n,
            "base": None if one.base is None else 100 * one.base / one.n,
            "tuned": 100 * one.tuned / one.n,
        }
        for one in found.labels
    ]
    return sorted(rows, key=lambda row: (row["tuned"], row["label"]))
