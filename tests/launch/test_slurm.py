"""The batch script on a real Slurm of two nodes: run, stop, requeue, cancel, exit codes, nothing
left.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from tests.launch.test_security import essence, secret_shapes
from tuneloom.launch.slurm import follow, render_default
from tuneloom.launch.slurm_bed import SlurmBed, missing
from tuneloom.testing import chat_rows, free_port, metrics, tiny_model
from tuneloom.train.runs import code_version

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "slurm/finetune.sbatch"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
RUN = [
    "steps=4", "epochs=1000000", "model.path=lab/base", "model.dtype=fp32", "method.rank=8",
    "data.path=lab/rows.jsonl", "data.validation=null", "batch.max_length=128", "batch.tokens=512",
    "batch.window=64", "optim.lr=5e-3", "optim.warmup_steps=2", "zero=stage0", "checkpoint.every=0",
    "train.drill=false", "tracker=off",
]  # fmt: skip

DISTURBED = ("steps=150", "checkpoint.every=10")


def test_the_script_of_the_repository_is_the_rendered_one() -> None:
    assert render_default() == SCRIPT.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def bed() -> Iterator[SlurmBed]:
    reason = missing()
    if reason and os.environ.get("TUNELOOM_REQUIRE_SLURM") == "1":
        pytest.fail(f"TUNELOOM_REQUIRE_SLURM=1, but this machine {reason}")
    if reason:
        pytest.skip(f"this machine {reason}")
    with SlurmBed() as bed:
        tiny_model(bed.base / "lab/base")
        chat_rows(bed.base / "lab/rows.jsonl", 48)
        (bed.base / "slurm").mkdir()
        (bed.base / "slurm/env.sh").write_text(
            f"TUNELOOM_PYTHON={sys.executable}\nexport PYTHONPATH={ROOT}\n"
            "TUNELOOM_RAY_OPTIONS=--object-store-memory=80000000\n",
            encoding="utf-8",
        )
        yield bed


def sbatch(
    bed: SlurmBed, run_id: str, *overrides: str, options: tuple[str, ...] = (),
    variables: tuple[str, ...] = (),
) -> str:  # fmt: skip
    """Submit on two nodes, as a user does who has `variables`; returns the job's number."""
    return bed.run(
        "env", *variables, "sbatch", "--parsable", "--nodes=2", "--mem=3000", *options,
        str(SCRIPT), *RUN, f"run.id={run_id}", *overrides, cwd=bed.base,
    )  # fmt: skip


def output(bed: SlurmBed, job: str) -> str:
    path = bed.base / f"finetune-{job}.out"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def wait_for_steps(bed: SlurmBed, job: str, run_id: str, count: int) -> None:
    """Until the run has written `count` steps."""
    path = bed.base / "runs" / run_id / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while not path.exists() or len(path.read_text(encoding="utf-8").splitlines()) < count:
        assert time.monotonic() < deadline, output(bed, job)
        assert bed.job(job)["JobState"] not in ENDED, output(bed, job)
        time.sleep(0.3)


def torchrun(bed: SlurmBed, run_id: str, *overrides: str) -> None:
    """The same run without Slurm or Ray, to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
         f"--master-port={free_port()}", "-m", "tuneloom.train", *RUN, f"run.id={run_id}",
         *overrides],
        env=bed.environment() | {"PYTHONPATH": str(ROOT)}, cwd=bed.base, capture_output=True,
        text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def undisturbed(bed: SlurmBed) -> list[float]:
    """The losses of DISTURBED from start to end."""
    torchrun(bed, "undisturbed", *DISTURBED)
    return metrics(bed.base, "undisturbed")


def left_behind(bed: SlurmBed, job: str) -> list[str]:
    """Processes, scratch folders, open ports and tokens of a job that has ended."""
    found = []
    for node in bed.addresses:
        sockets = bed.inside(node, "ss", "-Hltn").splitlines()
        assert any(":6818 " in line for line in sockets)  # slurmd's
        found += [line for line in sockets if ":6818 " not in line]
        lines = bed.inside(node, "ps", "-eo", "args").splitlines()
        found += [line for line in lines if "ray" in line or "tuneloom train" in line]
        files = bed.inside(node, "ls", "/tmp", "/dev/shm").split()
        found += [file for file in files if file.startswith("tuneloom-")]
    token = bed.base / f"runs/.slurm/{job}/token"
    return found + ([str(token)] if token.exists() else [])


def strangers_that_got_in(bed: SlurmBed, job: str) -> list[str]:
    """From another network namespace: who asks the cluster's state without its token (S1)."""
    log = (bed.base / f"runs/.slurm/{job}/head.log").read_text(encoding="utf-8")
    address = log.split("ray start --address='")[1].split("'")[0]
    wrong = bed.base / "wrong-token"
    wrong.touch(0o600)
    wrong.write_text("0" * 64, encoding="utf-8")
    got_in = []
    for identity in (
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(wrong)},
    ):
        tried = subprocess.run(  # one that is still knocking after 20 s did not get in
            ["timeout", "-k", "5", "20", sys.executable, "-m", "ray.scripts.scripts", "status",
             f"--address={address}"],
            env=bed.environment() | identity, capture_output=True, check=False,
        )  # fmt: skip
        if tried.returncode == 0:
            got_in.append(str(identity))
    return got_in


