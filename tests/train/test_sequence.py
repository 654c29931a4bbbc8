"""Ranks that share each pack train the run of one rank: loss, gradients, rows, resume."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from tuneloom.config import build
from tuneloom.errors import ConfigError, TrainingError
from tuneloom.testing import Gang, metrics, small_config
from tuneloom.train import distributed, probe, runs, sequence
from tuneloom.train.batches import IGNORED, collate
from tuneloom.train.config import TrainConfig
from tuneloom.train.distributed import World

CLOSE = 1e-6
"""Relative, fp32 losses: sums in another order, nothing else."""


@pytest.fixture(scope="module")
def four() -> Iterator[Gang]:
    gang = Gang(4)
    yield gang
    gang.close()


def shared(lab: Path, run_id: str, ranks: int, by: int, **dotted: object) -> dict[str, object]:
    """Four packs a step on `ranks` ranks, `by` of which share one."""
    base: dict[str, object] = {
        "steps": 4, "data__validation": str(lab / "validation.jsonl"), "train__samples": 1,
        "train__sample_tokens": 2, "batch__sequence_parallel": by,
        "batch__accumulation": 4 * by // ranks,
    }  # fmt: skip
    return small_config(lab, run_id, **(base | dotted))


def same_curve(lab: Path, run_id: str, reference: str) -> None:
    for key in ("train/loss", "eval/loss", "train/target_tokens"):
        found = metrics(lab, run_id, key)
        assert found == pytest.approx(metrics(lab, reference, key)[-len(found) :], rel=CLOSE)
    norms, expected = (metrics(lab, run, "train/grad_norm") for run in (run_id, reference))
    assert norms == pytest.approx(expected[-len(norms) :], rel=1e-4)


@pytest.fixture(scope="module")
def alone(lab: Path, one: Gang) -> str:
    one.fit(shared(lab, "alone", 1, 1))
    return "alone"


@pytest.mark.parametrize(("by", "stage"), [(1, 0), (2, 0), (2, 3), (4, 0), (4, 1), (4, 2), (4, 3)])
def test_ranks_that_share_packs_give_the_curve_of_one_rank(
    lab: Path, four: Gang, alone: str, by: int, stage: int
) -> None:
    four.fit(shared(lab, f"by{by}zero{stage}", 4, by, zero__stage=stage))
    same_curve(lab, f"by{by}zero{stage}", alone)


def test_padded_rows_recomputed_from_the_host_in_tiles_are_shared_too(
    lab: Path, one: Gang, four: Gang
) -> None:
    padded = {"batch__packing": False, "batch__sequences": 3}
    one.fit(shared(lab, "padded1", 1, 1, **padded))
    long = {
        "model__checkpointing": "on", "model__checkpoint_offload": True, "model__tile_tokens": 40,
        "zero__stage": 3,
    }  # fmt: skip
    four.fit(shared(lab, "padded4", 4, 4, **padded, **long))
    same_curve(lab, "padded4", "padded1")


def test_packs_recomputed_from_the_host_in_tiles_are_shared_too(
    lab: Path, four: Gang, alone: str
) -> None:
    """As experiment=llama3_8b_lora_128k sets them."""
    long = {
        "model__checkpointing": "on", "model__checkpoint_offload": True, "model__tile_tokens": 40,
        "zero__stage": 2,
    }  # fmt: skip
    four.fit(shared(lab, "packed4", 4, 4, **long))
    same_curve(lab, "packed4", alone)


def test_the_fused_layers_are_shared_too(lab: Path, four: Gang, alone: str) -> None:
    four.fit(shared(lab, "shared-fused", 4, 4, model__kernels=True))
    same_curve(lab, "shared-fused", alone)


@pytest.mark.parametrize(("heads", "kv_heads", "by"), [(4, 1, 4), (6, 3, 2)])
def test_key_value_heads_that_ranks_cannot_share_evenly_are_repeated(
    lab: Path, one: Gang, four: Gang, heads: int, kv_heads: int, by: int
) -> None:
    folder = lab / f"heads{heads}by{kv_heads}"
    shutil.copytree(lab / "base", folder)
    shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 16}
    shape["hidden_size"] = 16 * heads
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    full = {"model__path": str(folder), "model__init": "random", "method__kind": "full"}
    one.fit(shared(lab, f"{folder.name}-one", 1, 1, **full))
    four.fit(shared(lab, f"{folder.name}-four", 4, by, **full, zero__stage=2))
    same_curve(lab, f"{folder.name}-four", f"{folder.name}-one")


def test_each_row_is_booked_once_and_the_receipt_counts_the_exchange(
    lab: Path, four: Gang, alone: str
) -> None:
    four.fit(shared(lab, "shared-booked", 4, 2))
    kept = ["record_id", "step", "tokens", "target_tokens"]
    order = [(name, "ascending") for name in ("step", "record_id")]
    tables = [
        pq.read_table(lab / "runs" / run / "exposure.parquet", columns=kept).sort_by(order)
        for run in ("shared-booked", alone)
    ]
    assert tables[0].equals(tables[1])
    ranks = pq.read_table(lab / "runs/shared-booked/exposure.parquet")["rank"].to_pylist()
    assert set(ranks) == {0, 2}  # the first of each two that share
    effects = json.loads((lab / "runs/shared-booked/effects.json").read_text(encoding="utf-8"))
    (receipt,) = [r for r in effects["receipts"] if r["option"] == "batch.sequence_parallel=2"]
    evidence = receipt["evidence"]
    assert receipt["acted"]
    assert evidence["tokens_attended"] == 2 * evidence["tokens_held"]
    # q and out of 4 heads, k and v of 2, each 16 wide in fp32; half of it goes to the other rank
    assert evidence["bytes_sent"] == evidence["tokens_held"] * (2 * 4 + 2 * 2) * 16 * 4 // 2


def test_a_resume_may_share_packs_otherwise(lab: Path, four: Gang, alone: str) -> None:
    four.fit(shared(lab, "shared-halfway", 4, 4, zero__stage=2, checkpoint__every=2))
    half = lab / "runs/shared-halfway/checkpoints/step-000002"
    four.fit(shared(lab, "shared-otherwise", 4, 2, zero__stage=2, resume=str(half)))
    assert len(metrics(lab, "shared-otherwise")) == 2
    digests = {
        runs.digest(
            build(TrainConfig, shared(lab, "shared-otherwise", 4, by, batch__accumulation=1))
        )
        for by in (2, 4)
    }
    assert len(digests) == 1  # nor does the same run.id refuse it
    same_curve(lab, "shared-otherwise", alone)


def test_ranks_and_heads_that_cannot_be_shared_are_refused_by_name(lab: Path, four: Gang) -> None:
    with pytest.raises(ConfigError, match="4 ranks cannot form groups of 3"):
        four.fit(shared(lab, "three", 4, 3))
    with pytest.raises(ConfigError, match="4 ranks cannot share the model's 6 attention heads"):
        sequence.refuse_heads(6, 4)


def test_parts_of_a_pack_are_the_pack_and_its_padding_is_a_document_of_its_own() -> None:
    documents = [(np.arange(1, n + 1, dtype=np.int32), np.ones(n, bool)) for n in (5, 4)]
    pack = collate([7, 8], documents, packing=True, multiple=4)
    parts = [pack.shard(index, 4) for index in range(4)]
    assert pack.cu_seqlens is not None
    assert pack.cu_seqlens.tolist() == [0, 5, 9, 12]
    assert (pack.tokens, pack.padded, pack.target_tokens) == (9, 3, 7)
    for name in ("input_ids", "labels", "position_ids"):
        joined = torch.cat([getattr(part, name) for part in parts], dim=1)
        assert torch.equal(joined, getattr(pack, name))
    assert (pack.labels[0, 9:] == IGNORED).all()


class Mixing(nn.Module):
    """A model whose layers see tokens by other means than attention."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(32, 8))

    def forward(self, input_ids: Tensor, **_: object) -> object:
        class Output:
            logits = self.weight[input_ids].cumsum(1)

        return Output()


def test_a_model_that_mixes_tokens_beside_attention_cannot_be_shared() -> None:
    distributed.start()
    try:
        here = World(1, 2, 1, torch.device("cpu"), sequence=2)  # its logits lack the first half
        with pytest.raises(TrainingError, match="a layer beside attention mixes tokens"):
            probe.sharing(Mixing(), 32, here, seed=0)
    finally:
        distributed.stop()
