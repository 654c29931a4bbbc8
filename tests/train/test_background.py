"""Checkpoints written beside training are the same checkpoints, or the run ends and says why."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tuneloom.errors import Stopped
from tuneloom.testing import Gang, cut_back, free_port, metrics, small_config, went_on
from tuneloom.train import checkpoint

STEPS, CUT = 8, 4
BF16: dict[str, object] = {"model__dtype": "bf16", "method__kind": "full"}


def config(lab: Path, run_id: str, **dotted: object) -> dict[str, object]:
    shared = {"steps": STEPS, "checkpoint__every": 4, "checkpoint__keep": 9,
              "checkpoint__asynchronous": True}  # fmt: skip
    return small_config(lab, run_id, **(shared | dotted))


def tensors(value: Any) -> list[torch.Tensor]:
    """All of a nested state, in order."""
    if isinstance(value, torch.Tensor):
        return [value.detach()]
    if isinstance(value, dict):
        return [t for entry in value.values() for t in tensors(entry)]
    return [t for entry in value for t in tensors(entry)] if isinstance(value, list | tuple) else []


def shards(folder: Path) -> dict[str, list[torch.Tensor]]:
    paths = sorted((folder / checkpoint.ENGINE).glob("*.pt"))
    return {p.name: tensors(torch.load(p, weights_only=False)) for p in paths}


@pytest.mark.parametrize(
    ("stage", "more"),
    [(0, {"method__dropout": 0.1}), (1, {}), (2, {"method__dropout": 0.1}), (3, {}),
     (2, BF16), (3, BF16)],
)  # fmt: skip
def test_it_holds_the_bits_of_a_synchronous_one_and_resumes_to_the_same_bits(
    lab: Path, two: Gang, stage: int, more: dict[str, object]
) -> None:
    beside = "-".join(["beside", str(stage), *map(str, more.values())])
    plain = f"{beside}-not"
    two.fit(config(lab, plain, zero__stage=stage, checkpoint__asynchronous=False, **more))
    two.fit(config(lab, beside, zero__stage=stage, **more))
    for step in (4, STEPS):
        ours, wanted = (
            lab / "runs" / run / "checkpoints" / checkpoint.name(step) for run in (beside, plain)
        )
        assert checkpoint.verify(ours) is None
        assert sorted(p.name for p in ours.rglob("*")) == sorted(p.name for p in wanted.rglob("*"))
        mine, theirs = shards(ours), shards(wanted)
        assert mine.keys() == theirs.keys()
        for file in theirs:
            assert theirs[file]
            for a, b in zip(mine[file], theirs[file], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
    cut_back(lab, beside, CUT)
    two.fit(config(lab, beside, zero__stage=stage, **more))
    assert went_on(lab, beside, CUT)
    assert metrics(lab, beside) == metrics(lab, plain)


# Rank 1 is struck in its thread, half-way through its first shard of step 4, once step 5 is done.
CHILD = """
import json, os, signal, sys, time
from tuneloom.config import build
from tuneloom.errors import TrainingError
from tuneloom.train import background
from tuneloom.train.config import TrainConfig
from tuneloom.train.loop import fit
from tuneloom.train.session import Session
fault, at = sys.argv[2], {"step": 0}
record, write = Session.record, background.Background._write
def recorded(self, *arguments, **named):
    at["step"] = self.step
    return record(self, *arguments, **named)
def struck(self, writes):
    if "-000004-" not in self._torn.name or os.environ["RANK"] != "1":
        return write(self, writes)
    writes[0].run()
    os.truncate(writes[0].path, writes[0].path.stat().st_size // 2)
    while at["step"] < 5:
        time.sleep(0.01)
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(28, "No space left on device")
Session.record, background.Background._write = recorded, struck
try:
    fit(build(TrainConfig, json.loads(sys.argv[1])))
except TrainingError as error:
    sys.exit(str(error))
"""


def struck(lab: Path, run_id: str, fault: str) -> list[tuple[int, str]]:
    """Exit code and errors of each of two ranks; the save of step 2 is whole."""
    settings = config(lab, run_id, zero__stage=2, checkpoint__every=2, steps=40)
    shared = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, json.dumps(settings), fault],
            env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE,
        )
        for r in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120)[1].decode() for process in ranks]
    return [(process.returncode, text) for process, text in zip(ranks, said, strict=True)]


def left(lab: Path, run_id: str) -> list[str]:
    return sorted(p.name for p in (lab / "runs" / run_id / "checkpoints").iterdir())


def test_killed_while_it_is_written_the_one_before_stays_and_resumes_to_the_same_bits(
    lab: Path, two: Gang
) -> None:
    outcomes = struck(lab, "beside-killed", "killed")
    assert outcomes[1][0] == -9 and outcomes[0][0] != 0, outcomes
    torn, whole = left(lab, "beside-killed")
    assert torn.startswith(".torn-step-000004-") and whole == checkpoint.name(2)
    settings: dict[str, object] = {"zero__stage": 2, "checkpoint__every": 2, "steps": 40}
    two.fit(config(lab, "beside-killed", **settings))
    record = json.loads((lab / "runs/beside-killed/run.json").read_text())
    assert record["resumed_from"] == whole
    two.fit(config(lab, "beside-alive", **settings))
    assert metrics(lab, "beside-killed") == metrics(lab, "beside-alive")


def test_a_rank_that_cannot_write_ends_the_run_at_the_next_step_on_all_ranks(lab: Path) -> None:
    outcomes = struck(lab, "beside-full", "full")
    assert [code for code, _ in outcomes] == [1, 1], outcomes
    for _, said in outcomes:
        assert "step 4 could not be saved" in said and "disk full" in said, said
    assert left(lab, "beside-full") == [checkpoint.name(2)]
    assert len(metrics(lab, "beside-full")) in (5, 6)


def test_a_stop_waits_until_its_save_is_a_checkpoint(lab: Path, two: Gang) -> None:
    folder = lab / "runs/beside-stopped"
    folder.mkdir(parents=True)
    (folder / "stop").touch()
    with pytest.raises(Stopped, match="after step 1"):
        two.fit(config(lab, "beside-stopped", zero__stage=2))
    assert left(lab, "beside-stopped") == [checkpoint.name(1)]
    assert checkpoint.verify(folder / "checkpoints" / checkpoint.name(1)) is None
