"""The learning rate, against numbers worked out by hand."""

import pytest

from tuneloom.train.config import OptimConfig
from tuneloom.train.schedule import lr_at

WARM = {"warmup_steps": 4, "min_lr_ratio": 0.1}


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.775, 0.55, 0.145, 0.1]),
        ("cosine", [1.0, 0.868198, 0.55, 0.105540, 0.1]),
        ("wsd", [1.0, 1.0, 1.0, 0.325, 0.1]),
    ],
)
def test_each_schedule_falls_as_its_formula_says(schedule: str, factors: list[float]) -> None:
    """At 0, 25, 50, 95 and 100 % of the run, after the warm-up; wsd falls over the last 20 %."""
    optim = OptimConfig.model_validate(WARM | {"schedule": schedule, "decay_fraction": 0.2})
    found = [lr_at(100, progress, optim) for progress in (0.0, 0.25, 0.5, 0.95, 1.0)]
    assert found == pytest.approx(factors, abs=1e-6)


def test_the_warm_up_is_linear_from_its_first_step_and_ends_at_the_full_rate() -> None:
    optim = OptimConfig.model_validate(WARM | {"schedule": "constant"})
    assert [lr_at(step, 0.0, optim) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert lr_at(0, 0.0, OptimConfig(warmup_steps=0)) == 1.0