def token_in_processes(bed: SlurmBed, token: str) -> list[str]:
    """Arguments and environments of the nodes' processes that hold the token (S10)."""
    script = "for f in /proc/[0-9]*/environ /proc/[0-9]*/cmdline; do echo; echo $f; cat $f; done"
    seen = [bed.inside(node, "sh", "-c", script + " 2>/dev/null") for node in bed.addresses]
    assert all("ray" in text for text in seen)
    return [line for text in seen for line in text.splitlines() if token in line]


@pytest.fixture
def own_names(bed: SlurmBed) -> Iterator[None]:
    """Each node's /etc/hosts has its own name as 127.0.1.1, as Debian's installer writes it."""
    for node in bed.addresses:
        bed.inside(node, "sh", "-c", f"(echo 127.0.1.1 {node}; grep -v {node} /etc/hosts) > "
                   "/tmp/hosts; mount --bind /tmp/hosts /etc/hosts")  # fmt: skip
        assert bed.inside(node, "getent", "ahostsv4", node).startswith("127.0.1.1")
    yield
    for node in bed.addresses:
        bed.inside(node, "umount", "/etc/hosts")


@pytest.mark.slurm
def test_a_job_trains_on_two_nodes_and_leaves_nothing(bed: SlurmBed, own_names: None) -> None:
    for node in bed.addresses:  # as a job leaves it that Slurm killed
        bed.inside(
            node, "mkdir", "-p", "/tmp/tuneloom-999/ray", "/dev/shm/tuneloom-0af3/rank-00000"
        )
        bed.inside(node, "sh", "-c", "echo 999 > /dev/shm/tuneloom-0af3/job")
    shapes = secret_shapes()
    planted = tuple(f"PLANTED_{n}_TOKEN={secret}" for n, secret in enumerate(shapes))
    job = sbatch(bed, "whole", variables=planted)
    ended = bed.wait_job(job, ENDED)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), output(bed, job)
    facts = json.loads((bed.base / "runs/whole/run.json").read_text(encoding="utf-8"))
    assert (facts["state"], facts["world_size"], facts["launcher"]["nodes"]) == ("done", 2, 2)
    assert facts["code"] == code_version()
    assert "preflight: 2 rank(s) on 2 node(s) agree; slowest link" in output(bed, job)
    assert left_behind(bed, job) == []
    folders = bed.base / "runs/whole", bed.base / "runs/.slurm"
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    written = b"".join(path.read_bytes() for path in files).decode(errors="replace")
    assert [s for s in shapes if essence(s) in written + output(bed, job)] == []  # S10
    torchrun(bed, "torchrun")
    other = json.loads((bed.base / "runs/torchrun/run.json").read_text(encoding="utf-8"))
    for key in ("config_digest", "data_order", "first_loss"):
        assert facts[key] == other[key], key


def preempt(bed: SlurmBed, job: str) -> None:
    """A job of a higher partition takes both nodes."""
    bed.run("sbatch", "-N2", "-p", "high", "--exclusive", "--wrap", "sleep 2", cwd=bed.base)


def let_time_run_out(bed: SlurmBed, job: str) -> None:
    """A limit 35 to 95 s from now, of which the job asked to hear 100 s ahead."""
    hours, minutes, seconds = map(int, bed.job(job)["RunTime"].split(":"))
    limit = (hours * 3600 + minutes * 60 + seconds + 35) // 60 + 1
    bed.run("scontrol", "update", f"jobid={job}", f"TimeLimit={limit}")


