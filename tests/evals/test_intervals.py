"""Intervals agree with published figures and hold their promise where the data are thin."""

import numpy as np
import pytest

from tuneloom.evals.intervals import (
    mcnemar,
    paired_difference,
    paired_loss_difference,
    wilson,
)


def flags(*, both: int, only_base: int, only_tuned: int, neither: int) -> tuple[np.ndarray, ...]:
    base = [1] * both + [1] * only_base + [0] * only_tuned + [0] * neither
    tuned = [1] * both + [0] * only_base + [1] * only_tuned + [0] * neither
    return np.array(base, np.bool_), np.array(tuned, np.bool_)


def test_wilson_agrees_with_newcombes_table() -> None:
    # Newcombe 1998, Stat. Med. 17, 857-872, table I: 81/263, 15/148, 0/20, 1/29 (method 3).
    for correct, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = wilson(correct, n)
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


def test_no_rows_give_no_interval() -> None:
    with pytest.raises(ValueError, match="no rows"):
        wilson(0, 0)


def test_paired_interval_covers_the_truth_19_times_of_20() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        base = rng.random(80) < 0.3
        tuned = np.where(rng.random(80) < 0.5, base, rng.random(80) < 0.8)
        found = paired_difference(base, tuned)
        covered += found.low <= 0.25 <= found.high  # 0.5 * (0.8 - 0.3)
    assert 0.93 <= covered / 1000 <= 0.98


def test_paired_interval_is_tighter_for_rows_that_agree() -> None:
    agree = paired_difference(*flags(both=50, only_base=0, only_tuned=10, neither=40))
    apart = paired_difference(*flags(both=20, only_base=30, only_tuned=40, neither=10))
    assert agree.value == apart.value == pytest.approx(0.1)
    assert agree.high - agree.low < apart.high - apart.low
    assert agree.low > 0 > apart.low


def test_a_perfect_change_on_three_rows_keeps_a_wide_interval() -> None:
    found = paired_difference(*flags(both=0, only_base=0, only_tuned=3, neither=0))
    assert found.value == 1.0
    assert found.low < 0.3


def test_mcnemar_is_the_exact_binomial() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(5, 0) == mcnemar(0, 5)
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 1024)


def test_mcnemar_of_many_rows_joins_the_exact_one_without_a_jump() -> None:
    assert mcnemar(470, 529) == pytest.approx(mcnemar(470, 530), rel=0.15)
    assert mcnemar(100, 20000) == 0.0


def test_loss_interval_is_seeded_and_finds_a_small_steady_gain() -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 9, 200)
    base = rng.gamma(2.0, 1.0, 200) * tokens
    tuned = base - 0.1 * tokens
    found = paired_loss_difference(base, tuned, tokens, seed=3)
    assert found.value == pytest.approx(-0.1)
    assert found.high < 0
    assert found == paired_loss_difference(base, tuned, tokens, seed=3)
