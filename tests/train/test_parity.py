"""One curve, however it is computed: ZeRO stage, world size, accumulation, packing, recomputation,
method.
"""

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


def test_packed_and_padded_rows_give_one_loss_and_one_gradient(lab: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from tuneloom.data.render import Renderer
    from tuneloom.data.rows import open_rows
    from tuneloom.data.tokenizer import load_tokenizer
    from tuneloom.kernels import attention
    from tuneloom.train.batches import collate
    from tuneloom.train.loss import loss_sum

    rows = open_rows(lab / "rows.jsonl")
    renderer = Renderer(load_tokenizer(str(lab / "base")))
    examples = [renderer.render(rows[i]) for i in range(16)]
    pairs = [(example.ids, example.target) for example in examples]
    model = AutoModelForCausalLM.from_pretrained(lab / "base", dtype=torch.float32)
    attention.install(
        model, attention.choose("sdpa", dtype=torch.float32, head_dim=16, softcap=None)
    )
    found = []
    for packing in (True, False):
        model.zero_grad()
        loss = loss_sum(model, collate(range(16), pairs, packing=packing))
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append((float(loss), gradient))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


def test_eager_attention_gives_the_curve_of_sdpa(lab: Path, one: Gang) -> None:
    for backend in ("sdpa", "eager"):
        one.fit(small_config(lab, backend, steps=10, model__attention=backend))
    assert metrics(lab, "eager") == pytest.approx(metrics(lab, "sdpa"), rel=CLOSE)


def test_the_curve_falls(reference: list[float]) -> None:
    assert reference[-1] < 0.95 * reference[0]
