"""Death at every file boundary of a save: the next run takes a whole checkpoint or the one before.

What a killed process leaves is what is on disk at that moment, so each rank copies the run folder
before every open for writing, rename, deletion and fsync of the save of step 4, and half-way
through each shard. Each copy is a death; some of them are resumed and compared to the bit.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tuneloom.testing import Gang, free_port, metrics, small_config
from tuneloom.train import checkpoint

SEED = 20261122
CHILD = """
import json, os, shutil, sys
from pathlib import Path
from tuneloom.config import build
from tuneloom.train import background, checkpoint, distributed
from tuneloom.train.config import TrainConfig
from tuneloom.train.loop import fit

target, rank, at = Path(sys.argv[1]), os.environ["RANK"], dict(saving=False, deaths=0)

def died(event):
    if not at["saving"]:
        return
    at["saving"] = False  # what the copy itself opens is no boundary
    at["deaths"] += 1
    copy = target / f"{at['run'].name}-{rank}-{at['deaths']:03d}"
    for _ in range(50):
        try:
            shutil.copytree(at["run"], copy)
            break
        except shutil.Error:  # the other rank renamed a file meanwhile
            shutil.rmtree(copy)
    at["saving"] = True

def boundary(event, arguments):
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & 3
    if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
        died(event)

def saving(save):
    def call(*arguments, **named):
        at["saving"] = named["step"] == 4
        save(*arguments, **named)
        died("saved")
        at["saving"] = False
    return call

def beside(save):
    def call(self, *arguments, **named):
        at["saving"] = at["saving"] or named["step"] == 4
        return save(self, *arguments, **named)
    return call

def settled(work):
    def call(self, *arguments):
        result = work(self, *arguments)
        if at["saving"] and self._state == "idle" and self._manifest.get("step") == 4:
            died("saved")
            at["saving"] = False
        return result
    return call

def at_once(self, work):
    task = background.Task(work)
    task.run()
    return task

def halved(write):
    def call(state, path, **named):
        write(state, path, **named)
        content = Path(path).read_bytes()
        os.truncate(path, len(content) // 2)
        died("half of a shard")
        os.truncate(path, 0)
        with os.fdopen(os.open(path, os.O_WRONLY), "wb") as file:
            file.write(content)
    return call

def before(work):
    def call(*arguments):
        died("fsync")
        return work(*arguments)
    return call

sys.addaudithook(boundary)
checkpoint.save, os.fsync = saving(checkpoint.save), before(os.fsync)
background.Background.save = beside(background.Background.save)
background.Background.note = settled(background.Background.note)
background.Background.settle = settled(background.Background.settle)
background.Writer.start = at_once  # a copy of the folder is a death where nobody writes meanwhile
checkpoint.torch.save = halved(checkpoint.torch.save)
distributed.start()
for text in sys.argv[2:]:
    config = build(TrainConfig, json.loads(text))
    at |= dict(run=Path(config.run.root) / config.run.id, deaths=0)
    fit(config)
"""


KINDS = [*(f"torn{stage}" for stage in range(4)), "beside0", "beside2", "beside3"]
"""Synchronous saves by ZeRO stage, and those of `checkpoint.asynchronous`."""


def settings(lab: Path, run_id: str) -> dict[str, object]:
    """Of a kind, and of copies, whose names begin with it."""
    return small_config(
        lab, run_id, steps=5, zero__stage=int(run_id.partition("-")[0][-1]), checkpoint__every=2,
        checkpoint__keep=1, checkpoint__asynchronous=run_id.startswith("beside"),
        method__dropout=0.1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def deaths(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies <kind>-<rank>-<number> of the run folders, of all kinds and both ranks."""
    folder = tmp_path_factory.mktemp("deaths")
    configs = [json.dumps(settings(lab, kind)) for kind in KINDS]
    shared = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder), *configs],
            env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE,
        )
        for r in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=400)[1].decode() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said[0][-2000:] + said[1][-2000:]
    return folder


def steps_found(folders: Iterable[Path]) -> list[int | None]:
    """What the next run would resume from after each death, in order."""
    found = []
    for run in sorted(folders):
        newest = checkpoint.newest(run / "checkpoints")
        found.append(newest.step if newest else None)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_death_anywhere_in_a_save_leaves_the_new_checkpoint_or_the_one_before(
    deaths: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (steps_found(deaths.glob(f"{kind}-{rank}-*")) for rank in (0, 1))
    assert len(first) > 20 and len(second) > 2
    assert set(first) == {2, 4} and first == sorted(first), first
    assert set(second[:-1]) == {2} and second[-1] == 4, second
    assert "damaged" not in capsys.readouterr().out, "half a save or half a deletion is no damage"


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_after_a_death_in_a_save_gives_the_same_bits(
    lab: Path, two: Gang, deaths: Path, kind: str
) -> None:
    whole = metrics(lab, kind)
    rng = random.Random(f"{SEED}{kind}")
    for rank in (0, 1):
        death = rng.choice(sorted(deaths.glob(f"{kind}-{rank}-*")))
        shutil.copytree(death, lab / "runs" / death.name)
        run = lab / "runs" / death.name
        (before,) = steps_found([run])
        two.fit(settings(lab, death.name))
        record = json.loads((run / "run.json").read_text())  # begun anew, the losses were the same
        assert before and record["resumed_from"] == checkpoint.name(before), death.name
        assert metrics(lab, death.name) == whole, death.name
        kept = [path.name for path in (lab / "runs" / death.name / "checkpoints").iterdir()]
        assert kept == [checkpoint.name(5)], death.name