@pytest.mark.slurm
@pytest.mark.parametrize("warn", [preempt, let_time_run_out])
def test_a_warning_saves_and_requeues_then_term_saves_and_ends_with_75(
    bed: SlurmBed, warn: Callable[[SlurmBed, str], None]
) -> None:
    name = warn.__name__
    job = sbatch(bed, name, "steps=100000", options=("--signal=B:USR1@100",))
    wait_for_steps(bed, job, name, 3)
    warn(bed, job)
    assert bed.wait_job(job, {"PENDING", *ENDED})["JobState"] == "PENDING", output(bed, job)
    bed.run("scontrol", "update", f"jobid={job}", "TimeLimit=20")
    saved = sorted((bed.base / f"runs/{name}/checkpoints").glob("step-*"))[-1].name
    rows = metrics(bed.base, name, "step")
    assert (bed.job(job)["Restarts"], saved) == ("1", f"step-{int(rows[-1]):06d}")
    bed.wait_job(job, {"RUNNING"})
    wait_for_steps(bed, job, name, len(rows) + 3)
    bed.run("scancel", "--batch", "--signal=TERM", job)
    ended = bed.wait_job(job, ENDED)
    said = output(bed, job)  # of the ranks, which Ray brings a moment later
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "75:0"), said
    assert f"resumed {saved} of {name}" in said, said
    steps = metrics(bed.base, name, "step")
    assert steps == list(range(1, len(steps) + 1))
    assert left_behind(bed, job) == []


def requeue(bed: SlurmBed, job: str) -> None:
    """As an operator does; Slurm's TERM comes first, so the step is saved."""
    begun = time.monotonic()
    bed.run("scontrol", "requeue", job)
    bed.wait_job(job, {"PENDING"})
    assert time.monotonic() - begun < 25  # the script's own end, not Slurm's KILL after KillWait


def cut_power_of_n2(bed: SlurmBed, job: str) -> None:
    """Slurm would notice after SlurmdTimeout; a health check says it at once."""
    bed.kill_node("n2")
    bed.run("scontrol", "update", "nodename=n2", "state=down", "reason=power")
    bed.wait_job(job, {"PENDING"})
    bed.start_node("n2")


@pytest.mark.slurm
@pytest.mark.parametrize("disturb", [requeue, cut_power_of_n2])
def test_a_job_that_slurm_puts_back_ends_with_the_losses_of_an_undisturbed_run(
    bed: SlurmBed, undisturbed: list[float], disturb: Callable[[SlurmBed, str], None]
) -> None:
    name = disturb.__name__
    job = sbatch(bed, name, *DISTURBED)
    wait_for_steps(bed, job, name, 12)
    disturb(bed, job)
    ended = bed.wait_job(job, ENDED)
    said = output(bed, job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), said
    assert "resumed step-0000" in said, said
    assert left_behind(bed, job) == []
    assert metrics(bed.base, name) == undisturbed


@pytest.mark.slurm
@pytest.mark.parametrize("stage", ["modules", "ray"])
def test_a_warning_before_training_goes_back_into_the_queue_at_once(
    bed: SlurmBed, stage: str
) -> None:
    """While env.sh loads modules, or while Ray's head starts."""
    slow = bed.base / "slow.sh"
    slow.write_text(". slurm/env.sh; touch loading; sleep 3", encoding="utf-8")
    settings = {"modules": slow, "ray": "slurm/env.sh"}[stage]
    job = sbatch(bed, "early", "steps=100000", options=(f"--export=ALL,TUNELOOM_ENV={settings}",))
    begun = {"modules": bed.base / "loading", "ray": bed.base / f"runs/.slurm/{job}/head.log"}
    deadline = time.monotonic() + 60
    while not begun[stage].exists():
        assert time.monotonic() < deadline, output(bed, job)
        time.sleep(0.05)
    bed.run("scancel", "--batch", "--signal=USR1", job)
    bed.wait_job(job, {"PENDING"}, timeout=30)
    bed.run("scancel", job)
    assert "exit 75; back into the queue as restart 1" in output(bed, job)
    assert not (bed.base / "runs/early").exists()
    assert left_behind(bed, job) == []


