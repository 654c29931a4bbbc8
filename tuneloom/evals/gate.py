"""Is the tuned model better than its base by more than the noise? The gate says, and says why."""

from dataclasses import dataclass

from tuneloom.evals.evaluation import Evaluation, Metric

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Verdict:
    passed: bool
    reason: str


def judge(evaluation: Evaluation) -> Verdict:
    """Pass when the interval of tuned - base lies wholly on the good side of 0, and p is small.

    Both are asked for, because with very few rows an interval alone is easily on one side: five
    that all agree have p = 0.0625. Where there are labels, tuned must also be better than one
    answer to everything.
    """
    if evaluation.seen_in_training:
        return Verdict(
            False,
            f"{evaluation.seen_in_training} of {evaluation.n} rows were trained on; "
            "score rows that were held out",
        )
    if evaluation.base is None:
        return Verdict(False, "there is no base to compare with")
    metric = evaluation.metric
    difference = evaluation.difference[metric]
    lower_is_better = metric == "loss"
    sure = difference.high < 0 if lower_is_better else difference.low > 0
    likely = difference.p_value is not None and difference.p_value < SIGNIFICANT
    span = f"[{difference.low:+.3f}, {difference.high:+.3f}]"
    text = f"{_name(metric)} changed by {difference.value:+.3f}, 95 % interval {span}"
    if sure and likely and not constant_suffices(evaluation):
        return Verdict(True, text)
    if constant_suffices(evaluation):
        assert evaluation.constant is not None
        floor = evaluation.constant.label_accuracy.value
        return Verdict(
            False,
            f"{text}, but always answering {evaluation.constant.answer!r} gets {floor:.3f} right: "
            "not better than that by more than the noise",
        )
    known = difference.p_value is not None  # evaluations of before have none of a loss
    p = f", p = {difference.p_value:.2g}" if known else ", p unknown (evaluate again)"
    return Verdict(False, f"{text}{p}, n = {evaluation.n}: not better by more than the noise")


def constant_suffices(evaluation: Evaluation) -> bool:
    """True when one answer to everything does as well as the tuned model."""
    tuned, constant = evaluation.tuned.label_accuracy, evaluation.constant
    if evaluation.metric != "label_accuracy" or tuned is None or constant is None:
        return False
    return tuned.low <= constant.label_accuracy.value


def _name(metric: Metric) -> str:
    return metric.replace("_", " ")
