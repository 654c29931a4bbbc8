"""The batch script on a real Slurm of two nodes: run, stop, requeue, cancel, exit codes, nothing
left.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tuneloom.launch.slurm import render_default
from tuneloom.launch.slurm_bed import SlurmBed, missing
from tuneloom.testing import chat_rows, free_port, metrics, tiny_model

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "slurm/finetune.sbatch"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
RUN = [
    "steps=4", "epochs=1000000", "model.path=lab/base", "model.dtype=fp32", "method.rank=8",
    "data.path=lab/rows.jsonl", "data.validation=null", "batch.max_length=128", "batch.tokens=512",
    "batch.window=64", "optim.lr=5e-3", "optim.warmup_steps=2", "zero=stage0", "checkpoint.every=0",
    "train.drill=false", "tracker=off",
]  # fmt: skip


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
    bed: SlurmBed, run_id: str, *overrides: str, options: tuple[str, ...] = ()
) -> str:  # fmt: skip
    """Submit on two nodes, as a user does; returns the job's number."""
    return bed.run(
        "sbatch", "--parsable", "--nodes=2", "--mem=3000", *options, str(SCRIPT), *RUN,
        f"run.id={run_id}", *overrides, cwd=bed.base,
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


def left_behind(bed: SlurmBed, job: str) -> list[str]:
    """Processes, scratch folders and tokens of a job that has ended."""
    found = []
    for node in bed.addresses:
        lines = bed.inside(node, "ps", "-eo", "args").splitlines()
        found += [line for line in lines if "ray" in line or "tuneloom train" in line]
        found += [f for f in bed.inside(node, "ls", "/tmp").split() if f.startswith("tuneloom-")]
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


@pytest.mark.slurm
def test_a_job_trains_on_two_nodes_and_leaves_nothing(bed: SlurmBed) -> None:
    job = sbatch(bed, "whole")
    ended = bed.wait_job(job, ENDED)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), output(bed, job)
    facts = json.loads((bed.base / "runs/whole/run.json").read_text(encoding="utf-8"))
    assert (facts["state"], facts["world_size"], facts["launcher"]["nodes"]) == ("done", 2, 2)
    assert "preflight: 2 rank(s) on 2 node(s) agree; slowest link" in output(bed, job)
    assert left_behind(bed, job) == []
    torchrun = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
         f"--master-port={free_port()}", "-m", "tuneloom.train", *RUN, "run.id=torchrun"],
        env=bed.environment() | {"PYTHONPATH": str(ROOT)}, cwd=bed.base, capture_output=True,
        text=True, timeout=180, check=False,
    )  # fmt: skip
    assert torchrun.returncode == 0, torchrun.stderr
    other = json.loads((bed.base / "runs/torchrun/run.json").read_text(encoding="utf-8"))
    for key in ("config_digest", "data_order", "first_loss"):
        assert facts[key] == other[key], key


@pytest.mark.slurm
def test_preemption_saves_and_requeues_then_term_saves_and_ends_with_75(bed: SlurmBed) -> None:
    """A job of a higher partition takes both nodes; Slurm's warning is the one of a time limit."""
    job = sbatch(bed, "requeued", "steps=100000")
    wait_for_steps(bed, job, "requeued", 3)
    token = bed.base / f"runs/.slurm/{job}/token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert strangers_that_got_in(bed, job) == []
    assert token_in_processes(bed, token.read_text(encoding="utf-8")) == []
    bed.run("sbatch", "-N2", "-p", "high", "--exclusive", "--wrap", "sleep 2", cwd=bed.base)
    bed.wait_job(job, {"PENDING"})
    saved = sorted((bed.base / "runs/requeued/checkpoints").glob("step-*"))[-1].name
    assert bed.job(job)["Restarts"] == "1"
    rows = len(metrics(bed.base, "requeued"))
    bed.wait_job(job, {"RUNNING"})
    wait_for_steps(bed, job, "requeued", rows + 3)
    bed.run("scancel", "--batch", "--signal=TERM", job)
    ended = bed.wait_job(job, ENDED)
    said = output(bed, job)  # of the ranks, which Ray brings a moment later
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "75:0"), said
    assert f"resumed {saved} of requeued" in said, said
    steps = metrics(bed.base, "requeued", "step")
    assert steps == list(range(1, len(steps) + 1))
    assert left_behind(bed, job) == []


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
def test_scancel_saves_and_leaves_nothing_on_either_node(bed: SlurmBed) -> None:
    job = sbatch(bed, "cancelled", "steps=100000")
    wait_for_steps(bed, job, "cancelled", 2)
    bed.run("scancel", job)
    assert bed.wait_job(job, ENDED)["JobState"] == "CANCELLED"
    bed.wait_idle()
    assert left_behind(bed, job) == []
    facts = json.loads((bed.base / "runs/cancelled/run.json").read_text(encoding="utf-8"))
    assert facts["state"] == "stopped", output(bed, job)


@pytest.mark.slurm
def test_a_run_folder_that_the_nodes_do_not_share_is_refused_with_4(bed: SlurmBed) -> None:
    """Every node has a /tmp of its own."""
    job = sbatch(bed, "private", "run.root=/tmp/runs")
    ended = bed.wait_job(job, ENDED)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "4:0"), output(bed, job)
    assert "preflight: 2 reason(s) not to start" in output(bed, job)
    assert "shared file system: rank 1" in output(bed, job)


@pytest.mark.slurm
def test_array_tasks_share_a_node_and_take_their_index_as_an_argument(bed: SlurmBed) -> None:
    """Two Ray heads at a time on one host, each with ports, token and scratch of its own."""
    job = bed.run(
        "sbatch", "--parsable", "--array=1-2", "--nodelist=n1", "--mem=3000", "--cpus-per-task=2",
        str(SCRIPT), *RUN, "steps=2", "seed=%a", cwd=bed.base,
    )  # fmt: skip
    for task in (1, 2):
        ended = bed.wait_job(f"{job}_{task}", ENDED)
        assert ended["JobState"] == "COMPLETED", output(bed, ended["JobId"])
        folder = bed.base / f"runs/slurm-{job}-{task}"
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        assert facts["config"]["seed"] == task


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
