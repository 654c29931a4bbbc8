"""The doctor: one line a part, exit 0 where training can run and 4 where not, no torch import."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tuneloom import cli
from tuneloom.launch import doctor, machine
from tuneloom.launch.machine import Gpu

PARTS = {
    "python", "driver", "torch", "deepspeed", "transformers", "peft", "ray", "flash-attn",
    "bitsandbytes", "triton", "compiler", "nvcc", "shared memory", "disk", "W&B key",
}  # fmt: skip


def test_a_machine_that_runs_these_tests_is_fit_to_train(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(any(line.startswith(part) for line in out.splitlines()) for part in PARTS)
    assert "fit to train" in out.splitlines()[-1]


def test_the_examination_is_json_with_a_fix_for_all_that_is_not_ok(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["doctor", "json=true"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {line["part"] for line in answer["parts"]} == PARTS
    assert all(line["fix"] for line in answer["parts"] if line["verdict"] != "ok")
    assert answer["fit"]


def test_the_doctor_imports_nothing_heavy() -> None:
    script = (
        "import sys; from tuneloom import cli; cli.main(['doctor'])\n"
        "print([m for m in ('torch', 'transformers', 'ray', 'deepspeed') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_a_package_that_is_missing_is_broken_and_ends_with_4(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "deepspeed":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    assert cli.main(["doctor"]) == 4
    assert "cannot train here: deepspeed" in capsys.readouterr().out


def test_a_package_out_of_range_is_broken_and_says_which_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "4.0.0")
    line = doctor.package("transformers")
    assert line.verdict == "broken" and "transformers>=5" in line.fix


def test_a_torch_without_cuda_is_broken_only_where_there_are_gpus() -> None:
    assert doctor.torch(cuda=False).verdict == "ok"
    built = doctor._cuda_of_torch()
    assert doctor.torch(cuda=True).verdict == ("ok" if built else "broken")


def test_gpus_are_named_with_their_driver() -> None:
    line = doctor.driver([Gpu("NVIDIA H200", 143771 * 2**20, "570.1")] * 2)
    assert line.verdict == "ok" and line.found == "570.1: 2 x NVIDIA H200, 140 GiB"


def test_a_folder_that_cannot_be_written_is_broken(tmp_path: Path) -> None:
    assert doctor.disk(str(tmp_path / "runs")).verdict in ("ok", "note")
    assert doctor.disk("/proc/runs").verdict == "broken"


@pytest.mark.parametrize(
    ("content", "verdict"),
    [("machine api.wandb.ai login user password x", "ok"), ("", "note"), ("machine {", "note")],
)
def test_a_wandb_key_is_looked_for_where_wandb_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, verdict: str
) -> None:
    file = tmp_path / "netrc"
    file.write_text(content, encoding="utf-8")
    file.chmod(0o600)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(file))
    assert doctor.wandb_key().verdict == verdict
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert doctor.wandb_key().verdict == "ok"


SMI = "#!/bin/sh\ncase \"$*\" in\n*'-i 1') echo 'H100, 81559, 570.1';;\n"
SMI += "*) echo 'GB10, [N/A], 570.1'; echo 'H100, 81559, 570.1';;\nesac\n"


def test_gpus_are_those_of_cuda_visible_devices_and_one_may_share_the_hosts_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    shared, own = machine.gpus()
    assert own == Gpu("H100", 81559 * 2**20, "570.1") and shared.bytes > 0
    assert "GB10: nvidia-smi says [N/A] for its memory" in capsys.readouterr().err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert machine.gpus() == [own]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.gpus() == []
    assert doctor.driver([]).found == "CUDA_VISIBLE_DEVICES hides all GPUs"


def test_a_driver_that_hangs_counts_as_no_gpu_and_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hang(command: list[str], **options: object) -> None:
        raise subprocess.TimeoutExpired(command, 20)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine.shutil, "which", lambda name: name)
    monkeypatch.setattr(machine.subprocess, "run", hang)
    assert machine.gpus() == []
    assert "nvidia-smi does not answer" in capsys.readouterr().err
