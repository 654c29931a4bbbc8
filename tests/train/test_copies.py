"""Copies of the state in host memory: a rank lost costs one step, a host as well, and no bit."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tuneloom.errors import TRAINING, RefusedError
from tuneloom.testing import Gang, exposures, free_port, metrics, small_config
from tuneloom.train import checkpoint, shm
from tuneloom.train.copies import Parts, choose, neighbours

STEPS = 8

# Rank 1 is killed in step 6: before it, half-way through its copy of step 5, or while step 6 is
# saved to disk; or its disk is full under that save, beside training as well, under the row of step
# 5, or when copies become a checkpoint. Each rank may have a memory of its own, as on two hosts.
CHILD = """
import errno, json, os, signal, sys
from contextlib import nullcontext
from pathlib import Path
from tuneloom.config import build
from tuneloom.errors import TuneloomError
from tuneloom.testing import cramped_files
from tuneloom.train import background, checkpoint, copies, metrics, shm
from tuneloom.train.config import TrainConfig
from tuneloom.train.loop import fit
from tuneloom.train.session import Session
config, kill, hosts = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
rank = os.environ["RANK"]
if hosts:
    shm.ROOT = Path(hosts) / rank
agree, facts_of, write_share = Session.agree, copies.part_facts, checkpoint.write_share
write_row, write_beside = metrics.Metrics.write, background.Background._write
copied = copies._copied
def struck_between(self, micros):
    if self.step == 5 and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return agree(self, micros)
def struck_inside(folder):
    if folder.name.startswith(".torn-step-000005-") and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return facts_of(folder)
def struck_saving(engine, torn, *more):
    if torn.parent.name == "checkpoints" and "-000006-" in torn.name and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return write_share(engine, torn, *more)
def full(root, step):
    there = root.name == "checkpoints" and "-000006-" in step and rank == "1"
    return cramped_files(1000) if there else nullcontext()
def full_saving(engine, torn, *more):
    with full(torn.parent, torn.name):
        return write_share(engine, torn, *more)
def full_beside(self, writes):  # in a thread: a limit of the process would reach the copies
    if "-000006-" in self._torn.name and rank == "1":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write_beside(self, writes)
def full_rescue(part, torn, known):
    with full(torn.parent, torn.name):
        return copied(part, torn, known)
def full_row(self, row):
    with cramped_files(0) if row["step"] == 5 else nullcontext():
        return write_row(self, row)
def struck_loading(self, found):
    if rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
if kill == "loading":
    Session._restore = struck_loading
if kill == "between":
    Session.agree = struck_between
if kill == "inside":
    copies.part_facts = struck_inside
if kill == "saving":
    checkpoint.write_share = struck_saving
if kill == "full":
    checkpoint.write_share, background.Background._write = full_saving, full_beside
if kill == "rescue":
    copies._copied = full_rescue
if kill == "row":
    metrics.Metrics.write = full_row
try:
    fit(build(TrainConfig, config))
except TuneloomError as error:
    os._exit(error.exit_code)  # as train/__main__.py leaves
