"""The plan: every row once an epoch, the same steps for any world, and exact continuation."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.packing import SMALLER, recosted
from tuneloom.data.balance import arrange, costs_of, straggling
from tuneloom.data.plan import Plan, PlanConfig, epoch_order, share
from tuneloom.errors import DataError

Steps = list[list[list[int]]]


def config(**changes: object) -> PlanConfig:
    values: dict[str, object] = {
        "seed": 0, "epochs": 1.0, "shuffle": True, "packing": True, "tokens": 64, "sequences": 4,
        "window": 16, "balance": True, "group": 3,
    }  # fmt: skip
    return PlanConfig(**(values | changes))  # type: ignore[arg-type]


def make(rows: int, plan: PlanConfig, drop: int = 0) -> Plan:
    """A plan over lengths from 1 to 64; every `drop`-th row has length 0."""
    lengths = np.random.default_rng(rows).integers(1, 65, rows)
    if drop:
        lengths[::drop] = 0
    return Plan(rows, lambda asked: lengths[asked], plan)


def run(plan: Plan, most: int = 10_000) -> Steps:
    steps: Steps = []
    while len(steps) < most and (bins := plan.next_step()):
        steps.append([members.tolist() for members in bins])
    return steps


def flat(steps: Steps) -> list[int]:
    return [row for bins in steps for members in bins for row in members]


PLANS = st.builds(
    config,
    seed=st.integers(0, 3),
    epochs=st.sampled_from([0.5, 1.0, 2.0, 2.5]),
    shuffle=st.booleans(),
    packing=st.booleans(),
    window=st.sampled_from([None, 1, 7, 16, 64]),
    sequences=st.integers(1, 5),
    group=st.sampled_from([1, 2, 3, 8]),
)


@settings(deadline=None)
@given(st.integers(1, 150), PLANS, st.sampled_from([0, 3]))
def test_every_row_is_seen_once_an_epoch_or_reported_dropped(
    rows: int, plan: PlanConfig, drop: int
) -> None:
    if drop and rows < 4:
        return
    made = make(rows, plan, drop)
    seen: list[int] = []
    while bins := made.next_step():
        assert len(bins) == plan.group
        seen += [int(row) for members in bins for row in members] + made.dropped.tolist()
        assert made.consumed == len(seen)
    seen += made.dropped.tolist()
    assert plan.epochs is not None
    whole = int(plan.epochs)
    counts = np.bincount(seen, minlength=rows)
    assert len(seen) == max(1, round(plan.epochs * rows))
    assert set(counts.tolist()) <= {whole, whole + 1}
    assert made.progress == 1.0 and made.consumed == len(seen)
    assert made.next_step() == []


@settings(deadline=None)
@given(st.integers(1, 100), PLANS, st.integers(0, 12), st.sampled_from([0, 3]))
def test_resume_from_any_step_continues_identically(
    rows: int, plan: PlanConfig, stop: int, drop: int
) -> None:
    if drop and rows < 4:
        return
    whole, first, second = (make(rows, plan, drop) for _ in range(3))
    assert run(whole, stop) == run(first, stop)
    second.restore(json.loads(json.dumps(first.state())))
    assert (second.progress, second.consumed) == (whole.progress, whole.consumed)
    while bins := whole.next_step():
        resumed = second.next_step()
        assert [b.tolist() for b in bins] == [b.tolist() for b in resumed]
        assert whole.dropped.tolist() == second.dropped.tolist()
        assert whole.progress == second.progress
    assert second.next_step() == []


@pytest.mark.parametrize("packing", [True, False])
def test_ranks_share_the_same_steps_whatever_their_number(packing: bool) -> None:
    def rows_a_step(world: int, accumulation: int) -> list[list[int]]:
        plan = make(200, config(packing=packing, group=world * accumulation))
        found = []
        while bins := plan.next_step():
            ranks = [share(bins, rank, world) for rank in range(world)]
            assert all(len(mine) == accumulation for mine in ranks)
            found.append(sorted(int(row) for mine in ranks for b in mine for row in b))
        return found

    assert rows_a_step(8, 1) == rows_a_step(2, 4) == rows_a_step(4, 2) == rows_a_step(1, 8)


def test_padded_steps_hold_the_same_rows_for_1_x_8_and_2_x_4_and_2_x_2_x_2() -> None:
    def rows_a_step(sequences: int, group: int) -> list[list[int]]:
        plan = make(100, config(packing=False, sequences=sequences, group=group))
        return [flat([bins]) for bins in run(plan)]

    assert rows_a_step(8, 1) == rows_a_step(4, 2) == rows_a_step(2, 4)


def test_bins_stay_in_budget_and_are_99_percent_full() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(4.6, 0.65, 20_000), 16, 2048).astype(int)
    plan = Plan(20_000, lambda rows: lengths[rows], config(tokens=8192, window=4096, group=8))
    fills = [lengths[b].sum() for bins in iter(plan.next_step, []) for b in bins if len(b)]
    assert max(fills) <= 8192
    assert np.mean(fills) / 8192 > 0.985  # the last bin of the run is as full as it comes
    assert np.mean(fills[:-1]) / 8192 > 0.99


def test_rows_that_never_fit_well_do_not_starve() -> None:
    asked: list[int] = []

    def lengths(rows: np.ndarray) -> np.ndarray:
        asked.extend(rows.tolist())
        return np.full(len(rows), 40)  # one to a bin of 64, so no bin is ever 98 % full

    plan = Plan(400, lengths, config(epochs=1.0, shuffle=False))
    assert sorted(flat(run(plan))) == list(range(400))
    assert np.bincount(asked).max() <= 2


def test_order_without_shuffle_is_the_order_of_the_rows() -> None:
    plan = make(50, config(shuffle=False, packing=False))
    assert flat(run(plan)) == list(range(50))
    packed = make(50, config(shuffle=False, window=8))
    firsts = [members[0] for bins in run(packed) for members in bins if members]
    assert np.mean(np.diff(firsts) > 0) > 0.8


def test_epochs_and_seeds_differ_and_repeat() -> None:
    assert epoch_order(50, 0, 0).tolist() == epoch_order(50, 0, 0).tolist()
    orders = [epoch_order(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert run(make(80, config(seed=1))) != run(make(80, config(seed=2)))


def test_without_epochs_the_stream_never_ends() -> None:
    plan = make(20, config(epochs=None))
    counts = np.bincount(flat(run(plan, 100)), minlength=20)
    assert counts.min() > 5 and plan.progress == 0.0 and plan.epoch > 5


def test_the_first_step_asks_for_an_eighth_of_a_window_only() -> None:
    asked: list[int] = []

    def lengths(rows: np.ndarray) -> np.ndarray:
        asked.extend(rows.tolist())
        return np.full(len(rows), 32)

    plan = Plan(10_000, lengths, config(window=4096, group=8))
    plan.next_step()
    assert asked == epoch_order(10_000, 0, 0)[:512].tolist()


@pytest.mark.parametrize("group", [1, 64])
def test_the_first_step_of_a_chosen_window_asks_for_two_steps_of_rows(group: int) -> None:
    asked: list[int] = []

    def lengths(rows: np.ndarray) -> np.ndarray:
        asked.extend(rows.tolist())
        return np.full(len(rows), 1_024)

    plan = Plan(100_000, lengths, config(window=None, tokens=32_768, group=group))
    plan.next_step()
    assert set(asked) == set(epoch_order(100_000, 0, 0)[: max(512, 2 * 32 * group)].tolist())


def test_chosen_windows_double_up_to_64_steps() -> None:
    widths: list[int] = []

    def lengths(rows: np.ndarray) -> np.ndarray:
        widths.append(len(rows))
        return np.full(len(rows), 64)  # one fills a bin, so none waits

    run(Plan(100_000, lengths, config(window=None, group=512)), 150)
    assert widths == [512, 1024, 2048, 4096, 8192, 16_384, 32_768, 32_768]


@pytest.mark.parametrize("packing", [True, False])
def test_rows_that_are_all_dropped_end_in_a_sentence(packing: bool) -> None:
    plan = Plan(30, lambda rows: np.zeros(len(rows)), config(packing=packing, epochs=None))
    with pytest.raises(DataError, match=r"all 30 rows are longer than batch.max_length"):
        plan.next_step()


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("steps", [0, 3, 1000])
def test_a_run_may_be_resumed_for_more_epochs(packing: bool, steps: int) -> None:
    first = make(100, config(packing=packing, epochs=1.0))
    seen = flat(run(first, steps))
    second = make(100, config(packing=packing, epochs=3.0))
    second.restore(first.state())
    assert sorted(seen + flat(run(second))) == sorted([*range(100)] * 3)
    assert second.progress == 1.0


def test_a_state_of_other_data_is_refused() -> None:
    state = make(30, config()).state()
    with pytest.raises(DataError, match="made with tokens=64, this run has 128"):
        make(30, config(tokens=128)).restore(state)
    with pytest.raises(DataError, match="made with rows=30, this run has 31"):
        make(31, config()).restore(state)
    with pytest.raises(DataError, match="made with seed=0, this run has 1"):
        make(30, config(seed=1)).restore(state)
    with pytest.raises(DataError, match="made with balance=True, this run has False"):
        make(30, config(balance=False)).restore(state)
    with pytest.raises(DataError, match="made with window=16, this run has None"):
        make(30, config(window=None)).restore(state)
    with pytest.raises(DataError, match="made with documents=None, this run has 3"):
        make(30, config(documents=3)).restore(state)
    del state["documents"]  # as in states from before the key
    make(30, config()).restore(state)


def test_no_pack_holds_more_documents_than_asked_for_and_no_row_is_lost() -> None:
    steps = run(make(200, config(documents=3, tokens=256)))
    assert max(len(members) for bins in steps for members in bins) == 3
    assert sorted(flat(steps)) == list(range(200))


def test_a_state_of_an_older_order_is_refused() -> None:
    state = make(30, config()).state()
    del state["version"]  # as the first order's states were
    with pytest.raises(DataError, match=r"version 1, this is version 3; finish .* another run\.id"):
        make(30, config()).restore(state)


def long_and_short(rows: int, longest: int = 32_768) -> np.ndarray:
    """Lengths of a chat set with long documents."""
    draws = np.random.default_rng(1)
    short = draws.random(rows) < 0.85
    lengths = np.where(short, draws.lognormal(6.3, 0.9, rows), draws.lognormal(9, 0.8, rows))
    return np.clip(lengths, 16, longest).astype(np.int64)


def straggling_of(plan: Plan, lengths: np.ndarray, group: int) -> tuple[float, float]:
    """Slowest over mean of the steps that are whole: as planned, and at random."""
    bins = [b for step in iter(plan.next_step, []) for b in step if len(b)]
    costs = costs_of(bins, lengths)
    shuffled = np.random.default_rng(0).permutation(costs)
    return straggling(costs, group), straggling(shuffled, group)


def test_with_the_default_window_the_slowest_of_64_ranks_waits_2_percent() -> None:
    lengths = long_and_short(150_000)
    plan = Plan(150_000, lambda rows: lengths[rows], config(tokens=32_768, window=None, group=64))
    planned, random = straggling_of(plan, lengths, 64)
    assert planned < 1.02 and random > 1.3


def test_a_smaller_model_ranks_packs_alike_and_waits_longer() -> None:
    lengths = long_and_short(150_000)
    plan = Plan(150_000, lambda rows: lengths[rows], config(tokens=32_768, window=None, group=64))
    bins = [b for step in iter(plan.next_step, []) for b in step if len(b)]
    costs = costs_of(bins, lengths)
    same = recosted(costs, bins, lengths, 7_504_924_672, 32, 4096)  # Llama-3-8B
    assert same == pytest.approx(costs, rel=3e-3)
    small = recosted(costs, bins, lengths, *SMALLER["Qwen3-0.6B"])
    assert straggling(costs, 64) + 0.01 < straggling(small, 64) < 1.05
    full = np.array([lengths[members].sum() for members in bins]) == 32_768
    assert full.mean() > 0.5
    assert np.array_equal(np.argsort(costs[full]), np.argsort(small[full]))


def test_without_balance_steps_stay_random_and_no_pack_waits_for_its_cost() -> None:
    lengths = long_and_short(60_000)
    chosen = config(tokens=32_768, window=None, balance=False, group=64)
    planned, random = straggling_of(Plan(60_000, lambda rows: lengths[rows], chosen), lengths, 64)
    assert planned == pytest.approx(random, rel=0.03) and planned > 1.3


def test_a_given_window_balances_too() -> None:
    lengths = long_and_short(60_000)
    plan = Plan(60_000, lambda rows: lengths[rows], config(tokens=32_768, window=30_000, group=64))
    planned, random = straggling_of(plan, lengths, 64)
    assert planned < 1.03 and random > 1.3


def test_dear_packs_wait_for_one_window_and_no_longer() -> None:
    lengths, asked = long_and_short(60_000), np.zeros(60_000, int)

    def seen(rows: np.ndarray) -> np.ndarray:
        np.add.at(asked, rows, 1)
        return lengths[rows]

    plan = Plan(60_000, seen, config(tokens=32_768, window=8_000, group=64))
    assert sorted(flat(run(plan))) == list(range(60_000))
    assert asked.max() == 2 and lengths[asked == 2].mean() > 2 * lengths.mean()


def test_while_windows_grow_the_dearest_packs_wait_for_the_longest_one() -> None:
    lengths = long_and_short(150_000, 131_072)
    plan = Plan(150_000, lambda rows: lengths[rows], config(tokens=131_072, window=None, group=32))
    early = np.concatenate([b for _ in range(30) for b in plan.next_step()])  # 2 + 4 + 8 + 16
    late = np.concatenate([b for step in iter(plan.next_step, []) for b in step])
    assert sorted([*early, *late]) == list(range(150_000))
    assert lengths[early].max() < 0.6 * 131_072 and lengths[late].max() == 131_072
    again = Plan(150_000, lambda rows: lengths[rows], plan.config)
    planned, random = straggling_of(again, lengths, 32)
    assert planned < 1.05 and random > 2


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_window_that_grows_is_finished_as_begun_under_another_global_batch(stop: int) -> None:
    lengths = long_and_short(20_000)

    def plan(group: int) -> Plan:
        return Plan(
            20_000, lambda rows: lengths[rows], config(tokens=32_768, window=None, group=group)
        )

    first, second = plan(64), plan(16)
    run(first, stop)
    second.restore(json.loads(json.dumps(first.state())))
    assert flat(run(second, 4)) == flat(run(first, 1))


@pytest.mark.parametrize("stop", [1, 2, 5, 8])
def test_resume_is_exact_where_dear_packs_wait(stop: int) -> None:
    lengths = long_and_short(20_000)

    def plan() -> Plan:
        return Plan(
            20_000, lambda rows: lengths[rows], config(tokens=32_768, window=None, group=64)
        )

    whole, first, second = plan(), plan(), plan()
    assert run(whole, stop) == run(first, stop)
    second.restore(json.loads(json.dumps(first.state())))
    assert run(second) == run(whole)


@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 8), st.booleans())
def test_arranging_is_a_permutation(count: int, group: int, phase: int, uneven: bool) -> None:
    generator = np.random.default_rng(count)
    costs = generator.lognormal(0, 2.0 * uneven, count)
    order = arrange(costs, group, phase % group, generator)
    assert sorted(order.tolist()) == list(range(count))


def test_packs_of_equal_cost_stay_in_random_order() -> None:
    orders = [arrange(np.ones(50), 8, 0, np.random.default_rng(s)).tolist() for s in (0, 1)]
    assert orders[0] == np.random.default_rng(0).permutation(50).tolist() != orders[1]


@pytest.mark.parametrize("window", [None, 512])
@pytest.mark.parametrize("group", [1, 4, 16])
def test_a_run_resumed_with_another_global_batch_still_sees_every_row_once(
    group: int, window: int | None
) -> None:
    lengths = np.clip(long_and_short(3_000), 16, 32_768)

    def plan(size: int) -> Plan:
        return Plan(
            3_000, lambda rows: lengths[rows], config(tokens=32_768, window=window, group=size)
        )

    first = plan(8)
    seen = flat(run(first, 9))
    second = plan(group)
    second.restore(json.loads(json.dumps(first.state())))
    assert sorted(seen + flat(run(second))) == list(range(3_000))
