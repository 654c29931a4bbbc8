"""Ray, torchrun and one process: the same config, the same order, the same bits."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tuneloom import cli
from tuneloom.config import build
from tuneloom.errors import Stopped
from tuneloom.launch import supervise
from tuneloom.launch.config import LaunchConfig
from tuneloom.testing import free_port, metrics, small_config
from tuneloom.train import shm
from tuneloom.train.config import TrainConfig
from tuneloom.train.metrics import PHASES

STEPS = 8


def overrides(lab: Path, run_id: str, *more: str) -> list[str]:
    return [
        f"run.root={lab}/runs", f"run.id={run_id}", f"model.path={lab}/base", "model.dtype=fp32",
        f"data.path={lab}/rows.jsonl", "data.validation=null", "batch.max_length=128",
        "batch.tokens=512", "batch.window=64", "optim.lr=5e-3", "optim.warmup_steps=2",
        "tracker=off", "zero=stage2", "epochs=100", f"steps={STEPS}", "train.drill=false", *more,
    ]  # fmt: skip


def run(*command: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def torchrun(lab: Path, run_id: str, ranks: int, *more: str) -> subprocess.CompletedProcess[str]:
    return run(
        "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}",
        "-m", "tuneloom.train", *overrides(lab, run_id, *more),
    )  # fmt: skip


@pytest.fixture(scope="module")
def by_torchrun(lab: Path) -> list[float]:
    done = torchrun(lab, "torchrun2", 2)
    assert done.returncode == 0, done.stderr
    return metrics(lab, "torchrun2")


def test_ray_gives_torchruns_bits_and_rows(lab: Path, by_torchrun: list[float]) -> None:
    done = run(
        "-m", "tuneloom", "train", *overrides(lab, "ray2", "launch=local", "launch.workers=2")
    )
    assert done.returncode == 0, done.stderr
    assert metrics(lab, "ray2") == by_torchrun
    rows = [pq.read_table(lab / "runs" / r / "exposure.parquet") for r in ("ray2", "torchrun2")]
    assert rows[0].equals(rows[1])
    digests = [
        json.loads((lab / "runs" / r / "run.json").read_text())["config_digest"]
        for r in ("ray2", "torchrun2")
    ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("asked", "code", "said"),
    [
        (["launch=local", "launch.nodes=2", "launch.workers=2"], 2, "is this machine alone, got 2"),
        (["launch=inline", "launch.nodes=2", "launch.workers=2"], 2, "this machine alone, got 2"),
        (["launch=local", "launch.workers=16", "launch.gpus_per_worker=1"], 4, "need 16 GPUs"),
    ],
)
def test_what_this_machine_will_never_hold_is_not_waited_for(
    lab: Path, asked: list[str], code: int, said: str
) -> None:
    """It waited 300 s for room."""
    done = run("-m", "tuneloom", "train", *overrides(lab, "too-large", *asked))
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert "room for" not in done.stdout


def test_under_torchrun_a_run_without_an_id_is_refused(lab: Path) -> None:
    """It would begin anew, under another, after each restart."""
    done = torchrun(lab, "null", 2, f"run.root={lab}/nameless")
    assert done.stderr.count("tuneloom train: run.id: torchrun starts ranks anew") == 1, done.stderr
    assert done.returncode and not (lab / "nameless").exists()


def test_inline_gives_the_bits_of_torchrun_with_one_rank(lab: Path) -> None:
    assert torchrun(lab, "torchrun1", 1).returncode == 0
    done = run("-m", "tuneloom", "train", *overrides(lab, "inline1", "launch=inline"))
    assert done.returncode == 0, done.stderr
    assert metrics(lab, "inline1") == metrics(lab, "torchrun1")


def test_two_ranks_by_two_give_the_curve_of_one_by_four(
    lab: Path, by_torchrun: list[float]
) -> None:
    done = torchrun(lab, "one-by-two", 1, "batch.accumulation=2")
    assert done.returncode == 0, done.stderr
    assert metrics(lab, "one-by-two") == pytest.approx(by_torchrun, rel=1e-5)


UNDER_RAY = """
import sys
from tuneloom import cli
from tuneloom.errors import RefusedError
from tuneloom.launch import supervise

places_of = supervise.places_of


def told(actors):
    raise RefusedError(f"seen {[p['devices']['CUDA_VISIBLE_DEVICES'] for p in places_of(actors)]}")


supervise.places_of = told
sys.exit(cli.main(sys.argv[1:]))
"""
INLINE = """
import os, sys
from tuneloom import cli
from tuneloom.errors import RefusedError
from tuneloom.launch import run


