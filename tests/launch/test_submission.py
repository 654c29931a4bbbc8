"""What launch=slurm prints, writes and asks for, without a Slurm."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tuneloom import cli
from tuneloom.config import Config, build
from tuneloom.errors import ConfigError
from tuneloom.launch import slurm
from tuneloom.launch.config import JobConfig, LaunchConfig
from tuneloom.launch.slurm import header, write_submission
from tuneloom.testing import small_config

ROOT = Path(__file__).parent.parent.parent


def test_a_dry_run_prints_the_script_and_needs_no_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    command = ["train", "experiment=demo", f"run.root={tmp_path}/runs", "run.id=printed",
               "launch=slurm", "launch.gpus_per_worker=0"]  # fmt: skip
    assert cli.main([*command, "launch.dry_run=true"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash\n#SBATCH --requeue\n")
    assert "# Not submitted, so it has no" in script
    assert f"#SBATCH --output={tmp_path}/runs/printed/slurm/%j.out\n" in script
    assert list(tmp_path.iterdir()) == []
    assert cli.main(command) == 4
    assert "no sbatch on this machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "lines"),
    [
        ({"nodes": 2, "workers": 16, "account": "lab", "partition": "a100", "time": "2-00:30"},
         {"--account=lab", "--partition=a100", "--time=2-00:30", "--nodes=2",
          "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=8"}),
        ({"workers": 2, "gpus_per_node": 4, "cpus_per_worker": 3, "time": 90, "memory": "64G"},
         {"--time=90", "--ntasks-per-node=2", "--gpus-per-node=4", "--cpus-per-task=3",
          "--mem=64G"}),
        ({"workers": 2, "gpus_per_worker": 0}, {"--ntasks-per-node=2", "--cpus-per-task=1"}),
    ],
)  # fmt: skip
def test_the_header_asks_for_what_the_config_says_and_for_nothing_else(
    asked: dict[str, object], lines: set[str]
) -> None:
    found = set(
        header(LaunchConfig.model_validate({"kind": "slurm"} | asked), name="x", output="y")
    )
    always = {"--requeue", "--job-name=x", "--output=y", "--open-mode=append"}
    assert found == always | lines | {"--signal=B:USR1@180", f"--nodes={asked.get('nodes', 1)}"}


def test_only_its_owner_reads_the_config_of_a_job(lab: Path, tmp_path: Path) -> None:
    content = small_config(lab, "private") | {"launch": {"kind": "slurm", "gpus_per_worker": 0}}
    path = tmp_path / "local/job.yaml"
    path.parent.mkdir()
    path.write_text("of a submission before", encoding="utf-8")
    path.chmod(0o644)
    write_submission(build(JobConfig, content), tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text(encoding="utf-8").startswith("# @package _global_\n")


def program(folder: Path, name: str, script: str) -> None:
    """A shell script in a folder for PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    (folder / name).chmod(0o755)


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sbatch that only keeps what it is given, as Slurm's does, in the folder returned."""
    program(tmp_path / "bin", "sbatch", f"cp $2 {tmp_path}/queue/$$.sh; echo $$")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    (tmp_path / "queue").mkdir()
    return tmp_path / "queue"


def read_by(script: Path) -> tuple[Path, Config]:
    """The folder of configs that a batch script names, and what its arguments compose to."""
    text = re.findall(r"^set -- (.*)$", script.read_text(encoding="utf-8"), re.MULTILINE)[0]
    arguments = shlex.split(text)
    folder = Path(arguments[arguments.index("--config-dir") + 1])
    return folder, cli.config_of("train", arguments)[1]


