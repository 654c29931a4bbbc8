"""Resuming reads shards once, from the file's own pages, and makes nothing that they name."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tuneloom.data.store import file_digest
from tuneloom.errors import RefusedError, TrainingError
from tuneloom.testing import Gang, metrics, small_config
from tuneloom.train import checkpoint, shards


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def plant(folder: Path, shard: Path, canary: Path) -> None:
    """A payload in a shard that is otherwise as it was, and a manifest that lists it."""
    state = torch.load(shard, weights_only=False)
    torch.save(state | {"more": Payload(canary)}, shard)
    manifest = checkpoint.unsealed((folder / checkpoint.MANIFEST).read_text())
    manifest["files"][str(shard.relative_to(folder))] = checkpoint.facts_of(shard)
    (folder / checkpoint.MANIFEST).write_text(checkpoint.sealed(manifest))
    assert checkpoint.verify(folder) is None


@pytest.mark.parametrize(("saved", "resumed"), [(2, 2), (3, 3), (0, 0), (0, 2), (2, 3)])
def test_a_shard_that_names_code_is_refused_though_a_manifest_lists_it(
    lab: Path, one: Gang, tmp_path: Path, saved: int, resumed: int
) -> None:
    run_id = f"named-code{saved}{resumed}"
    one.fit(small_config(lab, run_id, steps=4, checkpoint__every=2, zero__stage=saved))
    folder = lab / "runs" / run_id / "checkpoints" / checkpoint.name(4)
    shard = min((folder / checkpoint.ENGINE).glob("*.pt"))
    plant(folder, shard, tmp_path / "canary")
    with pytest.raises((RefusedError, TrainingError), match="mkdir"):
        one.fit(small_config(lab, run_id, steps=4, checkpoint__every=2, zero__stage=resumed))
    assert not (tmp_path / "canary").exists()
    torch.load(shard, weights_only=False)  # as DeepSpeed would have read it
    assert (tmp_path / "canary").exists()


class Attribute:
    """Pickled as some Pythons pickle a member of an enum."""

    def __init__(self, *of: Any) -> None:
        self.of = of

    def __reduce__(self) -> Any:
        return getattr, self.of


def test_a_member_of_deepspeeds_enum_is_read_as_every_python_writes_it(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    for value in (ZeroStageEnum.weights, Attribute(ZeroStageEnum, "weights")):
        torch.save({"zero_stage": value}, tmp_path / "shard.pt")
        assert shards.load(tmp_path / "shard.pt")["zero_stage"] is ZeroStageEnum.weights
    for of in ((LossScaler, "__init__"), (ZeroStageEnum, "__class__")):
        torch.save({"zero_stage": Attribute(*of)}, tmp_path / "shard.pt")
        with pytest.raises(RefusedError, match="getattr"):
            shards.load(tmp_path / "shard.pt")


CHILD = """
import json, sys
from tuneloom.config import build
from tuneloom.train.config import TrainConfig
from tuneloom.train.loop import fit
from tuneloom.train.session import Session
record = Session.record
def recorded(self, *arguments, **named):
    with open("/proc/self/maps") as maps:
        mapped.append(sum("/checkpoints/" in line for line in maps))
    return record(self, *arguments, **named)
Session.record = recorded
for content in json.loads(sys.argv[1]):
    mapped = []
    fit(build(TrainConfig, content))
    print("MAPPED", mapped)
"""


def test_no_page_of_a_checkpoint_is_kept_once_it_is_restored(lab: Path, one: Gang) -> None:
    """Weights that stay in the file would keep a deleted checkpoint on the disk."""
    kinds = [(stage, "adamw") for stage in range(4)] + [(2, "adamw8bit"), (2, "muon")]
    runs, before = [], []
    for stage, optim in kinds:
        settings = {"steps": 4, "checkpoint__every": 2, "checkpoint__keep": 2,
                    "zero__stage": stage, "optim__name": optim, "method__rank": 64}  # fmt: skip
        if optim == "muon":
            settings["optim__clip"] = 0.0
        runs.append(small_config(lab, f"mapped{stage}{optim}", **settings))
        one.fit(runs[-1])
        before.append(metrics(lab, f"mapped{stage}{optim}"))
        shutil.rmtree(lab / f"runs/mapped{stage}{optim}/checkpoints" / checkpoint.name(4))
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(runs)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert [line for line in ran.stdout.splitlines() if line.startswith("MAPPED")] == [
        "MAPPED [0, 0]"
    ] * len(kinds)
    assert [metrics(lab, f"mapped{stage}{optim}") for stage, optim in kinds] == before


def test_every_file_is_verified_by_one_rank_and_a_ranks_own_by_itself() -> None:
    files = [
        "engine/mp_rank_00_model_states.pt", "trainer.json", "rng-00000.safetensors",
        *(f"engine/bf16_zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(7)),
        "engine/zero/model.norm.weight/fp32.pt", "engine/zero/model.norm.weight/exp_avg.pt",
    ]  # fmt: skip
    for ranks in (1, 2, 3, 7, 16):
        shares = [checkpoint.share(files, rank, ranks) for rank in range(ranks)]
        assert sorted(file for share in shares for file in share) == sorted(files)
        assert all(files[3 + rank] in shares[rank] for rank in range(min(ranks, 7)))


def test_damage_that_another_rank_finds_sets_the_checkpoint_aside_on_all(
    lab: Path, two: Gang
) -> None:
    settings = {"steps": 4, "checkpoint__every": 2, "checkpoint__keep": 9, "zero__stage": 2}
    two.fit(small_config(lab, "others", **settings))
    before = metrics(lab, "others")
    folder = lab / "runs/others/checkpoints" / checkpoint.name(4)
    shard = next(folder.glob("engine/*zero_pp_rank_1_*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert checkpoint.verify(folder, rank=0, ranks=2) is None
    two.fit(small_config(lab, "others", **settings))
    assert metrics(lab, "others") == before
    assert (folder.parent / f"damaged-{folder.name}").is_dir()
    record = json.loads((lab / "runs/others/run.json").read_text())
    assert record["resumed_from"] == checkpoint.name(2)


def test_manifests_of_before_are_still_verified(lab: Path, one: Gang) -> None:
    """They have SHA-256."""
    one.fit(small_config(lab, "older", steps=2, checkpoint__every=2))
    folder = lab / "runs/older/checkpoints" / checkpoint.name(2)
    manifest = checkpoint.unsealed((folder / checkpoint.MANIFEST).read_text())
    for file in manifest["files"]:
        size = (folder / file).stat().st_size
        manifest["files"][file] = {"bytes": size, "sha256": file_digest(folder / file)}
    (folder / checkpoint.MANIFEST).write_text(checkpoint.sealed(manifest))
    assert checkpoint.verify(folder) is None
    shard = next(folder.glob("engine/*.pt"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert checkpoint.verify(folder) == f"engine/{shard.name} differs from what was saved (sha256)"
