"""A loss spike is named in its step; noise, a falling loss and a new level are not."""

import math
import random

import pytest

from tuneloom.train.spikes import WINDOW, Spikes


def quiet(steps: int) -> list[float]:
    """A loss that falls, with a tenth of noise."""
    rng = random.Random(0)
    return [5.0 * math.exp(-step / 500) * (1 + rng.gauss(0, 0.1)) for step in range(steps)]


def named(losses: list[float]) -> list[int]:
    spikes = Spikes(10.0)
    return [step for step, loss in enumerate(losses) if spikes.note(step, loss)]


def test_each_spike_is_named_also_the_one_right_after_another(
    capsys: pytest.CaptureFixture[str],
) -> None:
    losses = quiet(2000)
    for step in (100, 101, 1500):
        losses[step] *= 8
    assert named(losses) == [100, 101, 1500]
    assert "spike: step 100: loss " in capsys.readouterr().out


def test_a_new_level_is_one_after_half_a_window() -> None:
    steps = named(quiet(200) + [50.0 + step % 2 for step in range(200)])
    assert (
        steps == list(range(200, 200 + len(steps))) and WINDOW // 4 < len(steps) <= WINDOW // 2 + 1
    )


def test_a_step_that_is_not_finite_is_no_spike_and_hides_none() -> None:
    losses = quiet(200)
    losses[90], losses[150] = math.nan, 100.0
    assert named(losses) == [150]


def test_zero_names_none() -> None:
    spikes = Spikes(0.0)
    assert not any(spikes.note(step, 10.0**step) for step in range(100))
