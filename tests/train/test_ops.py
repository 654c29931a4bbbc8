"""DeepSpeed's ops: a builder that is killed leaves no lock behind that later runs wait for."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tuneloom.train.config import ZeroConfig
from tuneloom.train.ops import build_ops

BUILD = (
    "from tuneloom.train.config import ZeroConfig; from tuneloom.train.ops import build_ops;"
    "build_ops(ZeroConfig(stage=2, offload='cpu'))"
)


def compiler(folder: Path, body: str) -> dict[str, str]:
    """An environment whose C++ compiler answers questions about itself, and builds as in `body`."""
    script = folder / f"c++-{len(list(folder.iterdir()))}"
    version = 'case "$*" in *--version*|*-v*|*-dumpfullversion*) exec c++ "$@";; esac'
    script.write_text(f"#!/bin/sh\n{version}\n{body}\n", encoding="utf-8")
    script.chmod(0o700)
    extensions = str(folder / "extensions")
    return os.environ | {"CXX": str(script), "TORCH_EXTENSIONS_DIR": extensions, "MAX_JOBS": "1"}


def start(environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILD], env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_a_build_goes_on_where_one_was_killed(tmp_path: Path) -> None:
    slow = start(compiler(tmp_path, f"echo $$ > {tmp_path}/building; exec sleep 600"))
    building, deadline = tmp_path / "building", time.monotonic() + 60
    while not building.exists():
        assert time.monotonic() < deadline, "no build began"
        time.sleep(0.05)
    waits = start(compiler(tmp_path, "echo of the second >&2; exit 1"))
    with pytest.raises(subprocess.TimeoutExpired):  # one at a time
        waits.communicate(timeout=8)
    assert list((tmp_path / "extensions").glob("*/*/cpu_adam/lock"))  # torch's, of the first
    os.killpg(slow.pid, 9)
    slow.communicate()
    said, _ = waits.communicate(timeout=60)
    assert "of the second" in said
    assert not list((tmp_path / "extensions").glob("*/*/cpu_adam/lock"))


def test_an_op_that_deepspeed_brings_needs_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.git_version_info import installed_ops

    monkeypatch.setitem(installed_ops, "cpu_adam", True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/none")
    build_ops(ZeroConfig(stage=2, offload="cpu"))
    with pytest.raises(OSError):
        build_ops(ZeroConfig(stage=3, offload="nvme"))


@pytest.mark.parametrize(
    ("extensions", "way"),
    [("", "install a C++ compiler and ninja, or set zero.offload=none"),
     ("/proc/none", "set TORCH_EXTENSIONS_DIR to a folder that can be written")],
)  # fmt: skip
def test_an_op_that_cannot_be_built_ends_the_run_in_a_sentence(
    tmp_path: Path, lab: Path, extensions: str, way: str
) -> None:
    command = [sys.executable, "-m", "tuneloom", "train", f"model.path={lab / 'base'}",
               f"data.path={lab / 'rows.jsonl'}", f"run.root={tmp_path}", "run.id=no-compiler",
               "launch=inline", "zero.offload=cpu", "model.dtype=fp32", "tracker=off"]  # fmt: skip
    environment = compiler(tmp_path, "exit 1")
    environment["TORCH_EXTENSIONS_DIR"] = extensions or environment["TORCH_EXTENSIONS_DIR"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170)
    assert ended.returncode == 4, ended.stderr
    assert "zero.offload: DeepSpeed's ops cannot be built here" in ended.stderr
    assert way in ended.stderr and "Traceback" not in ended.stderr
