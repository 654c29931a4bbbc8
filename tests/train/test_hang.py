"""A hang is found in time and by name: a stopped rank, a stall in data or save, crossed calls."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tuneloom.errors import TRAINING, DataError
from tuneloom.testing import Gang, free_port, metrics, small_config
from tuneloom.train.distributed import World, record_flights
from tuneloom.train.hangs import Seen, Standing, judge
from tuneloom.train.watchdog import keep_flight, keep_ras

ROOT = Path(__file__).parent.parent.parent
SECONDS = 4
STARTUP = 8
STEP = 3

# Rank 1 does what `sys.argv[2]` says in step 3 (the save: of step 3), or before the first.
TRAIN = """
import json, os, signal, sys, time
from pathlib import Path
from tuneloom.train import watchdog
rank, fault, struck = os.environ["RANK"], sys.argv[2], Path(sys.argv[3])
startup = float(sys.argv[4])
if startup:
    watchdog.STARTUP_SECONDS = startup
    watchdog.READING_SECONDS = 100 if fault == "slow-weights" else startup
from tuneloom.config import build
from tuneloom.train import checkpoint, distributed, probe
from tuneloom.train.config import TrainConfig
from tuneloom.train.feed import Feed
from tuneloom.train.loop import fit
from tuneloom.train.session import Session
from transformers import AutoModelForCausalLM
def sleep(seconds=1000):
    struck.touch()
    time.sleep(seconds)
def at_step(owner, name, do):
    real = getattr(owner, name)
    def faulty(self, *arguments, **named):
        if rank == "1" and getattr(self, "step", None) in (None, 2):
            do(self)
        return real(self, *arguments, **named)
    setattr(owner, name, faulty)
def first(owner, name, do):
    real = getattr(owner, name)
    def faulty(*arguments, **named):
        if rank == "1":
            do()
        return real(*arguments, **named)
    setattr(owner, name, faulty)
def sleep_in_data(session):
    session.feed.next_step = sleep
def stop(session):
    struck.touch()
    os.kill(os.getpid(), signal.SIGSTOP)
def cross(session):
    struck.touch()
    distributed.broadcast_object(None)
if fault == "stopped":
    at_step(Session, "agree", stop)
if fault == "data":
    at_step(Session, "progress", sleep_in_data)
if fault == "save":
    first(checkpoint, "_hash_share", sleep)
if fault == "crossed":
    at_step(Session, "agree", cross)
if fault == "weights":
    first(AutoModelForCausalLM, "from_pretrained", sleep)
if fault == "resume":
    first(checkpoint, "newest", sleep)
if fault == "probe":
    first(probe, "isolation", sleep)
if fault == "slow-weights":
    first(AutoModelForCausalLM, "from_pretrained", lambda: sleep(2 * startup))
