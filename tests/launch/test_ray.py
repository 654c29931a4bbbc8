"""One config over every launcher, and the job API of a Ray cluster: codes, stop, token."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch.test_security import essence, in_environment, planted, secret_shapes
from tuneloom.testing import free_port, metrics

ROOT = Path(__file__).parent.parent.parent
HASHES = ("config_digest", "data_order", "first_loss")


def arguments(lab: Path, run_id: str, *more: str) -> list[str]:
    """Overrides of one small run on 2 ranks; `more` win."""
    keys = {
        "steps": "4", "epochs": "1000", "model.path": f"{lab}/base", "model.dtype": "fp32",
        "method.rank": "8", "data.path": f"{lab}/rows.jsonl", "data.validation": "null",
        "batch.max_length": "128", "batch.tokens": "512", "batch.window": "64", "optim.lr": "5e-3",
        "optim.warmup_steps": "2", "zero": "stage0", "checkpoint.every": "0",
        "train.drill": "false", "tracker": "off", "run.root": f"{lab}/runs", "run.id": run_id,
    }  # fmt: skip
    keys |= dict(item.split("=", 1) for item in more)
    return [f"{key}={value}" for key, value in keys.items()]


def hashes(lab: Path, run_id: str) -> dict[str, str]:
    facts = json.loads((lab / "runs" / run_id / "run.json").read_text(encoding="utf-8"))
    assert facts["state"] == "done"
    return {key: facts[key] for key in HASHES}


def run(*command: str, code: int = 0, env: dict[str, str] | None = None) -> str:
    """Run in the repository; returns the output."""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=240,
        check=False, env=env,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@dataclass(frozen=True)
class Cluster:
    """A Ray head of this test's own on loopback, with a token."""

    dashboard: str
    environment: dict[str, str]
    gcs: str
    """Where `ray start --address` and RAY_ADDRESS find it."""

    def submit(self, name: str, *entrypoint: str, code: int = 0) -> str:
        return run(
            "ray.scripts.scripts", "job", "submit", "--address", self.dashboard,
            "--submission-id", name, "--working-dir", str(ROOT), "--runtime-env-json",
            '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}', "--", *entrypoint, code=code,
            env=self.environment,
        )  # fmt: skip

    def ask(self, path: str, token: str | None, body: bytes | None = None) -> int:
        """The status of a GET of the jobs API, of a POST when there is a body."""
        headers = {"Content-Type": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.dashboard + path, body, headers), timeout=30
            ) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def takes_jobs(self) -> bool:
        """True once the dashboard and the agent that starts jobs are up."""
        body = json.dumps({"entrypoint": "true"}).encode()
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.dashboard}/api/jobs/", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return bool(answer.status == 200)
        except OSError:  # not listening, or 500 while there is no agent yet
            return False

    def job(self, name: str) -> dict[str, object]:
        headers = {"Authorization": f"Bearer {self.token}"}
        request = urllib.request.Request(f"{self.dashboard}/api/jobs/{name}", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return dict(json.load(answer))

    @property
    def token(self) -> str:
        return Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Not tmp_path: its length and Ray's session name pass the 107 bytes of a Unix socket's path.
    folder = Path(tempfile.mkdtemp(prefix="tl"))
    token = folder / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    outer = {k: v for k, v in in_environment().items() if not k.startswith("RAY_")}
    environment = outer | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "HOME": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    dashboard, gcs = free_port(), free_port()
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
         f"--port={gcs}", f"--dashboard-port={dashboard}", "--num-cpus=2", "--num-gpus=0",
         "--node-ip-address=127.0.0.1", "--object-store-memory=80000000",
         f"--temp-dir={folder}/ray", f"--dashboard-agent-listen-port={free_port()}",
         "--disable-usage-stats"],
        env=environment, stdout=(folder / "head.log").open("w"), stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    cluster = Cluster(f"http://127.0.0.1:{dashboard}", environment, f"127.0.0.1:{gcs}")
    try:
        deadline = time.monotonic() + 120
        while not cluster.takes_jobs():
            assert head.poll() is None, (folder / "head.log").read_text(encoding="utf-8")
            assert time.monotonic() < deadline, (folder / "head.log").read_text(encoding="utf-8")
            time.sleep(0.5)
        yield cluster
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def test_inline_torchrun_local_ray_and_a_ray_job_are_one_run(lab: Path, cluster: Cluster) -> None:
    """Equal config, order of data and, at 2 ranks, loss of step 1 to the bit."""
    run("tuneloom", "train", *arguments(lab, "inline", "launch=inline", "batch.accumulation=2"))
    run("torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}",
        "-m", "tuneloom.train", *arguments(lab, "torchrun"))  # fmt: skip
    run("tuneloom", "train", *arguments(lab, "local", "launch=local", "launch.workers=2"))
    said = cluster.submit(
        "same", "python", "-m", "tuneloom", "train",
        *arguments(lab, "job", "launch=ray", "launch.workers=2"),
    )  # fmt: skip
    assert "preflight: 2 rank(s) on 1 node(s) agree" in said
    expected = hashes(lab, "torchrun")
    assert hashes(lab, "local") == expected
    assert hashes(lab, "job") == expected
    alone = hashes(lab, "inline")
    assert (alone["config_digest"], alone["data_order"]) == (
        expected["config_digest"],
        expected["data_order"],
    )


