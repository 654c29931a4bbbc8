"""The simulator: volumes as papers count them, published rows it never saw, failures by events."""

import pytest

from benchmarks import estimator
from tuneloom.launch import simulate
from tuneloom.launch.simulate import CLUSTERS, Cluster, Faults, Rates, Work

RATES = Rates(matmul=0.8, attention=0.5, elementwise=0.0, weights=0.0)
LORA: dict[str, object] = {"frozen": True, "adapters": 41_943_040}


def llama_8b(**changes: object) -> Work:
    shape: dict[str, object] = {
        "layers": 32, "width": 4096, "linear": 7_504_924_672, "parameters": 8_030_261_248,
        "length": 4096, "tokens": 8192, "accumulation": 1, "recompute": False,
    }  # fmt: skip
    return Work(**(shape | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "gigabytes"),
    [({"software": "fsdp"}, 48.2), ({"software": "fsdp"} | LORA, 32.2), ({}, 46.2),
     (LORA, 30.2), (LORA | {"recompute": True}, 45.2), ({"stage": 2}, 48.2),
     ({"stage": 2, "accumulation": 4}, 36.1), ({"stage": 1, "accumulation": 4}, 12.0),
     (LORA | {"stage": 2}, 0.252)],
)  # fmt: skip
def test_a_rank_sends_in_a_micro_batch_what_its_software_sends(
    changes: dict[str, object], gigabytes: float
) -> None:
    sent = simulate.traffic_bytes(llama_8b(**changes), ranks=10**9)
    assert sent / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_traffic_hides_from_the_same_number_of_tokens_whatever_the_model() -> None:
    cluster = CLUSTERS["h100-80"]
    least = simulate.hidden_from(cluster, RATES, ranks=8)
    for size in (1, 4):
        work = llama_8b(
            tokens=round(least), length=1, linear=10**9 * size, parameters=10**9 * size,
            software="fsdp",
        )  # fmt: skip
        micro = simulate.compute_seconds(work, cluster, RATES)
        moving = simulate.traffic_bytes(work, ranks=10**9) / cluster.link(8)
        assert moving == pytest.approx(micro, rel=0.01)


def test_perfect_overlap_exposes_what_outlasts_computation_and_fitted_rates_all_traffic() -> None:
    cluster = CLUSTERS["h100-80"]
    least = simulate.hidden_from(cluster, RATES, ranks=64)
    fitted = Rates(matmul=0.8, attention=0.5, elementwise=0.0, weights=1.18)
    for factor in (0.5, 2.0):
        # All parameters in products and no attention to speak of, as the law has it.
        work = llama_8b(tokens=round(factor * least), length=1, linear=8_030_261_248)
        traffic = simulate.traffic_bytes(work, ranks=64) / cluster.link(64)
        perfect = simulate.step(work, cluster, RATES, ranks=64)
        outlasts = max(0.0, traffic - perfect.compute)
        assert perfect.exposed == pytest.approx(outlasts)
        assert (perfect.exposed > 0.4 * traffic) == (factor < 1)
        assert simulate.step(work, cluster, fitted, ranks=64).exposed == pytest.approx(
            1.18 * traffic
        )


def test_a_ring_over_nodes_uses_every_adapter_of_a_node() -> None:
    cluster = Cluster(peak=1e15, node=360e9, network=12.5e9)
    assert cluster.link(8) == 360e9
    assert cluster.link(64) == 100e9


def test_recomputation_costs_a_third_of_full_training_and_half_of_lora() -> None:
    cluster = CLUSTERS["h100-80"]

    def ratio(*, frozen: bool) -> float:
        again, once = (
            simulate.compute_seconds(
                llama_8b(length=1, recompute=recompute, frozen=frozen), cluster, RATES
            )
            for recompute in (True, False)
        )
        return again / once

    assert ratio(frozen=False) == pytest.approx(4 / 3, rel=1e-3)
    assert ratio(frozen=True) == pytest.approx(3 / 2, rel=1e-3)


def test_the_slowest_rank_costs_more_the_more_there_are() -> None:
    waits = [simulate.slowest(0.02, ranks) for ranks in (1, 8, 64, 1024)]
    assert waits[0] == 0 and waits == sorted(waits)
    assert waits[3] == pytest.approx(0.02 * 3.22, rel=0.02)  # E[max of 1,024 normals] = 3.22


def test_published_rows_that_no_fit_saw_are_predicted_within_ten_percent() -> None:
    every = estimator.rows()
    rates = estimator.fit(estimator.pick(every, "h100-80", nodes="one")[::2], noise=0.025)
    unseen = [*estimator.pick(every, "h100-80", nodes="one")[1::2],
              *estimator.pick(every, "h100-80", nodes="many")]  # fmt: skip
    assert len(unseen) >= 20
    assert estimator.error(unseen, rates) < 10


def test_published_rows_of_many_nodes_speak_against_traffic_that_hides() -> None:
    every = estimator.rows()
    fitted = estimator.pick(every, "h100-80", nodes="one")[::2]
    many = estimator.pick(every, "h100-80", nodes="many")
    exposed, hidden = (
        estimator.error(many, estimator.fit(fitted, noise=0.025, hidden=hidden))
        for hidden in (False, True)
    )
    assert exposed < 2.5 and hidden > 3 * exposed


def test_scaling_efficiency_is_within_two_points_of_the_published() -> None:
    every = estimator.rows()
    rates = estimator.fit(estimator.pick(every, "h100-80", nodes="one")[::2], noise=0.025)
    pairs = estimator.scaling(estimator.pick(every, "h100-80", nodes="many"), rates)
    off = [100 * abs(pair["measured"] - pair["predicted"]) for pair in pairs]
    assert len(off) >= 5 and sum(off) / len(off) < 2


@pytest.mark.parametrize("ranks", [64, 1024, 16384])
def test_goodput_by_events_is_within_a_point_of_the_closed_form(ranks: int) -> None:
    faults = Faults(simulate.LLAMA3_MTBF_HOURS, save_seconds=20, restart_seconds=240)
    interval = simulate.best_interval(faults, ranks=ranks)
    closed = simulate.goodput(faults, ranks=ranks, interval_seconds=interval)
    events = simulate.simulate_goodput(
        faults, ranks=ranks, interval_seconds=interval, segments=5000, seed=0
    )
    assert events == pytest.approx(closed, abs=0.01)


def test_youngs_interval_loses_less_than_half_or_twice_of_it() -> None:
    faults = Faults(simulate.LLAMA3_MTBF_HOURS, save_seconds=20, restart_seconds=240)
    best = simulate.best_interval(faults, ranks=4096)
    share = [
        simulate.goodput(faults, ranks=4096, interval_seconds=best * f) for f in (0.5, 1.0, 2.0)
    ]
    assert share[1] == max(share)