fit(build(TrainConfig, json.loads(sys.argv[1])))
"""


def ranks_with(lab: Path, fault: str, *, startup: float = 0.0, **settings: Any) -> Any:
    """Two ranks, of which the second has the fault; and the file that it touches when it does."""
    run_id = f"hang-{fault}"
    settings = {"train__hang_seconds": SECONDS, "checkpoint__every": STEP, "steps": 20} | settings
    config = small_config(lab, run_id, **settings)
    environment = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    struck = lab / f"{run_id}-struck"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, json.dumps(config), fault, str(struck), str(startup)],
            env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE, text=True,
        )
        for r in range(2)
    ]  # fmt: skip
    return ranks, struck


def strike(lab: Path, fault: str, startup: float = 0.0) -> tuple[dict[str, Any], float, str]:
    """Report, seconds from the fault to the report, and what rank 0 printed."""
    ranks, struck = ranks_with(lab, fault, startup=startup, train__probe=fault == "probe")
    said = ranks[0].communicate(timeout=120)[0]
    assert ranks[0].returncode == TRAINING
    if fault == "stopped":
        ranks[1].send_signal(signal.SIGKILL)
    ranks[1].communicate(timeout=30)
    folder = lab / f"runs/hang-{fault}/hang"
    report = folder / "report.json"
    for rank in (0, 1):
        assert "hread" in (folder / f"rank-{rank:05d}.txt").read_text()
    seconds = report.stat().st_mtime - struck.stat().st_mtime
    return json.loads(report.read_text()), seconds, said


@pytest.mark.parametrize(
    ("fault", "kind", "at_fault", "where"),
    [
        ("stopped", "missing rank", [1], "does not answer"),
        ("data", "data stall", [1], "train/loop.py"),
        ("save", "save stall", [1], "train/checkpoint.py"),
        ("crossed", "mismatched collective", [0, 1], "broadcast_object_list"),
    ],
)
def test_a_hang_names_the_rank_its_kind_and_where_it_stands(
    lab: Path, fault: str, kind: str, at_fault: list[int], where: str
) -> None:
    report, seconds, said = strike(lab, fault)
    assert (report["kind"], report["ranks"]) == (kind, at_fault)
    assert where in report["sentence"] and f"hang: {report['sentence']}" in said
    assert seconds < SECONDS + 5
    if fault == "stopped":
        seen = re.search(
            r"last seen \d+ s ago after step (\d) in phase \w+ at train/", report["sentence"]
        )
        assert seen and int(seen[1]) <= STEP - 1
        # Where Linux lets it, py-spy has read the stack of the rank that could not write it.
        assert "faulty" in (lab / "runs/hang-stopped/hang/rank-00001.txt").read_text()


@pytest.mark.parametrize(
    ("fault", "where"),
    [("weights", "train/model.py"), ("resume", "train/session.py"), ("probe", "train/session.py")],
)
def test_a_hang_before_the_first_step_names_the_rank_and_where_it_stands(
    lab: Path, fault: str, where: str
) -> None:
    report, seconds, said = strike(lab, fault, startup=STARTUP)
    assert (report["kind"], report["ranks"]) == ("start-up stall", [1])
    assert f"no progress for {STARTUP} s" in report["sentence"]
    assert where in report["sentence"] and f"hang: {report['sentence']}" in said
    assert seconds < STARTUP + 5


def test_weights_may_load_for_longer_than_a_step_may_take_and_nothing_is_left_behind(
    lab: Path,
) -> None:
    ranks, _ = ranks_with(lab, "slow-weights", startup=5, train__hang_seconds=SECONDS, steps=2)
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert len(metrics(lab, "hang-slow-weights")) == 2
    assert not (lab / "runs/hang-slow-weights/hang").exists()


def test_no_watchdog_is_left_of_a_run_that_does_not_get_to_its_first_step(
    lab: Path, one: Gang
) -> None:
    """It would end a process that has gone on to the next run."""
    config = small_config(lab, "refused", train__hang_seconds=1)
    config["data"] = {"path": str(lab / "none.jsonl"), "validation": None}
    with pytest.raises(DataError):
        one.fit(config)
    one.processes[0].join(5)
    assert one.processes[0].is_alive() and not (lab / "runs/refused/hang").exists()


# Says what torch could read when the group was made, and after the run's folder was known.
START = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from tuneloom.train import distributed
def variables():
    return {k: v for k, v in os.environ.items() if k.startswith(("TORCH_FR_", "TORCH_NCCL_"))}
said = []
if sys.argv[1] == "cuda":
    torch.cuda.is_available, torch.cuda.set_device = lambda: True, lambda device: None
dist.init_process_group = lambda *_, **__: said.append(variables())
world = distributed.start()
distributed.record_flights(Path("runs/r/hang"), world)
print(json.dumps([*said, variables()]))
"""


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_flight_recorder_is_on_for_cuda_alone_and_writes_into_the_run(
    tmp_path: Path, device: str
) -> None:
    outer = {k: v for k, v in os.environ.items() if not k.startswith("TORCH_")}
    outer.pop("DS_ACCELERATOR")
    done = subprocess.run(
        [sys.executable, "-c", START, device], env=outer | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    joining, running = json.loads(done.stdout)
    on = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    at = {"TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/runs/r/hang/flight_rank_"}
    assert (joining, running) == ((on, on | at) if device == "cuda" else ({}, {}))


def test_the_watchdog_leaves_the_flight_recorder_where_torch_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library: Any = torch._C
    monkeypatch.setattr(
        library._distributed_c10d, "_dump_nccl_trace", lambda: b"flight", raising=False
    )
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", "")  # so that it is put back
    keep_flight(tmp_path, World(1, 2, 1, torch.device("cpu")))
    assert not list(tmp_path.iterdir())
    on_cuda = World(1, 2, 1, torch.device("cuda", 1))
    keep_flight(tmp_path, on_cuda)
    record_flights(tmp_path, on_cuda)
    assert Path(os.environ["TORCH_FR_DUMP_TEMP_FILE"] + "1").read_bytes() == b"flight"


def test_what_nccl_says_of_its_communicators_is_kept_where_its_client_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, kept = tmp_path / "ncclras", tmp_path / "hang" / "nccl_ras.txt"
    kept.parent.mkdir()
    on_cuda = World(0, 2, 0, torch.device("cuda", 0))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    keep_ras(kept.parent, on_cuda)
    client.write_text('#!/bin/sh\necho "$*"; echo "rank 1 is behind" >&2; exec sleep 60\n')
    client.chmod(0o755)
    keep_ras(kept.parent, World(0, 2, 0, torch.device("cpu")))
    assert not kept.exists()
    keep_ras(kept.parent, on_cuda)
    assert kept.read_text() == "-v -t 2\nrank 1 is behind\n"


def test_ranks_in_different_collectives_are_a_mismatch_and_a_computing_one_a_stall() -> None:
    def standing(rank: int, phase: str, collective: str | None) -> Standing:
        return Standing(rank, f"host{rank}", 1, 7, phase, f"train/x.py:{rank}", collective)

    both = [standing(0, "productive", "all_reduce"), standing(1, "productive", "broadcast")]
    crossed = judge(both, ["host0", "host1"], 5, {})
    assert (crossed.kind, crossed.ranks) == ("mismatched collective", [0, 1])
    alike = [
        Standing(rank, f"host{rank}", 1, 7, "collective", "train/loop.py:92", "all_reduce")
        for rank in (0, 1)
    ]
    cut = judge(alike, ["host0", "host1"], 5, {})
    assert (cut.kind, cut.ranks) == ("no connection", [0, 1])
    saving = [standing(0, "checkpoint", "all_gather_object"), standing(1, "checkpoint", None)]
    stalled = judge(saving, ["host0", "host1"], 5, {})
    assert (stalled.kind, stalled.ranks) == ("save stall", [1])
    assert "rank 1 on host1 stands at train/x.py:1" in stalled.sentence
    gone = judge(both, ["host0", "host1", "host2"], 5, {2: Seen(standing(2, "data", None), 6.2)})
    assert (gone.kind, gone.ranks) == ("missing rank", [2]) and "host2" in gone.sentence
    assert "last seen 6 s ago after step 7 in phase data at train/x.py:2" in gone.sentence