"""


def config(lab: Path, run_id: str, **dotted: object) -> dict[str, object]:
    shared: dict[str, object] = {
        "steps": STEPS, "method__dropout": 0.1, "checkpoint__every": 3,
        "checkpoint__memory_every": 1, "zero__stage": 2,
    }  # fmt: skip
    return small_config(lab, run_id, **(shared | dotted))


def ranks(settings: dict[str, object], kill: str = "", hosts: Path | None = None) -> list[int]:
    """Exit codes of two ranks that train in processes of their own."""
    shared = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, json.dumps(settings), kill, str(hosts or "")],
            env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.DEVNULL,
        )
        for r in range(2)
    ]  # fmt: skip
    return [process.wait(150) for process in started]


def resumed_from(lab: Path, run_id: str) -> str:
    record = json.loads((lab / "runs" / run_id / "run.json").read_text())
    return str(record["resumed_from"])


def uninterrupted(lab: Path, gang: Gang, stage: int, sequence: int = 1) -> str:
    """The run that the others must equal, trained once."""
    run_id = f"remembered-{stage}-{sequence}"
    if not (lab / "runs" / run_id).exists():
        more = {"zero__stage": stage, "batch__sequence_parallel": sequence}
        gang.fit(config(lab, run_id, checkpoint__memory_every=0, **more))
    return run_id


@pytest.mark.parametrize(
    ("kill", "stage", "sequence", "kept"),
    [("between", 2, 1, 5), ("inside", 3, 1, 4), ("saving", 2, 1, 5), ("between", 2, 2, 5)],
)
def test_a_killed_rank_costs_the_step_it_was_in_and_no_bit(
    lab: Path, two: Gang, kill: str, stage: int, sequence: int, kept: int
) -> None:
    whole, run_id = uninterrupted(lab, two, stage, sequence), f"killed-{kill}-{sequence}"
    settings = config(lab, run_id, zero__stage=stage, batch__sequence_parallel=sequence)
    codes = ranks(settings, kill)
    assert codes[1] == -9 and codes[0] != 0
    base = shm.ROOT / shm.name_of(lab / "runs" / run_id)
    assert base.exists() and base.stat().st_mode & 0o777 == 0o700
    on_disk = checkpoint.ordered(lab / "runs" / run_id / "checkpoints")
    assert [folder.name for folder in on_disk] == [checkpoint.name(3)]
    two.fit(settings)
    assert resumed_from(lab, run_id) == checkpoint.name(kept)
    assert metrics(lab, run_id) == metrics(lab, whole)
    assert exposures(lab, run_id) == exposures(lab, whole)
    assert not base.exists()


@pytest.mark.parametrize(
    ("kill", "more", "kept"),
    [("full", {}, 6), ("full", {"checkpoint__asynchronous": True}, 6), ("row", {}, 4)],
)
def test_a_full_disk_costs_a_step_at_most_and_no_bit(
    lab: Path, two: Gang, kill: str, more: dict[str, object], kept: int
) -> None:
    """A save every 3 steps: without the copies it costs 3, and 2."""
    run_id = f"full-{kill}-{len(more)}"
    run, settings = lab / "runs" / run_id, config(lab, run_id, **more)
    assert ranks(settings, kill)[0] == TRAINING
    base = shm.ROOT / shm.name_of(run)
    shm.forget_run(run)  # as its launcher ends
    assert [f.name for f in checkpoint.ordered(run / "checkpoints")] == [checkpoint.name(3)]
    if kept == 6:  # the disk is full still
        assert ranks(settings, "rescue") == [TRAINING, TRAINING]
        shm.forget_run(run)
    two.fit(settings)
    assert resumed_from(lab, run_id) == checkpoint.name(kept)
    assert metrics(lab, run_id) == metrics(lab, uninterrupted(lab, two, 2))
    assert exposures(lab, run_id) == exposures(lab, uninterrupted(lab, two, 2))
    assert not base.exists()


def test_copies_do_not_wait_on_a_node_that_a_batch_job_gives_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert not shm.keep(tmp_path) and not list(tmp_path.iterdir())
    monkeypatch.delenv("SLURM_JOB_ID")
    assert shm.keep(tmp_path) and [p.name for p in tmp_path.iterdir()] == [shm.KEPT]


def test_a_lost_host_costs_one_step_as_the_neighbour_has_its_part(
    lab: Path, two: Gang, tmp_path: Path
) -> None:
    whole = uninterrupted(lab, two, 2)
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    settings = config(lab, "one-host")
    assert ranks(settings, "between", tmp_path)[1] == -9
    shutil.rmtree(tmp_path / "1")  # its memory went with it; another takes its place
    (tmp_path / "1").mkdir()
    assert ranks(settings, hosts=tmp_path) == [0, 0]
    assert resumed_from(lab, "one-host") == checkpoint.name(5)
    assert metrics(lab, "one-host") == metrics(lab, whole)
    assert exposures(lab, "one-host") == exposures(lab, whole)
    assert list(tmp_path.glob("*/tuneloom-*")) == []


def test_a_damaged_copy_is_not_used(lab: Path, two: Gang) -> None:
    settings = config(lab, "damaged-copy")
    assert ranks(settings, "between")[1] == -9
    base = shm.ROOT / shm.name_of(lab / "runs/damaged-copy")
    shard = next((base / "rank-00001" / checkpoint.name(5)).rglob("*_optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    two.fit(settings)
    assert resumed_from(lab, "damaged-copy") == checkpoint.name(4)
    assert metrics(lab, "damaged-copy") == metrics(lab, uninterrupted(lab, two, 2))


def test_a_step_gone_back_to_by_name_is_not_undone_by_older_copies(lab: Path, two: Gang) -> None:
    settings = config(lab, "gone-back")
    assert ranks(settings, "between")[1] == -9
    named = settings | {"resume": f"{lab}/runs/gone-back/checkpoints/{checkpoint.name(3)}"}
    assert ranks(named, "loading")[1] == -9
    two.fit(named)
    assert resumed_from(lab, "gone-back") == checkpoint.name(3)
    assert metrics(lab, "gone-back") == metrics(lab, uninterrupted(lab, two, 2))


HAUNTED = """
import json, sys
from tuneloom.config import build
from tuneloom.train import checkpoint, copies
from tuneloom.train.config import TrainConfig
from tuneloom.train.loop import fit

begin = copies.Copies.__init__

