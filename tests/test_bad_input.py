"""What a user can get wrong: one sentence that names key or path and value, the right exit code."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tuneloom.cli import main
from tuneloom.config import ELSEWHERE, dotted_keys
from tuneloom.errors import TrainingError
from tuneloom.launch import run as launch_run
from tuneloom.launch.config import JobConfig
from tuneloom.launch.supervise import signals_ask_to_stop
from tuneloom.testing import Gang, small_config
from tuneloom.train.config import TrainConfig
from tuneloom.train.signals import StopFlag

Capture = pytest.CaptureFixture[str]


def train(lab: Path, *more: str) -> int:
    return main([
        "train", f"run.root={lab}/runs-bad", f"model.path={lab}/base", "model.dtype=fp32",
        f"data.path={lab}/rows.jsonl", "data.validation=null", "batch.max_length=128",
        "batch.tokens=512", "tracker=off", "launch=inline", "zero=stage0", *more,
    ])  # fmt: skip


def test_what_other_trainers_call_a_key_is_a_key_of_ours() -> None:
    assert set(ELSEWHERE.values()) <= set(dotted_keys(TrainConfig))


@pytest.mark.parametrize(
    ("overrides", "code", "sentence"),
    [
        (["optim.lrr=1"], 2, "optim.lrr: unknown key; did you mean 'optim.lr'?"),
        (["+model.flash=1"], 2, "model.flash: unknown key"),
        (["optim.quux=1"], 2, "unknown key; expected one of optim.name, optim.lr, "),
        (["learning_rate=1e-4"], 2, "learning_rate: unknown key; did you mean 'optim.lr'?"),
        (["lora.lora_alpha=4"], 2, "unknown key; did you mean 'method.alpha'?"),
        (["data.train=x"], 2, "data.train: unknown key; expected one of data.path, data.format"),
        (["modle=folder"], 2, "modle: unknown key; did you mean 'model'?"),
        (["method=lroa"], 2, "method: expected one of ['full', 'lora', 'qlora'], got 'lroa'; did"),
        (["steps"], 2, "steps: not of the form key=value; "),
        (["steps=[1"], 2, "steps=[1: not of the form key=value; "),
        (["optim.lr=fast"], 2, "optim.lr: input should be a valid number"),
        (["zero.stage=5"], 2, "zero.stage: expected one of [0, 1, 2, 3], got 5"),
        (["method=qlora", "zero=stage3"], 2, "zero.stage"),
        (["experiment=demoo"], 2, "got 'demoo'; did you mean 'demo'?"),
        (["batch.tokens=64"], 2, "batch.tokens: expected at least batch.max_length (128), got 64"),
        (["epochs=null"], 2, "steps, epochs: at least one must be set"),
        (["run.id=../x"], 2, "run.id"),
        (["model.path=/nowhere/at/all"], 2, "model.path"),
        (["model.path=some-org/some-model"], 2, "model.path"),
        (["data.path=/nowhere.jsonl"], 3, "/nowhere.jsonl: no such file"),
        (["method.targets=[q_porj]"], 2, "did you mean 'q_proj'?"),
        (["resume=/no/checkpoint"], 2, "resume: /no/checkpoint cannot be used"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_with_the_right_exit_code(
    lab: Path, capsys: Capture, overrides: list[str], code: int, sentence: str
) -> None:
    assert train(lab, *overrides) == code
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said


def test_a_mistyped_verb_is_named_with_its_neighbour(capsys: Capture) -> None:
    assert main(["trian"]) == 2
    assert "got 'trian'; did you mean 'train'?" in capsys.readouterr().err


def test_a_stopped_sweep_starts_no_further_point_and_ends_with_75_whatever_failed(
    lab: Path, capsys: Capture
) -> None:
    (lab / "runs-bad" / "stopped").mkdir(parents=True)
    (lab / "runs-bad" / "stopped" / "stop").touch()
    (lab / "runs-bad" / "failed").touch()  # where a run's folder would be made
    points = "run.id=failed,stopped,after,last"
    assert train(lab, "--multirun", points, "steps=2", "train.drill=false") == 75
    said = capsys.readouterr().err
    assert "stopped after step 1 on a signal" in said
    lines = said.splitlines()[-4:]
    assert lines[0].startswith("tuneloom train: run.id=failed: exit 2, ")
    assert lines[1].startswith("tuneloom train: run.id=stopped: exit 75, stopped after step 1")
    assert lines[2:] == [
        f"tuneloom train: run.id={name}: not started" for name in ("after", "last")
    ]
    assert not (lab / "runs-bad" / "after").exists()


def inline(folder: Path) -> None:
    flag = StopFlag(folder, first=True)
    signal.raise_signal(signal.SIGTERM)
    flag.clear(heard=True)


def launched(folder: Path) -> None:
    with signals_ask_to_stop(folder, []):
        signal.raise_signal(signal.SIGUSR1)


@pytest.mark.parametrize("last_phase", [inline, launched])
def test_a_signal_that_a_point_hears_too_late_to_stop_is_for_the_next_one(
    lab: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch,
    last_phase: Callable[[Path], None],
) -> None:  # fmt: skip
    monkeypatch.setattr(launch_run, "main", lambda job: last_phase(tmp_path) or 0)
    assert train(lab, "--multirun", "run.id=a,b") == 75
    assert capsys.readouterr().err.splitlines() == [
        "tuneloom train: stopped on a signal between two points; the same command goes on with "
        "the next",
        "tuneloom train: run.id=a: done", "tuneloom train: run.id=b: not started",
    ]  # fmt: skip


def test_points_that_fail_keep_none_from_running(
    lab: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three: one holds a value that its method does not read, one meets a fault of ours."""
    real, ran = launch_run.check, []

    def faulty(job: JobConfig) -> None:
        ran.append(job.method.kind)
        if len(ran) == 1:
            raise KeyError("ours")
        real(job)

    monkeypatch.setattr(launch_run, "check", faulty)
    more = ("method.rank=2,4", "run.id=swept", "steps=2", "train.drill=false")
    assert train(lab, "--multirun", "method=lora,full", *more) == 2
    assert ran == ["lora", "lora"]
    unread = "exit 2, method.rank: method=full trains every weight and has no adapter; "
    unread += "set method=lora, or leave it out"
    said = capsys.readouterr().err
    assert "KeyError: 'ours'" in said
    assert said.splitlines()[-4:] == [
        "tuneloom train: method=lora method.rank=2 run.id=swept-0: exit 1, KeyError",
        "tuneloom train: method=lora method.rank=4 run.id=swept-1: done",
        f"tuneloom train: method=full method.rank=2 run.id=swept-2: {unread}",
        f"tuneloom train: method=full method.rank=4 run.id=swept-3: {unread}",
    ]
    assert (lab / "runs-bad" / "swept-1" / "weights").is_dir()