def test_jobs_of_one_run_that_wait_in_the_queue_keep_the_config_they_were_submitted_with(
    tmp_path: Path, queue: Path
) -> None:
    command = ["train", "--multirun", "experiment=demo", f"run.root={tmp_path}/runs",
               "run.id=first", "launch=slurm", "launch.gpus_per_worker=0", "launch.follow=false",
               "optim.lr=0.001,0.002"]  # fmt: skip
    assert cli.main(command) == 0
    jobs = [read_by(script)[1] for script in queue.iterdir()]
    points = [(job.run.id, job.optim.lr) for job in jobs]  # type: ignore[attr-defined]
    assert sorted(points) == [("first-0", 0.001), ("first-1", 0.002)]


@pytest.mark.parametrize("name", ["20261128", "1e5", "null"])
def test_a_job_reads_the_values_that_were_asked_for(tmp_path: Path, queue: Path, name: str) -> None:
    command = ["experiment=demo", f"run.root={tmp_path}/runs", f"run.id='{name}'",
               "model.revision='12e4567'", r"tracker.project='a\${b} \\\${c} 1:00:00 ä'",
               "launch=slurm", "launch.gpus_per_worker=0", "launch.follow=false"]  # fmt: skip
    assert cli.main(["train", *command]) == 0
    (script,) = queue.iterdir()
    job, asked = read_by(script)[1], cli.config_of("train", command)[1]
    assert "${b}" in asked.tracker.project  # type: ignore[attr-defined]
    assert job.model_dump(exclude={"launch"}) == asked.model_dump(exclude={"launch"})


