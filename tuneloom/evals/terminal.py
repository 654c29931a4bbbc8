"""What `tuneloom evaluate` shows on a terminal: a bar while it scores, a small table after."""

import sys
from collections.abc import Callable

from tuneloom.evals.evaluation import Evaluation
from tuneloom.evals.score import shown


def progress(total: int) -> Callable[[int], None]:
    """A bar on a terminal, silence elsewhere."""
    if not sys.stderr.isatty():
        return lambda count: None
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    bar.start()
    task, left = bar.add_task("scoring", total=total), total

    def advance(count: int) -> None:
        nonlocal left
        left -= count
        bar.advance(task, count)
        if left <= 0:
            bar.stop()

    return advance


def summary(found: Evaluation) -> str:
    """A small table for the terminal."""
    lines = [f"{found.task}: {found.n} rows, {found.data['path']} ({found.data['split']})"]
    head = f"  {'':10}{'label accuracy':>24}{'exact match':>24}{'loss/token':>12}"
    lines.append(head)
    for name, one in (("base", found.base), ("tuned", found.tuned)):
        if one is not None:
            label, match = shown(one.label_accuracy), shown(one.exact_match)
            lines.append(f"  {name:10}{label:>24}{match:>24}{one.loss:>12.4f}")
    if found.baseline is not None:
        text = shown(found.baseline.label_accuracy)
        lines.append(f"  {'baseline':10}{text:>24}  {found.baseline.method}")
    elif found.baseline_missing:
        lines.append(f"  baseline: none, {found.baseline_missing}")
    if found.constant is not None:
        text = shown(found.constant.label_accuracy)
        lines.append(f"  {'constant':10}{text:>24}  always answering {found.constant.answer!r}")
    for metric, change in found.difference.items():
        test = "sign test" if metric == "loss" else "McNemar"
        p = "" if change.p_value is None else f", {test} p = {change.p_value:.2g}"
        lines.append(
            f"  tuned - base, {metric.replace('_', ' ')}: {change.value:+.3f} "
            f"[{change.low:+.3f}, {change.high:+.3f}]{p}"
        )
    for name, one in (("base", found.base), ("tuned", found.tuned)):
        if one is not None and one.still_thinking:
            lines.append(
                f"  {name}: {one.still_thinking} answers end inside a thought; "
                "raise max_new_tokens="
            )
    if found.unseen_answers:
        lines.append(f"  {found.unseen_answers} of the right answers are no label of training")
    if found.seen_in_training:
        lines.append(f"  {found.seen_in_training} of these rows were trained on: not held out")
    if found.seen_in_training is None:
        lines.append("  whether these rows were trained on is not known: set data.train=")
    if found.left_out:
        lines.append(f"  {found.left_out} rows of the split were not scored (over-length or limit)")
    return "\n".join(lines)
