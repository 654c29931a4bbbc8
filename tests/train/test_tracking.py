"""W&B offline is read back from its own file; a resumed run goes on in the same W&B run."""

import contextlib
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuneloom.errors import RefusedError, Stopped
from tuneloom.launch.faults import tmpfs
from tuneloom.testing import Gang, metrics, small_config
from tuneloom.train.metrics import PHASES, fill
from tuneloom.train.runs import locked
from tuneloom.train.tracker import key

History = Callable[[Path], list[dict[str, Any]]]


def test_offline_wandb_holds_the_numbers_of_metrics_jsonl(
    lab: Path, one: Gang, offline_history: History
) -> None:
    one.fit(small_config(lab, "tracked", steps=4, tracker__mode="offline"))
    rows = [row for row in offline_history(lab / "runs/tracked") if "train/loss" in row]
    assert [row["train/loss"] for row in rows] == metrics(lab, "tracked")
    assert [row["_step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["speed/tokens_per_second"] > 0 and row["memory/peak_gib"] > 0 for row in rows)
    ledger = [{k: v for k, v in row.items() if k.startswith("goodput/")} for row in rows]
    assert all(abs(sum(shares.values()) - 1) < 1e-5 for shares in ledger)
    for phase in PHASES:
        written = metrics(lab, "tracked", f"goodput/{phase}")
        closed = written[:3] + written[-1:]  # W&B joins the closing row to that of its step
        assert [shares[f"goodput/{phase}"] for shares in ledger] == closed


def test_a_resumed_run_is_one_wandb_run(lab: Path, one: Gang, offline_history: History) -> None:
    folder = lab / "runs/continued"
    folder.mkdir(parents=True)
    (folder / "stop").touch()
    config = small_config(lab, "continued", steps=4, tracker__mode="offline")
    try:
        one.fit(config)
    except Exception as error:
        assert "the same command resumes" in str(error)
    one.fit(config)
    files = list(folder.glob("wandb/**/*.wandb"))
    assert {path.name for path in files} == {"run-continued.wandb"} and len(files) == 2
    assert [row["_step"] for row in offline_history(folder) if "train/loss" in row] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:1000], lambda data: b"", lambda data: data[:500] + b"?" + data[501:]],
    ids=["cut-off", "empty", "flipped"],
)
def test_rows_that_died_with_the_writer_of_wandb_are_written_at_the_resume(
    lab: Path, one: Gang, offline_history: History, request: pytest.FixtureRequest,
    damage: Callable[[bytes], bytes],
) -> None:  # fmt: skip
    """A killed host takes up to 32 KiB of rows with it that W&B's writer kept back."""
    name = f"died-{request.node.callspec.id}"
    folder = lab / "runs" / name
    folder.mkdir(parents=True)
    (folder / "stop").touch()
    config = small_config(lab, name, steps=4, tracker__mode="offline")
    with pytest.raises(Stopped):
        one.fit(config)
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    file.write_bytes(damage(file.read_bytes()))
    assert offline_history(folder) == []
    one.fit(config)
    steps = [row["_step"] for row in offline_history(folder) if "train/loss" in row]
    assert steps == [1, 2, 3, 4]


def test_a_full_disk_of_wandb_ends_no_run_and_its_rows_can_be_written_later(
    lab: Path, offline_history: History
) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    folder = lab / "runs/full"
    folder.mkdir(parents=True)
    config = small_config(lab, "full", steps=100, epochs=100.0, tracker__mode="offline")
    command = [sys.executable, "-m", "tuneloom.train.metrics", str(folder)]
    with tmpfs(folder / "wandb", 64 << 10) as disk:
        ran = subprocess.run(
            [sys.executable, "-c", TRAIN, json.dumps(config)], capture_output=True, text=True
        )
        assert ran.returncode == 0 and "Traceback" not in ran.stdout + ran.stderr, ran.stderr
        assert "no row is lost" in ran.stdout and str(folder) in ran.stdout
        assert len(offline_history(folder)) < 100
        still = subprocess.run(command, capture_output=True, text=True)
        assert still.returncode == 5 and "lacking still" in still.stderr, still.stderr
        assert "Traceback" not in still.stdout + still.stderr
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        filled = subprocess.run(command, capture_output=True, text=True, check=True)
        assert " written; `wandb sync " in filled.stdout
        rows = [row for row in offline_history(folder) if "train/loss" in row]
        assert [row["train/loss"] for row in rows] == metrics(lab, "full")
        again = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "have every row" in again.stdout


def test_a_run_at_work_is_not_filled(lab: Path, one: Gang) -> None:
    one.fit(small_config(lab, "at-work", steps=1, tracker__mode="offline"))
    with locked(lab / "runs/at-work"), pytest.raises(RefusedError, match="is being written by"):
        fill(lab / "runs/at-work")


def test_what_is_no_run_is_not_filled(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tuneloom.train.metrics", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 2 and "no run with a metrics.jsonl" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_auto_is_what_wandbs_own_variable_says_and_the_record_says_so(
    lab: Path, one: Gang, offline_history: History
) -> None:
    one.fit(small_config(lab, "auto", steps=1, tracker__mode="auto"))
    tracker = json.loads((lab / "runs/auto/run.json").read_text())["tracker"]
    assert tracker == {"mode": "offline", "reason": "WANDB_MODE=offline"}
    assert offline_history(lab / "runs/auto")


def test_auto_is_online_for_a_login_to_a_host_of_ones_own_and_offline_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert key() == (None, None)
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password x")
    (tmp_path / "netrc").chmod(0o600)
    assert key() == (f"wandb.example.org is in {tmp_path}/netrc", None)


TRAIN = """
import json, sys
from tuneloom.config import build
from tuneloom.train.config import TrainConfig
from tuneloom.train.loop import fit
fit(build(TrainConfig, json.loads(sys.argv[1])))
"""


def test_a_terminal_gets_one_live_line_and_a_file_gets_plain_ones(lab: Path) -> None:
    def command(run_id: str) -> list[str]:
        return [sys.executable, "-c", TRAIN, json.dumps(small_config(lab, run_id, steps=200))]

    plain = subprocess.run(command("piped"), capture_output=True, text=True, timeout=120).stdout
    assert "\x1b" not in plain and plain.count("loss") < 40
    master, slave = pty.openpty()
    process = subprocess.Popen(command("live"), stdout=slave, stderr=subprocess.DEVNULL)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the terminal's other end closed
        while chunk := os.read(master, 65536):
            shown += chunk
    os.close(master)
    assert process.wait(60) == 0
    last = metrics(lab, "live")[-1]
    # Redrawn in place: back to the row's start, the row cleared; the last step stays.
    assert b"\r\x1b[2K" in shown
    rows = shown.decode().replace("\x1b[2K", "\r").replace("\x1b[?25h", "").split("\r")
    drawn = [row.strip() for row in rows if row.strip().startswith("step")]
    assert f"step 200 100.0 % loss {last:.4f}" in drawn[-1] and drawn[-1].endswith("GiB")
    assert max(map(len, drawn)) <= 80
