"""What the report shows of a run: key figures, charts and tables from the files of its folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from tuneloom.evals import charts
from tuneloom.evals.charts import Part, Series
from tuneloom.evals.evaluation import Evaluation
from tuneloom.evals.formats import flat, mean, seconds, size
from tuneloom.evals.headline import headline, label_rows, scores, verdict

PHASES = (
    ("productive", "forward, backward, step", "c-1"),
    ("data", "waiting for data", "c-2"),
    ("collective", "waiting for other ranks", "c-7"),
    ("checkpoint", "checkpoints and drill", "c-3"),
    ("evaluation", "validation and samples", "c-4"),
    ("startup", "start-up", "c-5"),
    ("lost", "lost, done again after a stop", "c-6"),
)
SMOOTHED_FROM = 50
"""Steps from which a running mean is drawn over the single steps' loss."""


@dataclass(frozen=True)
class Record:
    """The files of a run folder, read; None where one is not there."""

    folder: str
    config: dict[str, Any]
    config_text: str
    facts: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[Evaluation]
    lead: Evaluation | None
    ledger: dict[str, Any] | None
    manifest: dict[str, Any] | None
    effects: dict[str, Any] | None
    drill: dict[str, Any] | None
    samples: list[dict[str, Any]]
    exports: list[dict[str, Any]]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl that are of training steps."""
        return [row for row in self.metrics if "train/loss" in row]


@dataclass(frozen=True)
class Figure:
    """A chart with its heading and the sentence that says what is in it."""

    title: str
    chart: Markup
    caption: str
    legend: tuple[tuple[str, str], ...] = ()


def view(record: Record) -> dict[str, Any]:
    """The template's variables."""
    return {
        "record": record,
        "title": record.facts.get("run_id") or record.config["run"]["id"] or record.folder,
        "state": record.facts.get("state", "unknown"),
        "verdict": verdict(record.lead, facts=record.facts, folder=record.folder),
        "headline": headline(record.lead),
        "scores": scores(record.lead),
        "key_figures": key_figures(record),
        "figures": figures(record),
        "time": time_spent(record),
        "label_rows": label_rows(record.lead),
        "ledger_rows": ledger_rows(record.ledger),
        "sample_steps": sample_steps(record.samples),
        "receipts": receipts(record.effects),
        "environment": environment(record.facts),
    }


def key_figures(record: Record) -> list[tuple[str, str, str]]:
    """Name, value, remark: what one wants to know first of a run."""
    steps, facts = record.steps, record.facts
    found: list[tuple[str, str, str]] = []
    if steps:
        found.append(("steps", f"{steps[-1]['step']:,}", _ranks(facts)))
    if facts.get("seconds"):
        found.append(("wall time", seconds(facts["seconds"]), str(facts.get("device", ""))))
    if steps:
        tokens = record.ledger["total"]["trained"] if record.ledger else None
        if tokens is not None:
            found.append(("trained tokens", f"{tokens:,}", "with loss, all epochs"))
        speed = mean([row["speed/tokens_per_second"] for row in steps[1:] or steps])
        found.append(("tokens a second", f"{speed:,.0f}", "real ones, mean over steps"))
        peak = max(row["memory/peak_gib"] for row in steps)
        found.append(("peak memory", f"{peak:.2f} GiB", "largest of rank 0"))
        mfu = [row["speed/mfu"] for row in steps if "speed/mfu" in row]
        if mfu:
            found.append(("MFU", f"{100 * mean(mfu):.1f} %", "mean over steps"))
    validation = [row["eval/loss"] for row in record.metrics if "eval/loss" in row]
    if validation:
        found.append(("validation loss", f"{validation[-1]:.4f}", f"best {min(validation):.4f}"))
    for export in record.exports:
        found.append((f"exported {export['kind']}", size(export["bytes"]), export["method"]))
    return found


def _ranks(facts: dict[str, Any]) -> str:
    count = facts.get("world_size")
    return "" if count is None else f"on {count} rank{'' if count == 1 else 's'}"


def figures(record: Record) -> list[Figure]:
    """Loss, learning rate and gradient, throughput, memory: those that were recorded."""
    steps = record.steps
    if not steps:
        return []
    found = [_loss(record), _throughput(steps), _gradient(steps), _memory(steps)]
    return [figure for figure in found if figure.chart]


def _points(rows: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(row["step"], float(row[key])) for row in rows if row.get(key) is not None]