def begin_haunted(self, base, run, world):
    begin(self, base, run, world)
    for name in (checkpoint.name(2), ".torn-" + checkpoint.name(3)):
        (base / "rank-00000" / name / checkpoint.ENGINE).mkdir(parents=True)
        (base / "rank-00000" / name / checkpoint.ENGINE / "old").write_text("of the gang before")

copies.Copies.__init__ = begin_haunted
fit(build(TrainConfig, json.loads(sys.argv[1])))
"""


def test_what_a_dying_gang_still_writes_into_memory_does_not_end_the_next_one(lab: Path) -> None:
    """Its part of a step that comes again, whole and half."""
    config = small_config(lab, "haunted", steps=5, checkpoint__memory_every=1)
    done = subprocess.run(
        [sys.executable, "-c", HAUNTED, json.dumps(config)], capture_output=True, text=True,
        timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert metrics(lab, "haunted", "step") == [1, 2, 3, 4, 5]


def test_copies_of_a_run_that_was_made_anew_are_not_found(lab: Path, one: Gang) -> None:
    run = lab / "runs/anew"
    run.mkdir(parents=True)
    before = shm.name_of(run)
    shutil.rmtree(run)
    run.mkdir()
    assert shm.name_of(run) != before
    (run / shm.TOKEN).write_text("")  # a disk was full
    assert len(shm.name_of(run)) == len(before)


def part(step: int, gang: str = "a", world_size: int = 2) -> dict[str, object]:
    return {"step": step, "gang": gang, "world_size": world_size}


@pytest.mark.parametrize(
    ("views", "step", "holders"),
    [
        ([{(0, 5): part(5), (0, 4): part(4)}, {(1, 4): part(4)}], 4, {0: 0, 1: 1}),
        ([{(0, 5): part(5), (1, 5): part(5)}, {}], 5, {0: 0, 1: 0}),
        ([{(0, 5): part(5), (1, 5): part(5)}] * 2, 5, {0: 0, 1: 1}),
        ([{(0, 5): part(5)}, {(1, 5): part(5, "b")}], None, {}),
        ([{(0, 2): part(2), (1, 2): part(2)}, {}], None, {}),
    ],
)
def test_the_newest_step_is_chosen_that_all_parts_of_one_gang_are_left_of(
    views: list[Parts], step: int | None, holders: dict[int, int]
) -> None:
    choice = choose(views, newer_than=2)
    assert (choice.step if choice else None) == step
    assert choice is None or choice.holders == holders


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [("aa", [None, None]), ("ab", [1, 0]), ("aabb", [2, 3, 0, 1]), ("aab", [2, 2, 0])],
)
def test_copies_go_to_another_host(hosts: str, expected: list[int | None]) -> None:
    assert neighbours(list(hosts)) == expected


def test_copies_in_a_folder_that_others_can_write_are_refused(tmp_path: Path) -> None:
    base = tmp_path / "tuneloom-x"
    base.mkdir(0o755)
    with pytest.raises(RefusedError, match="is not this user's alone"):
        shm.open_base(base, tmp_path)


def test_what_a_lost_launcher_left_is_swept_after_an_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "ROOT", tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    base = tmp_path / shm.name_of(run)
    shm.open_base(base, tmp_path)
    shm.sweep()
    assert base.exists()
    for file in base.iterdir():
        os.utime(file, (0, 0))
    shm.sweep()
    assert not base.exists()


def test_the_next_job_on_a_host_can_tell_whose_the_copies_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It removes those of a job that has no process there (slurm/finetune.sbatch)."""
    for job in ("7", "8"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        shm.open_base(tmp_path / "tuneloom-x", tmp_path)
        assert (tmp_path / "tuneloom-x/job").read_text(encoding="utf-8") == job


def start_of_a_rank(base: Path) -> str | None:
    """What each rank of a host does at its start, all at once; why it failed."""
    try:
        shm.sweep()
        shm.forget(base)
    except OSError as error:
        return repr(error)
    return None


def test_ranks_of_a_host_sweep_while_another_gives_the_copies_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that failed there left the others in a collective (29 of 4,000 starts)."""
    monkeypatch.setattr(shm, "ROOT", tmp_path)
    base = tmp_path / "tuneloom-x"
    with ThreadPoolExecutor(4) as ranks:
        for _ in range(400):
            shm.open_base(base, tmp_path)
            for rank in range(4):
                (base / f"rank-{rank:05d}").mkdir()
            assert list(ranks.map(start_of_a_rank, [base] * 4)) == [None] * 4
            assert not base.exists()


def test_a_launcher_that_ends_takes_its_runs_copies_but_not_those_of_a_run_that_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "ROOT", tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    base = tmp_path / shm.name_of(run)
    shm.open_base(base, tmp_path)
    with (run / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shm.forget_run(run)
        assert base.exists()
    shm.forget_run(run)
    assert not base.exists()
