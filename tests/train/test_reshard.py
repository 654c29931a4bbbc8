"""Masters and moments keep their bits on the way to other world sizes: 2 to 1 to 4 ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tuneloom.testing import Gang, free_port, small_config
from tuneloom.train import checkpoint, masters, universal

# Resumes from each of the named checkpoints, and saves at once.
CHILD = """
import json, sys
from pathlib import Path
from tuneloom.config import build
from tuneloom.train import distributed
from tuneloom.train.config import TrainConfig
from tuneloom.train.session import Session

world = distributed.start()
for content in json.loads(sys.argv[1]):
    session = Session(build(TrainConfig, content), world, {})
    session.prepare()
    session._saved_step = None
    session.save()
    session.close()
distributed.stop()
"""
STAGES = (1, 2, 3)
TRAINED: dict[str, object] = {"model__dtype": "bf16"}


def hop(lab: Path, ranks: int, sources: dict[int, Path]) -> dict[int, Path]:
    """The checkpoints, by ZeRO stage, that `ranks` ranks make of theirs."""
    runs = [
        small_config(lab, f"hop{stage}-{ranks}", steps=9, zero__stage=stage, resume=str(source),
                     train__probe=False, **TRAINED)
        for stage, source in sources.items()
    ]  # fmt: skip
    shared = os.environ | {
        "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, json.dumps(runs)],
            env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE,
        )
        for r in range(ranks)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[1].decode()[-2000:] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, said
    return {s: lab / f"runs/hop{s}-{ranks}/checkpoints" / checkpoint.name(4) for s in sources}


def whole(folder: Path) -> dict[str, torch.Tensor]:
    """fp32 masters and moments of a checkpoint, a tensor a parameter."""
    found = checkpoint.opened(folder)
    stage = int(found.manifest["zero_stage"])
    root = universal.convert(found, folder.parent, world_size=1, stage=stage, dtype="bf16")
    parameters = root / "engine/zero"
    held = {}
    for path in parameters.rglob("*.pt"):
        if path.stem in universal.MOMENTS:
            value = torch.load(path)["param"]
            held[str(path.relative_to(parameters))] = value.flatten()
    return held


@pytest.mark.timeout(600)
def test_two_ranks_to_one_to_four_keep_every_bit(lab: Path, two: Gang) -> None:
    first = {}
    for stage in STAGES:
        settings = {
            "steps": 4,
            "checkpoint__every": 4,
            "zero__stage": stage,
            "batch__accumulation": 2,
        }  # 4 micro-batches a step, for 4 ranks
        two.fit(small_config(lab, f"hop{stage}", **TRAINED, **settings))
        first[stage] = lab / f"runs/hop{stage}/checkpoints" / checkpoint.name(4)
    before = {stage: whole(folder) for stage, folder in first.items()}
    on_one = hop(lab, 1, first)
    on_four = hop(lab, 4, on_one)
    for stage in STAGES:
        for folder, ranks in ((on_one[stage], 1), (on_four[stage], 4)):
            manifest = checkpoint.opened(folder).manifest
            assert (manifest["world_size"], manifest["step"]) == (ranks, 4)
            after = whole(folder)
            assert len(after) > 20 and after.keys() == before[stage].keys()
            for name, value in before[stage].items():
                torch.testing.assert_close(after[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(("fused", "place"), [(True, "meta"), (False, "cpu")])
def test_steps_stand_where_the_update_looks_for_them_and_are_no_others(
    fused: bool, place: str
) -> None:
    """A fused update on a GPU, here `meta`, refuses a step on the host, whence it was loaded."""
    weights = [torch.nn.Parameter(torch.empty(2, device="meta")) for _ in range(2)]
    optimizer, loaded = torch.optim.AdamW(weights), torch.tensor(7.0)
    optimizer.param_groups[0]["fused"] = fused
    for weight in weights:
        optimizer.state[weight] = {"step": loaded}
    masters.place_steps(optimizer)
    steps = [optimizer.state[weight]["step"] for weight in weights]
    assert [step.device.type for step in steps] == [place] * 2
    assert len({id(step) for step in [*steps, loaded]}) == 3