@pytest.mark.slurm
def test_scancel_saves_and_leaves_nothing_on_either_node(
    bed: SlurmBed, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = sbatch(bed, "cancelled", "steps=100000")
    wait_for_steps(bed, job, "cancelled", 2)
    token = bed.base / f"runs/.slurm/{job}/token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert strangers_that_got_in(bed, job) == []
    assert token_in_processes(bed, token.read_text(encoding="utf-8")) == []
    bed.run("scancel", job)
    assert bed.wait_job(job, ENDED)["JobState"] == "CANCELLED"
    bed.wait_idle()
    assert left_behind(bed, job) == []
    facts = json.loads((bed.base / "runs/cancelled/run.json").read_text(encoding="utf-8"))
    assert facts["state"] == "stopped", output(bed, job)
    monkeypatch.setenv("SLURM_CONF", bed.environment()["SLURM_CONF"])
    assert follow(job, bed.base / "runs/cancelled") == 75


@pytest.mark.slurm
def test_a_run_folder_that_the_nodes_do_not_share_is_refused_with_4(bed: SlurmBed) -> None:
    """Every node has a /tmp of its own."""
    job = sbatch(bed, "private", "run.root=/tmp/runs")
    ended = bed.wait_job(job, ENDED)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "4:0"), output(bed, job)
    assert "preflight: 2 reason(s) not to start" in output(bed, job)
    assert "shared file system: rank 1" in output(bed, job)


STUB = r"""#!/bin/bash
words=$*
case $words in
  *"scripts start"*)
    echo "$SLURM_JOB_ID ${CUDA_VISIBLE_DEVICES:-none}" >> steps
    [[ $words =~ --num-cpus=([0-9]+) ]] && echo "${BASH_REMATCH[1]}" > slots
    port=${words#*--port=}
    exec REAL -c "import socket, time
s = socket.create_server(('', ${port%% *})); time.sleep(99)" ;;
  *"tuneloom train"*) echo "stub: $*"; exit "${STUB_CODE:-0}" ;;
esac
exec REAL "$@"
"""
"""An interpreter in whose place Ray only listens, and the run only ends."""


@pytest.fixture
def stub(bed: SlurmBed) -> str:
    """The option of sbatch that has the script run with STUB."""
    path = bed.base / "stub"
    path.write_text(STUB.replace("REAL", sys.executable), encoding="utf-8")
    path.chmod(0o755)
    (bed.base / "steps").unlink(missing_ok=True)
    (bed.base / "stub.sh").write_text(f"TUNELOOM_PYTHON={path}", encoding="utf-8")
    return "--export=ALL,TUNELOOM_ENV=stub.sh"