def test_points_that_name_one_run_get_a_run_each_and_a_job_that_stopped_stops_no_other(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's 75 comes back as a number; only a signal to this command is raised."""
    ran: list[str | None] = []
    monkeypatch.setattr(launch_run, "main", lambda job: ran.append(job.run.id) or 75)
    assert train(lab, "--multirun", "+run.id=a,b", "zero.stage=1,2") == 75
    assert ran == ["a-0", "a-1", "b-2", "b-3"]
    ran.clear()
    assert train(lab, "--multirun", "run.id=c-${zero.stage}", "zero.stage=1,2") == 75
    assert ran == ["c-1", "c-2"]


def test_what_prints_shows_no_sweep(lab: Path, capsys: Capture) -> None:
    assert train(lab, "--cfg", "job", "--multirun") == 2
    assert "--multirun: what prints shows one config" in capsys.readouterr().err


def test_an_unknown_verb_lists_the_verbs(capsys: Capture) -> None:
    assert main(["trian"]) == 2
    assert "expected one of doctor, ingest" in capsys.readouterr().err


ROWS = {
    "empty": (b"", "empty"),
    "utf8": (b'{"messages":[{"role":"user","content":"\xff"}]}\n', "invalid UTF-8"),
    "broken": (b'{"messages":[\n', ":1"),
    "role": (b'{"messages":[{"role":"robot","content":"x"}]}\n', "robot"),
    "type": (b'{"messages":"hello"}\n', "messages"),
    "huge": (b'{"text":"' + b"x" * (10 << 20) + b'"}\n', "bytes, at most"),
    "no answer": (b'{"messages":[{"role":"user","content":"x"}]}\n', ""),
}


@pytest.mark.parametrize("kind", ROWS)
def test_bad_rows_end_the_run_with_exit_3_and_the_place(
    lab: Path, tmp_path: Path, capsys: Capture, kind: str
) -> None:
    content, sentence = ROWS[kind]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert train(lab, f"data.path={path}", f"run.id=bad-{kind.replace(' ', '-')}") == 3
    said = capsys.readouterr().err
    assert "rows.jsonl" in said and sentence in said and "Traceback" not in said


def copied(lab: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lab / "base", tmp_path / "base"))


def test_a_base_without_tokenizer_is_named(lab: Path, tmp_path: Path, capsys: Capture) -> None:
    base = copied(lab, tmp_path)
    for file in base.glob("tokenizer*"):
        file.unlink()
    assert train(lab, f"model.path={base}") == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_an_adapter_is_no_base(lab: Path, tmp_path: Path, capsys: Capture) -> None:
    base = copied(lab, tmp_path)
    (base / "adapter_config.json").write_text("{}")
    assert train(lab, f"model.path={base}") == 2
    assert "is an adapter, not a base" in capsys.readouterr().err


def test_remote_code_is_refused_whatever_the_config(
    lab: Path, tmp_path: Path, capsys: Capture
) -> None:
    base = copied(lab, tmp_path)
    config = json.loads((base / "config.json").read_text()) | {"auto_map": {"AutoModel": "m.M"}}
    (base / "config.json").write_text(json.dumps(config))
    assert train(lab, f"model.path={base}") == 2
    assert "auto_map" in capsys.readouterr().err


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = subprocess.run(
            [sys.executable, "-m", "tuneloom.train", "experiment=demo"],
            env=os.environ | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                              "MASTER_PORT": str(taken.getsockname()[1])},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 4
    assert "is in use by another process" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_named_and_leaves_no_torn_checkpoint(
    lab: Path, one: Gang, small_disk: Path
) -> None:
    config = small_config(lab, "full", method__rank=64, checkpoint__every=2, steps=6)
    config["run"] = {"root": str(small_disk), "id": "full"}
    with pytest.raises(TrainingError, match=r"disk full.* bytes free") as ended:
        one.fit(config)
    said = re.search(r"about (\d+) bytes needed", str(ended.value))
    assert said, ended.value
    config["run"] = {"root": str(lab / "runs"), "id": "roomy"}
    one.fit(config)
    engine = lab / "runs/roomy/checkpoints/step-000006/engine"
    took = sum(file.stat().st_size for file in engine.iterdir())
    assert 0.9 < int(said[1]) / took < 1.1, (said[1], took)
    left = [p.name for p in (small_disk / "full" / "checkpoints").iterdir()]
    assert not [name for name in left if name.startswith(".torn")]
