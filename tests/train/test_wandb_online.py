"""W&B online, against a server on this machine that stands in for the outside network."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tuneloom.errors import STOPPED
from tuneloom.launch.wandb_server import Mode, Server, serving
from tuneloom.testing import metrics, small_config
from tuneloom.train.uploader import SYNC

History = Callable[[Path], list[dict[str, Any]]]


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


TRAIN = """
import json, sys
from tuneloom.train import uploader
uploader.GRACE_SECONDS = float(sys.argv[2])
from tuneloom.config import build
from tuneloom.errors import Stopped
from tuneloom.train.config import TrainConfig
from tuneloom.train.loop import fit
try:
    fit(build(TrainConfig, json.loads(sys.argv[1])))
except Stopped as stopped:
    sys.exit(stopped.exit_code)
"""


def train(
    config: dict[str, object], server: Server, *, grace: float = 15.0
) -> subprocess.CompletedProcess[str]:
    with started(config, server, grace=grace) as process:
        printed, complained = process.communicate(timeout=180)
    return subprocess.CompletedProcess(process.args, process.returncode, printed, complained)


def started(
    config: dict[str, object], server: Server, *, grace: float = 15.0
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, json.dumps(config), str(grace)],
        env=with_key(server), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def with_key(server: Server) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    return environment | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "k" * 40}


def to_be_stopped(lab: Path, run_id: str) -> Path:
    """The folder of a run that its first command leaves after one step."""
    folder = lab / "runs" / run_id
    folder.mkdir(parents=True)
    (folder / "stop").touch()
    return folder


def test_a_key_makes_it_online_and_a_resumed_run_continues_the_same_wandb_run(
    lab: Path, server: Server
) -> None:
    config = small_config(lab, "online", steps=4, tracker__mode="auto")
    folder = to_be_stopped(lab, "online")
    first = train(config, server)
    assert first.returncode == STOPPED, first.stderr
    assert "tracker: W&B online (WANDB_API_KEY is set)" in first.stdout
    second = train(config, server)
    assert second.returncode == 0, second.stderr
    assert set(server.names) == {"online"}
    rows = [row for row in server.history["online"].values() if "train/loss" in row]
    assert [row["_step"] for row in rows] == [1, 2, 3, 4]
    assert [row["train/loss"] for row in rows] == metrics(lab, "online")
    assert "k" * 40 not in "".join(
        file.read_text(errors="replace") for file in folder.rglob("*") if file.is_file()
    )


def test_an_unreachable_server_costs_a_line_and_loses_no_row(
    lab: Path, server: Server, offline_history: History
) -> None:
    server.shutdown()
    server.server_close()
    config = small_config(lab, "unreachable", steps=2, tracker__mode="online")
    ran = train(config, server)
    assert ran.returncode == 0, ran.stderr
    assert "the W&B server does not answer" in ran.stdout and "wandb sync" in ran.stdout
    rows = [row for row in offline_history(lab / "runs/unreachable") if "train/loss" in row]
    assert [row["train/loss"] for row in rows] == metrics(lab, "unreachable")


def test_what_an_attempt_could_not_upload_the_next_one_does(lab: Path, server: Server) -> None:
    config = small_config(lab, "caught-up", steps=4, tracker__mode="online")
    to_be_stopped(lab, "caught-up")
    server.mode = "fails"
    assert train(config, server, grace=2.0).returncode == STOPPED
    assert server.history == {}
    server.mode = "answers"
    assert train(config, server).returncode == 0
    rows = [row for row in server.history["caught-up"].values() if "train/loss" in row]
    assert [row["_step"] for row in rows] == [1, 2, 3, 4]


@pytest.mark.parametrize("mode", ["fails", "hangs"])
def test_a_server_lost_in_the_middle_of_a_run_costs_no_row_and_leaves_no_process(
    lab: Path, server: Server, mode: Mode
) -> None:
    run_id = f"lost-{mode}"
    server.after_rows = mode
    folder = lab / "runs" / run_id
    config = small_config(lab, run_id, steps=100_000, epochs=1e6, tracker__mode="online")
    with started(config, server) as process:
        wait_until(lambda: server.mode == mode, seconds=120)
        taken = len(server.history[run_id])
        wait_until(lambda: len(metrics(lab, run_id)) > taken + 20)
        (folder / "stop").touch()
        stopped = time.monotonic()
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == STOPPED and time.monotonic() - stopped < 30
    said = next(line for line in printed.splitlines() if "the W&B server does not" in line)
    assert 0 < taken < len(metrics(lab, run_id))
    assert uploaders(run_id) == []
    server.mode = server.after_rows = "answers"
    sync = said.split("`")[1].removeprefix("wandb sync ")
    subprocess.run(
        [*SYNC, sync], env=with_key(server), check=True, capture_output=True, timeout=120
    )
    rows = {row["_step"]: row for row in server.history[run_id].values() if "train/loss" in row}
    assert [rows[step]["train/loss"] for step in sorted(rows)] == metrics(lab, run_id)


def test_a_file_that_was_cut_off_with_its_host_is_completed_on_the_server(
    lab: Path, server: Server
) -> None:
    config = small_config(lab, "cut-off-online", steps=4, tracker__mode="online")
    folder = to_be_stopped(lab, "cut-off-online")
    server.mode = "fails"
    assert train(config, server, grace=2.0).returncode == STOPPED
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    file.write_bytes(file.read_bytes()[:1000])
    server.mode = "answers"
    second = train(config, server)
    assert second.returncode == 0, second.stderr
    rows = [row for row in server.history["cut-off-online"].values() if "train/loss" in row]
    assert [row["_step"] for row in rows] == [1, 2, 3, 4]


def test_a_killed_run_leaves_no_uploader_behind(lab: Path, server: Server) -> None:
    config = small_config(lab, "killed-online", steps=100_000, tracker__mode="online")
    with started(config, server, grace=1.0) as process:
        metrics_file = lab / "runs/killed-online/metrics.jsonl"
        wait_until(metrics_file.exists)
        wait_until(lambda: uploaders("killed-online") != [])
        process.kill()
    wait_until(lambda: uploaders("killed-online") == [])


def uploaders(run_id: str) -> list[int]:
    """Processes that upload this run."""
    found = psutil.process_iter(["pid", "cmdline"])
    return [p.pid for p in found if f"runs/{run_id}/" in " ".join(p.info["cmdline"] or [])]


def wait_until(holds: Callable[[], bool], *, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not so within {seconds:.0f} s"
        time.sleep(0.2)