def test_a_job_asks_for_what_its_config_says_and_has_nothing_of_the_job_that_submits_it(
    tmp_path: Path, queue: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    program(tmp_path / "bin", "sbatch", f"env > {tmp_path}/given; echo 1")
    outer = ("SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_CONF", "SLURM_JWT",
             "SBATCH_PARTITION", "SBATCH_NO_REQUEUE", "SBATCH_ACCOUNT", "SBATCH_QOS")  # fmt: skip
    for name in outer:
        monkeypatch.setenv(name, "of the shell")
    command = ["experiment=demo", f"run.root={tmp_path}/runs", "launch=slurm",
               "launch.partition=debug", "launch.follow=false"]  # fmt: skip
    assert cli.main(["train", *command]) == 0
    given = (tmp_path / "given").read_text(encoding="utf-8")
    names = sorted(re.findall("(?:SLURM|SBATCH)_[A-Z_]+", given))
    # No key of ours says the account here, nor ever a quality of service.
    assert names == ["SBATCH_ACCOUNT", "SBATCH_QOS", "SLURM_CONF", "SLURM_JWT"]
    assert "what to ask for: SBATCH_NO_REQUEUE, SBATCH_PARTITION\n" in capsys.readouterr().out


def test_a_run_folder_that_cannot_be_made_is_one_sentence(
    tmp_path: Path, queue: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["train", "experiment=demo", f"run.root={tmp_path}/file", "launch=slurm"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"run\.root: \S+ cannot be written \(Not a directory\); choose another", said)
    assert list(queue.iterdir()) == []


def test_an_sbatch_that_does_not_answer_may_have_submitted_the_job(
    tmp_path: Path, queue: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in ("sbatch", "scontrol"):
        program(tmp_path / "bin", name, "exec sleep 5")
    monkeypatch.setattr(slurm, "ANSWER_SECONDS", 0.1)
    command = ["experiment=demo", f"run.root={tmp_path}/runs", "launch=slurm"]
    assert cli.main(["train", *command]) == 4
    assert "look at squeue" in capsys.readouterr().err
    assert slurm.state_of("1") == ("UNKNOWN", 0)


@pytest.mark.parametrize(
    ("keys", "interpreter"),
    [
        ({}, "image /theirs"),
        ({"python": "/mine"}, "image /mine"),
        ({"container": ["env", "other"]}, "other python"),
    ],
)
def test_the_config_of_a_job_wins_over_env_sh(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any],
    interpreter: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    content = small_config(lab, "x") | {"launch": {"kind": "slurm", "gpus_per_worker": 0} | keys}
    script = slurm.render(build(JobConfig, content)).split("set -- ")[0]
    program(tmp_path / "slurm", "env.sh", "TUNELOOM_CONTAINER='env image' TUNELOOM_PYTHON=/theirs")
    done = subprocess.run(
        ["bash", "-c", script + 'echo "${python[@]}"'], cwd="/", text=True, capture_output=True,
        check=True,
    )  # fmt: skip
    assert done.stdout == f"env {interpreter}\n"


def test_the_containers_of_the_documentation_are_typed_as_they_stand_there() -> None:
    text = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")
    typed = [shlex.split(line, comments=True)
             for line in re.findall(r"^launch\.container=.*$", text, re.MULTILINE)]  # fmt: skip
    found = [
        cli.config_of("train", ["experiment=demo", "launch=slurm", *words])[1].launch.container
        for words in typed
    ]  # type: ignore[attr-defined]
    assert found == [
        ("apptainer", "exec", "--nv", "--bind=/shared", "/images/tuneloom.sif"),
        ("ch-run", "--bind=/shared:/shared", "--cd=/shared/me", "/images/tuneloom", "--"),
    ]


def test_a_job_runs_with_what_was_validated_whatever_conf_local_says(
    tmp_path: Path, queue: Path
) -> None:
    command = ["experiment=demo", f"run.root={tmp_path}/runs", "run.id=first", "seed=3",
               "launch=slurm", "launch.gpus_per_worker=0", "launch.follow=false"]  # fmt: skip
    assert cli.main(["train", *command]) == 0
    (script,) = queue.iterdir()
    folder, before = read_by(script)
    (folder / "local").mkdir(exist_ok=True)
    (folder / "local/default.yaml").write_text(
        '# @package _global_\nseed: 4\ntracker:\n  mode: "off"\n', encoding="utf-8"
    )
    asked = cli.config_of("train", command)[1].model_dump(exclude={"launch"})
    assert before.model_dump(exclude={"launch"}) == asked
    assert read_by(script)[1].model_dump(exclude={"launch"}) == asked


def test_a_limit_that_leaves_no_time_to_train_is_refused() -> None:
    """The job would be asked to save as soon as it runs, go back into the queue, and so on."""

    def limited(**keys: object) -> LaunchConfig:
        return build(LaunchConfig, {"kind": "slurm", "signal_seconds": 180} | keys)

    for time in (4, "4", "00:04:00", "0-00:04"):
        with pytest.raises(ConfigError, match=rf"^launch\.time: {time} leaves no time to train"):
            limited(time=time)
    for time in (5, "00:04:01", "0-00:05", "1-00:00:00"):
        assert limited(time=time).time == time
    with pytest.raises(ConfigError, match=r"launch\.signal_seconds"):
        limited(time="1-00:00", signal_seconds=86_340)


def test_a_limit_that_slurm_or_yaml_would_read_as_another_is_refused() -> None:
    """sbatch takes 12:00 as minutes and seconds, YAML an unquoted 4:00:00 as minutes."""
    for time in ("12:00", 14400, 3600, "1-12"):
        with pytest.raises(ConfigError, match=r"^time: expected "):
            build(LaunchConfig, {"kind": "slurm", "time": time, "signal_seconds": 1})
    assert build(LaunchConfig, {"kind": "slurm", "time": 3599}).time == 3599


def batch(
    tmp_path: Path, *arguments: str, queued: str = "7 N/A 0 UNLIMITED", **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run the script of the repository with programs in place of Slurm's, which write down what
    they are asked; `queued` is what squeue says: job, index, restarts, time left.
    """
    for name in ("scancel", "scontrol"):
        program(tmp_path / "bin", name, f"echo {name} $* >> {tmp_path}/asked; echo localhost")
    program(tmp_path / "bin", "squeue", f"echo '{queued}'")
    return subprocess.run(
        ["bash", str(ROOT / "slurm/finetune.sbatch"), *arguments], cwd=tmp_path, text=True,
        capture_output=True, timeout=60, check=False,
        env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "7",
             "SLURM_JOB_NODELIST": "localhost"} | variables,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("queued", "inherited", "name"),
    [("7 N/A 0 UNLIMITED", {}, "7"),
     ("7 2 0 UNLIMITED", {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}, "7_2"),
     ("7 N/A 0 UNLIMITED", {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}, "7")],
)  # fmt: skip
def test_a_task_of_an_array_ends_and_requeues_itself_alone(
    tmp_path: Path, queued: str, inherited: dict[str, str], name: str
) -> None:
    """The number of one task is that of the array, and stands for all of it; a job that a task
    submits has the task's variables, and is none.
    """
    (tmp_path / "warned.sh").write_text("kill -USR1 $$", encoding="utf-8")
    done = batch(tmp_path, TUNELOOM_ENV="warned.sh", queued=queued, **inherited)
    assert done.returncode == 75, done.stderr
    asked = (tmp_path / "asked").read_text(encoding="utf-8").splitlines()
    assert asked[-2:] == [f"scancel --signal=USR2 {name}", f"scontrol requeue {name}"]


@pytest.mark.parametrize(
    ("left", "code"),
    [("0:00", 2), ("3:00", 2), ("4:00", 2), ("4:01", 75), ("09:08", 75), ("1:00:08", 75),
     ("2-00:00:00", 75), ("UNLIMITED", 75), ("INVALID", 75)],
)  # fmt: skip
def test_a_job_whose_limit_leaves_no_time_to_train_ends_with_2_and_is_not_requeued(
    tmp_path: Path, left: str, code: int
) -> None:
    (tmp_path / "warned.sh").write_text("kill -USR1 $$", encoding="utf-8")
    done = batch(tmp_path, TUNELOOM_ENV="warned.sh", queued=f"7 N/A 0 {left}")
    assert done.returncode == code, done.stderr
    said = f"slurm: the time limit leaves {left}, and no time to train"
    assert (said in done.stdout) is (code == 2)
    asked = tmp_path / "asked"
    assert ("requeue" in asked.read_text("utf-8") if asked.exists() else False) is (code == 75)


@pytest.mark.parametrize(
    ("variables", "interpreter"),
    [({"TUNELOOM_CONTAINER": "enter image"}, "image python"),
     ({"TUNELOOM_CONTAINER": "enter image", "TUNELOOM_PYTHON": "/opt/python"}, "image /opt/python"),
     ({"TUNELOOM_PYTHON": "enter"}, "")],
)  # fmt: skip
def test_in_a_container_the_interpreter_is_the_images(
    tmp_path: Path, variables: dict[str, str], interpreter: str
) -> None:
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    program(tmp_path / "bin", "enter", f"echo $* > {tmp_path}/entered; exit 1")
    assert batch(tmp_path, **variables).returncode == 4
    entered = (tmp_path / "entered").read_text(encoding="utf-8")
    assert entered.split("-c import")[0].strip() == interpreter


def test_the_digest_of_the_code_changes_with_any_module_or_config(tmp_path: Path) -> None:
    for part in ("tuneloom", "train", "launch", "kernels", "conf"):
        shutil.copytree(ROOT / part, tmp_path / part, symlinks=True)

    def code() -> dict[str, str | None]:
        script = (
            "import json; from tuneloom.train.runs import code_version as v; print(json.dumps(v()))"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(tmp_path)},
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return dict(json.loads(done.stdout))

    digests = [code()["digest"], code()["digest"]]
    for changed in ("train/loop.py", "launch/slurm.py", "conf/train.yaml", "tuneloom/errors.py"):
        with (tmp_path / changed).open("a", encoding="utf-8") as file:
            file.write("# a line more\n")
        digests.append(code()["digest"])
    assert digests[0] == digests[1] and len(set(digests)) == 5
