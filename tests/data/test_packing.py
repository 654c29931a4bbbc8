"""Packing: nothing lost, nothing over budget, nearly nothing wasted, and fast."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneloom.data.packing import pack, split


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 90))
def test_packing_holds_every_index_once_and_stays_in_budget(sizes: list[int], budget: int) -> None:
    lengths = np.array(sizes, np.int64)
    bins = pack(lengths, budget)
    assert sorted(int(i) for members in bins for i in members) == list(range(len(sizes)))
    assert all(0 < lengths[members].sum() <= budget for members in bins)


def best_fit_decreasing(sizes: list[int], budget: int) -> int:
    """Bins used by the textbook algorithm, one item at a time."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= size
        else:
            rooms.append(budget - size)
    return len(rooms)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=300))
def test_packing_uses_no_more_bins_than_textbook_best_fit(sizes: list[int]) -> None:
    assert len(pack(np.array(sizes), 100)) <= best_fit_decreasing(sizes, 100)


def test_packing_is_deterministic() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 5_000)
    first, second = pack(lengths, 1024), pack(lengths.copy(), 1024)
    assert all((a == b).all() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("mean", "spread"), [(4.6, 0.65), (6.6, 0.8)])
def test_100_000_lengths_pack_to_99_percent_in_well_under_a_second(
    mean: float, spread: float
) -> None:
    draws = np.random.default_rng(0).lognormal(mean, spread, 100_000)
    lengths = np.clip(draws, 16, 4096).astype(np.int64)
    start = time.process_time()
    bins = pack(lengths, 4096)
    assert time.process_time() - start < 0.7
    assert lengths.sum() / (len(bins) * 4096) > 0.999


def test_nothing_packs_to_nothing() -> None:
    assert pack(np.array([], np.int64), 10) == []


def test_a_length_over_the_budget_is_a_fault_of_the_caller() -> None:
    with pytest.raises(AssertionError):
        pack(np.array([11]), 10)


def test_bins_of_too_many_members_are_split_evenly_and_lose_none() -> None:
    lengths = np.random.default_rng(0).integers(1, 9, 500)
    bins = pack(lengths, 64)
    parts = split(bins, 7)
    assert max(map(len, bins)) > 7 >= max(map(len, parts))
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(500))
    assert split(bins, None) is bins
    assert [len(part) for part in split([np.arange(10)], 4)] == [4, 3, 3]