def check(job):
    assert "torch" not in sys.modules
    raise RefusedError(f"seen {[os.environ['CUDA_VISIBLE_DEVICES']]}")


run.check = check
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("script", "launch", "gpus", "seen"),
    [(UNDER_RAY, "local", "0", ""), (INLINE, "inline", "0", ""), (INLINE, "inline", "auto", "7")],
)
def test_a_rank_that_asks_for_no_gpu_sees_none_of_a_host_that_has_some(
    lab: Path, monkeypatch: pytest.MonkeyPatch, script: str, launch: str, gpus: str, seen: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    keys = f"launch={launch}", f"launch.gpus_per_worker={gpus}"
    done = run("-c", script, "train", *overrides(lab, "hidden", *keys))
    assert f"seen {[seen]}" in done.stderr, done.stderr


def test_whether_ranks_hold_a_gpu_is_decided_once(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The node with the GPUs goes with the first attempt."""
    seen: list[int] = []

    def run_gang(config: TrainConfig, launch: LaunchConfig, gpus: int, *more: object) -> str | None:
        seen.append(gpus)
        monkeypatch.setattr("ray.cluster_resources", dict)
        return "a worker was lost" if len(seen) == 1 else None

    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 2.0})
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True}, {"Alive": False}])
    monkeypatch.setattr(supervise, "run_gang", run_gang)
    config, launch = build(TrainConfig, small_config(lab, "x")), LaunchConfig(kind="ray")
    supervise.attempts(config, launch, [], None)
    assert seen == [1, 1] and "no GPU" not in capsys.readouterr().out
    supervise.attempts(config, launch, [], None)
    assert "launch.gpus_per_worker=auto: no GPU in this cluster" in capsys.readouterr().out
    # A second node that may have them has its time to join; then processors it is.
    waits = LaunchConfig(kind="ray", nodes=2, workers=2, min_workers=1, wait_seconds=1)
    started = time.monotonic()
    supervise.attempts(config, waits, [], None)
    assert time.monotonic() - started >= 1 and seen[-1] == 0
    with pytest.raises(Stopped, match="1 of 2 nodes had joined"):
        supervise.attempts(config, waits, [signal.SIGTERM], None)
    found = iter([{}, {"GPU": 8.0}])
    monkeypatch.setattr("ray.cluster_resources", lambda: next(found))
    supervise.attempts(config, waits, [], None)
    assert seen[-1] == 1


def test_sigterm_while_ray_starts_ends_with_75(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(**options: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as Ray's does
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr("tuneloom.launch.head.listens", lambda address: True)
    monkeypatch.setattr("ray.init", init)
    assert cli.main(["train", *overrides(lab, "early", "launch=ray")]) == 75
    assert "stopped on a signal while Ray started" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://127.0.0.1:8265", "RAY_ADDRESS: expected HOST:PORT"),
        ("localhost", "RAY_ADDRESS: expected HOST:PORT"),
        ("127.0.0.1:1", "RAY_ADDRESS: nobody answers at 127.0.0.1:1"),
    ],
)
def test_an_address_without_a_head_is_refused(
    lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    address: str, said: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("tuneloom.launch.head.SILENT_SECONDS", 0.0)
    assert cli.main(["train", *overrides(lab, "headless", "launch=ray")]) == 4
    assert said in capsys.readouterr().err


def wait_for_step(lab: Path, run_id: str, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        path = lab / "runs" / run_id / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"{run_id} did not reach step {step}; exit {process.poll()}")


def started(lab: Path, run_id: str, *more: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tuneloom", "train",
         *overrides(lab, run_id, "launch=local", "launch.workers=2", "steps=4000", "epochs=100000",
                    "checkpoint.every=20", *more)],
        stdout=(lab / f"{run_id}.log").open("wb"), stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_sigterm_to_the_driver_saves_the_step_and_exits_75(lab: Path) -> None:
    process = started(lab, "terminated")
    wait_for_step(lab, "terminated", 3, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    last = json.loads((lab / "runs/terminated/metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert (lab / "runs/terminated/latest").read_text().strip() == f"step-{last:06d}"
    assert json.loads((lab / "runs/terminated/run.json").read_text())["state"] == "stopped"


def test_a_killed_worker_costs_at_most_one_checkpoint_interval_and_no_row(lab: Path) -> None:
    before_all = time.time()
    process = started(lab, "bereft")
    wait_for_step(lab, "bereft", 25, process)
    os.kill(ranks_of(process)[-1], signal.SIGKILL)
    before = len((lab / "runs/bereft/metrics.jsonl").read_text().splitlines())
    wait_for_step(lab, "bereft", before + 5, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    rows = [json.loads(r) for r in (lab / "runs/bereft/metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "train/loss" in row]
    assert steps == list(range(1, len(steps) + 1))
    # What the restart cost is booked at once, on the step it went on from.
    lost = [row["step"] for row in rows if row["time/lost"] > 0]
    assert len(lost) == 1 and lost[0] % 20 == 0
    # Both attempts' seconds are those since the command was started, each once.
    attempts = json.loads((lab / "runs/bereft/run.json").read_text())["attempts"]
    assert len(attempts) == 2
    wall = rows[-1]["at"] - attempts[0]["clock"]["command"]
    booked = sum(row.get(f"time/{phase}", 0.0) for row in rows for phase in PHASES)
    assert booked == pytest.approx(wall, abs=1e-6 * len(PHASES) * len(rows))
    assert before_all <= attempts[0]["clock"]["command"] and rows[-1]["at"] <= time.time()
    ledger = {phase: rows[-1][f"goodput/{phase}"] for phase in PHASES}
    assert sum(ledger.values()) == pytest.approx(1.0, abs=1e-5)
    assert ledger["lost"] * wall == pytest.approx(
        sum(r.get("time/lost", 0.0) for r in rows), abs=1e-3
    )
    assert ledger["collective"] > 0


IMPATIENT = """
import sys
from tuneloom import cli
from tuneloom.launch import supervise

supervise.START_SECONDS = 0.001
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_worker_that_does_not_start_in_time_is_a_lost_one(lab: Path) -> None:
    words = ["train", *overrides(lab, "unstarted", "launch.max_restarts=1")]
    done = run("-c", IMPATIENT, *words)
    assert done.returncode == 5, done.stderr
    assert "restart 1 of 1" in done.stdout
    assert "last: a worker did not start in 0 s" in done.stderr


def test_ranks_that_ray_ends_for_the_hosts_memory_are_lost_ones(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.01")  # any host is fuller than that
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    words = ["train", *overrides(lab, "crowded", "launch.max_restarts=1")]
    done = run("-m", "tuneloom", *words)
    assert done.returncode == 5, done.stdout + done.stderr
    assert "restart 1 of 1" in done.stdout
    assert "as this host's memory was all but full; `tuneloom plan`" in done.stderr


def test_a_signal_before_a_worker_is_lost_ends_the_run_with_75(lab: Path) -> None:
    """Slow steps: the rank dies before the one that would have been saved ends."""
    process = started(lab, "asked", "batch.accumulation=200")
    wait_for_step(lab, "asked", 1, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    os.kill(ranks_of(process)[-1], signal.SIGKILL)
    assert process.wait(60) == 75
    assert "restart" not in (lab / "asked.log").read_text()


def test_standby_workers_take_the_place_of_a_gang_that_lost_one(lab: Path) -> None:
    """With copies in memory, so that each of them costs a step at most."""
    log = lab / "standby.log"
    process = started(lab, "standby", "launch.standby=true", "checkpoint.memory_every=1")
    struck = []
    for kill in (1, 2):  # who took the first one's place has standby workers too
        deadline = time.monotonic() + 120
        while log.read_text().count("workers wait beside the run") < kill:
            assert process.poll() is None, process.communicate()[1].decode() + log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        first = set(ranks_of(process))
        waiting = set(workers_of(process)) - first
        assert len(first) == 2 and len(waiting) == 2
        struck.append(steps_of(lab, "standby")[-1])
        os.kill(max(first), signal.SIGKILL)
        while len(second := set(ranks_of(process)) - first) < 2:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        assert second == waiting
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 75, said
    steps = steps_of(lab, "standby")
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 25
    resumed = [int(n) for n in re.findall(r"resumed step-(\d+) of standby", log.read_text())]
    assert all(at - step <= 1 for at, step in zip(struck, resumed, strict=True)), (struck, resumed)
    assert list(shm.ROOT.glob(shm.name_of(lab / "runs/standby") + "*")) == []


def steps_of(lab: Path, run_id: str) -> list[int]:
    """The steps that metrics.jsonl holds so far; a last line may be half-written."""
    lines = (lab / "runs" / run_id / "metrics.jsonl").read_text().split("\n")[:-1]
    return [row["step"] for row in map(json.loads, lines) if "train/loss" in row]


def ranks_of(driver: subprocess.Popen[bytes]) -> list[int]:
    """Processes that run a rank."""
    return workers_of(driver, "Worker.run")


def workers_of(driver: subprocess.Popen[bytes], named: str = "ray::Worker") -> list[int]:
    raylet = subprocess.run(
        ["pgrep", "-P", str(driver.pid), "raylet"], capture_output=True, text=True
    ).stdout.split()[0]
    found = subprocess.run(["pgrep", "-P", raylet, "-f", named], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]
