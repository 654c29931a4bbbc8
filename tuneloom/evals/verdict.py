"""The dozen lines that end a demo: python -m tuneloom.evals.verdict runs/ID [seconds]

What happened, where things are, what to type next. Exit 6 unless the run's newest evaluation says
that the tuned model is better than its base.
"""

import sys
from pathlib import Path

from tuneloom.errors import CONFIGURATION, DONE, GATE, TuneloomError
from tuneloom.evals import formats, gate, page
from tuneloom.evals.evaluation import Evaluation
from tuneloom.evals.report import gather
from tuneloom.evals.score import shown


def main(argv: list[str] | None = None) -> int:
    """Print the lines; the exit code is the gate's."""
    arguments = sys.argv[1:] if argv is None else argv
    if not 1 <= len(arguments) <= 2:
        print("usage: python -m tuneloom.evals.verdict runs/ID [seconds]", file=sys.stderr)
        return CONFIGURATION
    run, seconds = Path(arguments[0]), [float(value) for value in arguments[1:]]
    try:
        record = gather(run)
    except TuneloomError as error:
        print(f"verdict: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(lines(record, run, seconds=seconds[0] if seconds else None)))
    return DONE if record.lead is not None and gate.judge(record.lead).passed else GATE


def lines(record: page.Record, run: Path, *, seconds: float | None) -> list[str]:
    """What happened, where it is, what next; only what the run folder holds."""
    took = "" if seconds is None else f" in {formats.seconds(seconds)}"
    found = [f"run {run.name}: {record.facts.get('state', 'unknown')}{took}"]
    found += _trained(record)
    found += _scored(record.lead, run)
    if record.drill is not None:
        answer = "gives the same logits" if record.drill["ok"] else "gives OTHER logits"
        found.append(f"  drill     a fresh process opened the first checkpoint: it {answer}")
    found += [f"  exported  {export['folder']}" for export in record.exports]
    if (run / "report.html").exists():
        found.append(f"  report    {run}/report.html")
    found += [
        "next:",
        f'  tuneloom generate run={run} prompt="..."',
        f"  tuneloom inspect data.path={record.config['data']['path']} "
        f"model.path={record.config['model']['path']}",
        "  tuneloom train --help",
    ]
    return found


def _trained(record: page.Record) -> list[str]:
    """Steps, tokens, time in training."""
    steps = record.steps
    if not steps:
        return ["  trained   nothing was recorded"]
    tokens = "" if record.ledger is None else f", {record.ledger['total']['trained']:,} tokens"
    time = record.facts.get("seconds")
    took = "" if time is None else f" in {formats.seconds(time)}"
    losses = f"loss {steps[0]['train/loss']:.3f} to {steps[-1]['train/loss']:.3f}"
    return [f"  trained   {steps[-1]['step']:,} steps{tokens} with loss{took}: {losses}"]


def _scored(found: Evaluation | None, run: Path) -> list[str]:
    """Base, tuned and baseline, and the gate's word on them."""
    if found is None:
        return [f"  scored    nothing yet: tuneloom evaluate run={run}"]
    rows = []
    for name, side in (("base", found.base), ("tuned", found.tuned)):
        if side is not None:
            value = side.label_accuracy or side.exact_match
            text = f"loss {side.loss:.4f}" if value is None else shown(value)
            rows.append(f"  {name:<10}{text}")
    if found.baseline is not None:
        rows.append(f"  baseline  {shown(found.baseline.label_accuracy)}  {found.baseline.method}")
    judged = gate.judge(found)
    word = "better than its base" if judged.passed else "not shown to be better"
    held_out = "held-out " if found.seen_in_training == 0 else ""
    return [
        f"  scored    {found.n:,} {held_out}rows of {found.data['path']}",
        *rows,
        f"  verdict   {word}: {judged.reason}",
    ]


if __name__ == "__main__":
    sys.exit(main())
