"""One curve, however it is computed: ZeRO stage, world size, accumulation, packing, recomputation,
method.
"""

import json
from pathlib import Path

import pytest

from tuneloom.testing import Gang, metrics, small_config

CLOSE = 1e-5
"""Relative, fp32: sums in another order, nothing else."""


@pytest.fixture(scope="module")
def reference(lab: Path, one: Gang) -> list[float]:
    """1 x 8 padded rows a step, one process, no ZeRO, 20 steps."""
    one.fit(padded(lab, "reference", 8))
    return metrics(lab, "reference")


def padded(lab: Path, run_id: str, sequences: int, **dotted: object) -> dict[str, object]:
    shared = {"steps": 20, "batch__packing": False, "batch__sequences": sequences}
    return small_config(lab, run_id, **(shared | dotted))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_on_two_ranks_gives_the_curve_of_one_process(
    lab: Path, two: Gang, reference: list[float], stage: int
) -> None:
    two.fit(padded(lab, f"zero{stage}", 4, zero__stage=stage))
    assert metrics(lab, f"zero{stage}") == pytest.approx(reference, rel=CLOSE)


def test_two_ranks_by_two_rows_by_two_micro_batches_give_the_curve_of_one_by_eight(
    lab: Path, two: Gang, reference: list[float]
) -> None:
    two.fit(padded(lab, "accumulated", 2, batch__accumulation=2, zero__stage=2))
    assert metrics(lab, "accumulated") == pytest.approx(reference, rel=CLOSE)


@pytest.mark.parametrize("checkpointing", ["on", "selective"])
def test_recomputing_activations_changes_no_bit(
    lab: Path, one: Gang, reference: list[float], checkpointing: str
) -> None:
    one.fit(padded(lab, checkpointing, 8, model__checkpointing=checkpointing))
    assert metrics(lab, checkpointing) == reference


def test_packed_and_padded_give_one_curve_when_a_step_is_the_whole_set(
    lab: Path, one: Gang
) -> None:
    one.fit(padded(lab, "whole-padded", 48, steps=20))
    ledger = json.loads((lab / "runs/whole-padded/ledger.json").read_text())["total"]
    tokens = (ledger["trained"] + ledger["masked"]) // 20
    one.fit(small_config(lab, "whole-packed", steps=20, batch__tokens=tokens, batch__window=48))
    assert metrics(lab, "whole-packed", "train/target_tokens") == metrics(
        lab, "whole-padded", "train/target_tokens"
    )
    assert metrics(lab, "whole-packed") == pytest.approx(metrics(lab, "whole-padded"), rel=CLOSE)


def test_eager_attention_gives_the_curve_of_sdpa(lab: Path, one: Gang) -> None:
    for backend in ("sdpa", "eager"):
        one.fit(small_config(lab, backend, steps=10, model__attention=backend))
    assert metrics(lab, "eager") == pytest.approx(metrics(lab, "sdpa"), rel=CLOSE)


def test_the_curve_falls(reference: list[float]) -> None:
    assert reference[-1] < 0.9 * reference[0]