@pytest.mark.slurm
def test_a_job_that_a_task_of_an_array_submits_is_itself(bed: SlurmBed, stub: str) -> None:
    """Its run has its own id, and what goes back into the queue is this job."""
    inner = f"sbatch --parsable {stub},STUB_CODE=75 {SCRIPT} seed=%a > inner; sleep 60"
    outer = bed.run("sbatch", "--parsable", "--array=3", "--wrap", inner, cwd=bed.base)
    deadline = time.monotonic() + 30
    while not (bed.base / "inner").exists() or not (bed.base / "inner").read_text("utf-8"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    job = (bed.base / "inner").read_text("utf-8").strip()
    bed.wait_job(job, {"RUNNING"})
    assert bed.wait_job(job, {"PENDING", *ENDED}, timeout=30)["Restarts"] == "1", output(bed, job)
    left = bed.job(outer)["JobState"]
    bed.run("scancel", outer, job)
    assert left == "RUNNING"
    assert f"seed=0 launch.kind=ray launch.nodes=1 run.id=slurm-{job} " in output(bed, job)
    bed.wait_idle()


@pytest.mark.slurm
def test_a_job_that_has_no_time_to_train_ends_with_2(bed: SlurmBed, stub: str) -> None:
    """slurmctld's warning may come before the script looks."""
    job = bed.run("sbatch", "--parsable", "--time=3", stub, str(SCRIPT), cwd=bed.base)
    assert bed.wait_job(job, ENDED)["ExitCode"] == "2:0", output(bed, job)
    assert "slurm: the time limit leaves " in output(bed, job)


@pytest.mark.slurm
def test_the_largest_point_of_a_sweep_over_ranks_finds_slots(bed: SlurmBed, stub: str) -> None:
    job = bed.run("sbatch", "--parsable", "--nodes=1", stub, str(SCRIPT), "--multirun",
                  "launch.workers=2,6", cwd=bed.base)  # fmt: skip
    assert bed.wait_job(job, ENDED)["ExitCode"] == "0:0", output(bed, job)
    assert (bed.base / "slots").read_text(encoding="utf-8") == "6\n"


@pytest.mark.slurm
def test_ray_sees_the_gpus_of_its_node_however_they_were_asked_for(
    bed: SlurmBed, stub: str
) -> None:
    """Of --exclusive alone, all; --gpus=2 on two nodes is one each."""
    asked = {"--gpus-per-task=1 --ntasks-per-node=2": 2, "--gpus=2 --nodes=2": 1,
             "--exclusive --nodes=1": 4, "--gres=gpu:2": 2, "--ntasks=1": 0}  # fmt: skip
    jobs = [
        bed.run("sbatch", "--parsable", "--mem=500", *options.split(), stub, str(SCRIPT),
                cwd=bed.base)
        for options in asked
    ]  # fmt: skip
    for job in jobs:
        assert bed.wait_job(job, ENDED)["ExitCode"] == "0:0", output(bed, job)
    lines = (bed.base / "steps").read_text(encoding="utf-8").split()
    seen = dict(zip(lines[::2], lines[1::2], strict=True))
    found = [0 if seen[job] == "none" else len(seen[job].split(",")) for job in jobs]
    assert found == list(asked.values())


@pytest.mark.slurm
def test_array_tasks_share_a_node_and_take_their_index_as_an_argument(bed: SlurmBed) -> None:
    """Two Ray heads at a time on one host, each with ports, token and scratch of its own. Task 2,
    whose number is the array's, ends long before the other, and leaves it alone.
    """
    chat_rows(bed.base / "lab/rows-1.jsonl", 12_000)
    chat_rows(bed.base / "lab/rows-2.jsonl", 24)
    job = bed.run(
        "sbatch", "--parsable", "--array=1-2", "--nodelist=n1", "--mem=3000", "--cpus-per-task=2",
        str(SCRIPT), *RUN, "steps=null", "epochs=1", "data.path=lab/rows-%a.jsonl", "seed=%a",
        cwd=bed.base,
    )  # fmt: skip
    ends = []
    for task in (2, 1):
        ended = bed.wait_job(f"{job}_{task}", ENDED, timeout=400)
        assert ended["JobState"] == "COMPLETED", output(bed, ended["JobId"])
        ends.append(ended["EndTime"])
        folder = bed.base / f"runs/slurm-{job}-{task}"
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        assert (facts["config"]["seed"], facts["state"]) == (task, "done")
        assert facts["attempts"][0]["job"] == ended["JobId"]
        assert (ended["JobId"] == job) is (task == 2)
    quick, slow = map(datetime.fromisoformat, ends)
    assert (slow - quick).total_seconds() > 10


@pytest.mark.slurm
def test_ranks_find_slots_however_few_processors_the_job_has(bed: SlurmBed) -> None:
    """`sbatch --gpus-per-node=8` alone gives a node a single processor."""
    job = sbatch(
        bed, "crowded", "launch.workers=2", "launch.wait_seconds=15", options=("--nodes=1",)
    )  # fmt: skip
    ended = bed.wait_job(job, ENDED)
    assert (ended["NumCPUs"], ended["JobState"]) == ("1", "COMPLETED"), output(bed, job)
    facts = json.loads((bed.base / "runs/crowded/run.json").read_text(encoding="utf-8"))
    assert facts["world_size"] == 2


@pytest.mark.slurm
def test_an_interrupt_ends_the_command_and_its_sweep_but_not_the_job(bed: SlurmBed) -> None:
    following = subprocess.Popen(
        [sys.executable, "-m", "tuneloom", "train", "--multirun", *RUN, "run.name=followed",
         "steps=100000", "launch=slurm", "launch.gpus_per_worker=0", "launch.memory=3000M",
         "optim.lr=0.001,0.002"],
        env=bed.environment() | {"PYTHONPATH": str(ROOT)}, cwd=bed.base, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert following.stdout is not None
    (job,) = re.findall(r"slurm: job (\d+), run followed", following.stdout.readline())
    time.sleep(1)
    following.send_signal(signal.SIGINT)
    said, complained = following.communicate(timeout=60)
    left = bed.job(job)["JobState"]
    bed.run("scancel", job)
    assert following.returncode == 130, said + complained
    assert f"job {job} goes on" in said and "scancel" not in said  # which the next job would name
    assert left in ("PENDING", "RUNNING")
    bed.wait_idle()


@pytest.mark.slurm
def test_launch_slurm_submits_follows_and_ends_with_the_exit_code_of_the_run(bed: SlurmBed) -> None:
    """An empty dataset is exit 3, said inside the job and carried out to the login node."""
    (bed.base / "lab/empty.jsonl").write_text("", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "tuneloom", "train", *RUN, "run.id=submitted",
         "data.path=lab/empty.jsonl", "launch=slurm", "launch.nodes=2", "launch.workers=2",
         "launch.gpus_per_worker=0", "launch.memory=3000M", "launch.time=10"],
        env=bed.environment() | {"PYTHONPATH": str(ROOT)}, cwd=bed.base, capture_output=True,
        text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stdout + done.stderr
    assert "run submitted in runs/submitted" in done.stdout
    assert "is FAILED, exit 3" in done.stdout


@pytest.mark.slurm
def test_a_sweep_submits_a_job_a_point_with_what_was_asked_of_slurm(bed: SlurmBed) -> None:
    rates = ("0.001", "0.002", "0.003")
    done = subprocess.run(
        [sys.executable, "-m", "tuneloom", "train", "--multirun", *RUN, "run.name=swept",
         "launch=slurm", "launch.follow=false", "launch.nodes=2", "launch.workers=4",
         "launch.gpus_per_worker=0", "launch.memory=2000M", "launch.partition=high",
         "launch.account=lab", "launch.time=1-00:30", f"optim.lr={','.join(rates)}"],
        env=bed.environment() | {"PYTHONPATH": str(ROOT)}, cwd=bed.base, capture_output=True,
        text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = re.findall(r"slurm: job (\d+), run (swept\S+);", done.stdout)
    asked = {job: bed.job(job) for job, _ in jobs}
    bed.run("scancel", *asked)
    files = [
        file for _, run in jobs for file in bed.base.glob(f"runs/{run}/slurm/*/local/job.yaml")
    ]
    found = [yaml.safe_load(file.read_text(encoding="utf-8"))["optim"]["lr"] for file in files]
    assert [str(rate) for rate in found] == list(rates)
    wanted = {"Partition": "high", "Account": "lab", "TimeLimit": "1-00:30:00", "NumTasks": "4",
              "MinMemoryNode": "2000M", "Requeue": "1"}  # fmt: skip
    assert [{k: facts[k] for k in wanted} for facts in asked.values()] == [wanted] * 3


@pytest.mark.slurm
@pytest.mark.parametrize(("state", "code"), [("done", 0), ("stopped", 75), ("running", 5)])
def test_a_job_that_slurm_has_forgotten_ends_with_what_its_run_says(
    bed: SlurmBed, state: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    part = {"digest": "", "path": ""}
    facts = {"config_digest": "", "config": {}, "base": part, "dataset": part,
             "attempts": [{"job": "999998"}, {"job": "999999"}], "state": state}  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    monkeypatch.setenv("SLURM_CONF", bed.environment()["SLURM_CONF"])
    assert follow("999999", tmp_path) == code
    assert f"{tmp_path}/run.json says {state}, exit {code}" in capsys.readouterr().out
    assert follow("999998", tmp_path) == 5
    assert f"{tmp_path}/run.json says nothing of it, exit 5" in capsys.readouterr().out


def let_time_be_over(bed: SlurmBed, job: str) -> None:
    """Now, so that the warning and Slurm's TERM come together, at slurmctld's next look (30 s)."""
    bed.run("scontrol", "update", f"jobid={job}", "EndTime=now")


def lose_n2(bed: SlurmBed, job: str) -> None:
    """On a cluster that requeues nothing."""
    bed.run("scontrol", "update", f"jobid={job}", "Requeue=0")
    bed.kill_node("n2")
    bed.run("scontrol", "update", "nodename=n2", "state=down", "reason=power")


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("end", "state", "says", "code"),
    [(let_time_be_over, "TIMEOUT", "stopped", 75), (lose_n2, "NODE_FAIL", "running|failed", 5)],
)
def test_the_command_ends_with_a_job_that_slurm_ends_and_says_how_to_resume(
    bed: SlurmBed, end: Callable[[SlurmBed, str], None], state: str, says: str, code: int
) -> None:
    name = end.__name__
    with subprocess.Popen(
        [sys.executable, "-m", "tuneloom", "train", *RUN, "steps=100000", f"run.id={name}",
         "launch=slurm", "launch.nodes=2", "launch.workers=2", "launch.gpus_per_worker=0",
         "launch.memory=3000M"],
        env=bed.environment() | {"PYTHONPATH": str(ROOT)}, cwd=bed.base, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as following:  # fmt: skip
        assert following.stdout is not None
        (job,) = re.findall(rf"slurm: job (\d+), run {name}", following.stdout.readline())
        wait_for_steps(bed, job, name, 3)
        end(bed, job)
        try:
            said, _ = following.communicate(timeout=180)
        finally:
            following.kill()
    if "host.n2" not in bed.processes:
        bed.start_node("n2")
    bed.wait_idle()
    assert following.returncode == code, said
    assert re.fullmatch(  # the rank that is left may say that it lost the other
        rf"slurm: job {job} is {state}; runs/{name}/run.json says ({says}), exit {code}; the same "
        rf"command with run.id={name} resumes what is not done", said.splitlines()[-1]
    )  # fmt: skip


@pytest.mark.slurm
def test_a_job_that_ignores_its_time_limit_is_killed_and_the_command_ends_with_5(
    bed: SlurmBed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """After KillWait (30 s)."""
    job = bed.run("sbatch", "--parsable", "--wrap", "trap '' TERM; sleep 1000", cwd=bed.base)
    bed.wait_job(job, {"RUNNING"})
    let_time_be_over(bed, job)
    monkeypatch.setenv("SLURM_CONF", bed.environment()["SLURM_CONF"])
    assert follow(job, tmp_path) == 5
    assert bed.job(job)["ExitCode"] == "0:9"
    said = f"job {job} is TIMEOUT; {tmp_path}/run.json says nothing of it, exit 5"
    assert said in capsys.readouterr().out


def image(folder: Path, *, shown: list[Path]) -> Path:
    """A container image that holds a base model and nothing else; folders of the host to enter."""
    for name in ("dev", "proc", "sys", "tmp", "var/tmp", "home", *(str(p)[1:] for p in shown)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (folder / name).symlink_to(f"usr/{name}")
    for name in ("passwd", "group"):  # ch-run mounts its own over these
        (folder / "etc" / name).touch()
    tiny_model(folder / "only-in-the-image/base")
    return folder


@pytest.mark.slurm
def test_ray_and_the_ranks_of_every_node_run_in_the_container(bed: SlurmBed) -> None:
    """Charliecloud's; the base model is a folder that only the image has."""
    if shutil.which("ch-run") is None:
        assert os.environ.get("TUNELOOM_REQUIRE_SLURM") != "1", "no ch-run on this machine"
        pytest.skip("no ch-run on this machine (apt-get install charliecloud-runtime)")
    needed = (Path("/usr"), Path("/etc"), Path(sys.base_prefix), Path(sys.prefix), ROOT, bed.base)
    shown = [p for p in needed if not any(q != p and p.is_relative_to(q) for q in needed)]
    folder = image(bed.base / "image", shown=shown)
    enter = ["ch-run", *(f"--bind={p}:{p}" for p in shown), f"--cd={bed.base}", str(folder), "--"]
    done = subprocess.run(
        [sys.executable, "-m", "tuneloom", "train", *RUN, "run.id=contained",
         "model.path=/only-in-the-image/base", "launch=slurm", "launch.nodes=2",
         "launch.workers=2", "launch.gpus_per_worker=0", "launch.memory=3000M",
         f"launch.container={json.dumps(enter)}", f"launch.python={sys.executable}"],
        env=bed.environment() | {"PYTHONPATH": str(ROOT), "USER": "root"}, cwd=bed.base,
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((bed.base / "runs/contained/run.json").read_text(encoding="utf-8"))
    assert (facts["state"], facts["launcher"]["nodes"]) == ("done", 2)
    assert not Path("/only-in-the-image").exists()