def test_a_job_ends_with_the_exit_code_of_the_run(lab: Path, cluster: Cluster) -> None:
    """`ray job submit` itself only knows 0 and 1; the code stands in the job's details."""
    said = cluster.submit(
        "coded", "python", "-m", "tuneloom", "train",
        *arguments(lab, "coded", "launch=ray", "run.root=runs"), code=1,
    )  # fmt: skip
    assert "run.root: 'runs' would lie in the working_dir" in said
    assert cluster.job("coded")["driver_exit_code"] == 4


@pytest.mark.parametrize(
    ("name", "words", "why"),
    [
        ("kept", ["root=datasets"], "root: 'datasets' would lie in the working_dir"),
        ("wide", ["workers=99"], "workers: 99 tasks at once, but the Ray cluster has"),
    ],
)
def test_an_ingest_that_the_cluster_cannot_run_is_refused(
    cluster: Cluster, tmp_path: Path, name: str, words: list[str], why: str
) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    said = cluster.submit(
        name, "python", "-m", "tuneloom", "ingest", "data.name=d", f"source={tmp_path}",
        f"root={tmp_path}", "launch=ray", *words, code=1,
    )  # fmt: skip
    assert why in said
    assert cluster.job(name)["driver_exit_code"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_ray_job_stop_saves_and_the_same_command_resumes(
    lab: Path, cluster: Cluster, tmp_path: Path
) -> None:
    """With 25 secrets in the cluster's environment and in the rows: none in what the jobs API tells
    of a job, in its log or in its run.
    """
    entry = ["python", "-m", "tuneloom", "train"]
    rows_of = {"path": planted(tmp_path / "rows.jsonl", answer="no"),
               "validation": planted(tmp_path / "validation.jsonl")}  # fmt: skip
    words = arguments(
        lab, "stopped", "launch=ray", "launch.workers=2", "steps=100000", "batch.max_length=512",
        *(f"data.{k}={v}" for k, v in rows_of.items()),
    )  # fmt: skip
    folder, saved, lines = lab / "runs/stopped", None, 0
    rows = folder / "metrics.jsonl"
    for name in ("stopped", "stopped-again"):
        submitted = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--no-wait", "--address",
             cluster.dashboard, "--submission-id", name, "--working-dir", str(ROOT),
             "--runtime-env-json", '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}', "--",
             *entry, *words],
            cwd=ROOT, env=cluster.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert submitted.wait(120) == 0
        deadline = time.monotonic() + 120
        while not rows.exists() or len(rows.read_text("utf-8").splitlines()) < lines + 3:
            assert time.monotonic() < deadline, cluster.job(name)
            time.sleep(0.3)
        run("ray.scripts.scripts", "job", "stop", "--address", cluster.dashboard, name,
            env=cluster.environment)  # fmt: skip
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        assert (facts["state"], facts["resumed_from"]) == ("stopped", saved)
        assert cluster.job(name)["status"] == "STOPPED"
        saved = sorted((folder / "checkpoints").glob("step-*"))[-1].name
        lines = len(rows.read_text("utf-8").splitlines())
    assert metrics(lab, "stopped", "step") == list(range(1, int(saved[-6:]) + 1))
    told = json.dumps([cluster.job(name) for name in ("stopped", "stopped-again")])
    told += run("ray.scripts.scripts", "job", "logs", "--address", cluster.dashboard, "stopped",
                env=cluster.environment)  # fmt: skip
    assert "run stopped in" in told
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert [s for s in secret_shapes() if essence(s).encode() in b"".join(written)] == []
    assert [s for s in secret_shapes() if essence(s) in told] == []


def test_the_jobs_api_answers_no_one_without_the_token(cluster: Cluster) -> None:
    assert cluster.ask("/api/jobs/", None) == 401
    assert cluster.ask("/api/jobs/", secrets.token_hex(32)) == 403
    assert cluster.ask("/api/jobs/", cluster.token) == 200


def test_no_form_of_a_wrong_token_reads_posts_joins_or_drives(cluster: Cluster) -> None:
    """S1: 6 tokens x GET and POST; one node and one driver with another cluster's token."""
    wrong = [None, "", secrets.token_hex(32), cluster.token[:-1], cluster.token + "0",
             cluster.token.upper()]  # fmt: skip
    for token in wrong:
        assert cluster.ask("/api/jobs/", token) in (401, 403), token
        assert cluster.ask("/api/jobs/", token, b'{"entrypoint": "touch canary"}') in (401, 403)
    assert cluster.ask("/api/jobs/", cluster.token) == 200
    other = Path(cluster.environment["HOME"]) / "other"
    other.touch(0o600)
    other.write_text(secrets.token_hex(32), encoding="utf-8")
    stranger = cluster.environment | {"RAY_AUTH_TOKEN_PATH": str(other)}
    drive = "import ray, sys; ray.init(address=sys.argv[1], logging_level=50); print('driving')"
    intruders = [
        subprocess.Popen(
            [sys.executable, *words], env=stranger, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for words in (
            ["-m", "ray.scripts.scripts", "start", "--block", f"--address={cluster.gcs}",
             "--num-cpus=1", f"--temp-dir={cluster.environment['HOME']}/stranger"],
            ["-c", drive, cluster.gcs],
        )
    ]  # fmt: skip
    try:
        for intruder in intruders:
            said = intruder.communicate(timeout=120)[0]
            assert intruder.returncode != 0 and "driving" not in said, said
    finally:
        for intruder in intruders:
            if intruder.poll() is None:
                os.killpg(intruder.pid, signal.SIGKILL)
