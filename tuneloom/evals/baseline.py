"""The honest baseline: TF-IDF and logistic regression on the same training rows, a few seconds.

A fine-tuned language model that does not reach it is the wrong tool for the task, and the report
says so. Needs scikit-learn: pip install 'tuneloom[baseline]'.
"""

from collections.abc import Sequence
from importlib.util import find_spec

from tuneloom.data import linear

METHOD = "TF-IDF (words 1-2, characters 2-4) + logistic regression"
MISSING = "scikit-learn is not installed; pip install 'tuneloom[baseline]'"


def available() -> bool:
    """True when scikit-learn can be imported."""
    return find_spec("sklearn") is not None


def predict(questions: Sequence[str], answers: Sequence[str], *, asked: Sequence[str]) -> list[str]:
    """Train on questions and answers, and answer what is asked."""
    return linear.answers(questions, answers, asked=asked)