def _loss(record: Record) -> Figure:
    train, validation = _points(record.steps, "train/loss"), _points(record.metrics, "eval/loss")
    long = len(train) >= SMOOTHED_FROM
    series = [Series("train, each step", train, "c-tuned", faint=long)]
    legend = [("train" if not long else "train, each step", "c-tuned")]
    if long:
        window = max(5, len(train) // 40)
        series.append(Series("mean", charts.smoothed(train, window=window), "c-tuned"))
        legend = [(f"train, mean of {window} steps", "c-tuned")]
    caption = f"Training loss went from {train[0][1]:.3f} to {train[-1][1]:.3f}"
    if validation:
        series.append(Series("validation", validation, "c-other", dots=True))
        legend.append(("validation", "c-other"))
        caption += f", validation loss ended at {validation[-1][1]:.3f}"
    chart = charts.line_chart(series, title="Loss", description=caption, y="loss per target token")
    return Figure("Loss", chart, f"{caption}.", tuple(legend))


def _throughput(steps: list[dict[str, Any]]) -> Figure:
    points = _points(steps, "speed/tokens_per_second")
    values = [y for _, y in points[1:] or points]
    caption = f"{mean(values):,.0f} real tokens a second on average; padding is never counted."
    chart = charts.line_chart(
        [Series("tokens a second", points, "c-1")],
        title="Throughput",
        description=caption,
        y="tokens a second",
        zero=True,
    )
    return Figure("Throughput", chart, caption)


def _gradient(steps: list[dict[str, Any]]) -> Figure:
    points = _points(steps, "train/grad_norm")
    skipped = sum(int(row.get("train/skipped", 0)) for row in steps)
    caption = (
        f"Norm before clipping; {skipped:,} of {len(steps):,} steps were refused as not finite."
    )
    chart = charts.line_chart(
        [Series("gradient norm", points, "c-4")],
        title="Gradient norm",
        description=caption,
        y="gradient norm",
        zero=True,
    )
    return Figure("Gradient norm", chart, caption)


def _memory(steps: list[dict[str, Any]]) -> Figure:
    points = _points(steps, "memory/peak_gib")
    caption = f"Highest so far on rank 0, {max(y for _, y in points):.2f} GiB at the end."
    chart = charts.line_chart(
        [Series("peak memory", points, "c-3")],
        title="Memory",
        description=caption,
        y="GiB",
        zero=True,
    )
    return Figure("Peak memory", chart, caption)


def time_spent(record: Record) -> dict[str, Any] | None:
    """Where the wall time of all attempts went: a bar and its rows, from the rows of metrics.jsonl,
    which hold every second of a run once.
    """
    totals = {
        phase: sum(float(row.get(f"time/{phase}", 0.0)) for row in record.metrics)
        for phase, _, _ in PHASES
    }
    whole = sum(totals.values())
    if not whole:
        return None
    rows = [
        {"name": name, "text": text, "css": css, "share": totals[name] / whole,
         "seconds": totals[name]}
        for name, text, css in PHASES
    ]  # fmt: skip
    parts = [Part(name, totals[name] / whole, css) for name, _, css in PHASES]
    text = ", ".join(f"{part.name} {100 * part.share:.1f} %" for part in parts)
    bar = charts.stacked_bar(parts, title="Where the time went", description=text)
    return {"bar": bar, "rows": rows, "whole": whole}


def ledger_rows(ledger: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A row a source and their total, with the reasons for what was dropped in words."""
    if ledger is None:
        return []
    total = ledger["total"]
    rows = [{"source": name, **account} for name, account in ledger["sources"].items()]
    if len(rows) > 1:
        rows.append({"source": "all sources", **total})
    kept = max(1, total["trained"] + total["masked"])
    for row in rows:
        dropped = row["dropped"]
        row["shares"] = {"rows": row["used"] / max(1, total["used"]),
                         "tokens": (row["trained"] + row["masked"]) / kept}  # fmt: skip
        row["reasons"] = ", ".join(f"{r} {n:,}" for r, n in dropped.items()) or "0"
    return rows


def sample_steps(samples: list[dict[str, Any]]) -> list[tuple[int, list[dict[str, Any]]]]:
    """Samples by step, the last first."""
    steps = sorted({int(sample["step"]) for sample in samples}, reverse=True)
    return [(step, [s for s in samples if s["step"] == step]) for step in steps]


def receipts(effects: dict[str, Any] | None) -> list[dict[str, Any]]:
    """What each option did, its evidence as short text."""
    if effects is None:
        return []
    return [
        {"option": one["option"], "acted": one["acted"], "evidence": flat(one["evidence"])}
        for one in effects["receipts"]
    ]


def environment(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What the numbers depend on: machine, versions, code."""
    found = facts.get("environment") or {}
    rows = [(name, str(found[name])) for name in ("platform", "python") if name in found]
    packages = found.get("packages") or {}
    rows += [(name, version) for name, version in packages.items() if version]
    code = facts.get("code") or {}
    return rows + [(f"code {k}", str(v)) for k, v in code.items() if v]
