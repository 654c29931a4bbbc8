"""W&B online, against a server on this machine that stands in for the outside network."""

import gzip
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from tuneloom.errors import STOPPED
from tuneloom.testing import metrics, small_config

History = Callable[[Path], list[dict[str, Any]]]


class Server(ThreadingHTTPServer):
    """Speaks as much of W&B's protocol as its client needs to upload a run's history."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        """Rows by run id and line number, as uploaded."""
        self.names: list[str] = []
        """Run ids that were opened, in order."""
        self.failing = False
        """Answer 500 to everything."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        run = str(variables.get("name") or variables.get("run") or "")
        project = {"id": "P", "name": "tuneloom", "entity": {"id": "E", "name": "someone"}}
        rows = self.history.get(run, {})
        bucket = {
            "id": run, "name": run, "displayName": run, "config": "{}", "project": project,
            "historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0,
            "summaryMetrics": json.dumps(rows[max(rows)]) if rows else "{}", "eventsTail": "[]",
            "historyTail": json.dumps([json.dumps(rows[max(rows)])]) if rows else "[]",
            "tags": [], "wandbConfig": '{"t": 1}',
        }  # fmt: skip
        if operation == "Viewer":
            return {"viewer": {"id": "U", "entity": "someone", "username": "someone"}}
        if operation == "RunResumeStatus":
            known = run in self.names
            return {"model": {"id": "P", "name": "tuneloom", "bucket": bucket if known else None}}
        if operation == "UpsertBucket":
            self.names.append(run)
            return {"upsertBucket": {"bucket": bucket, "inserted": not rows}}
        if operation == "CreateRunFiles":
            files = [{"name": n, "uploadUrl": f"{self.url}/put/{n}"} for n in variables["files"]]
            return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}
        return {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        """The page of the server itself, where a run asks whether it answers."""
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer: dict[str, Any] = {}
        if self.server.failing:
            pass
        elif self.path == "/graphql":
            asked = json.loads(body)
            found = self.server.answer(asked["operationName"], asked.get("variables") or {})
            answer = {"data": found}
        elif self.path.endswith("/file_stream"):
            stream = json.loads(body).get("files", {}).get("wandb-history.jsonl")
            rows = self.server.history.setdefault(self.path.split("/")[-2], {})
            for number, line in enumerate(stream["content"] if stream else []):
                rows[stream["offset"] + number] = json.loads(line)
        content = json.dumps(answer).encode()
        self.send_response(500 if self.server.failing else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_PUT = do_POST

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


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
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "k" * 40}
    return subprocess.run(
        [sys.executable, "-c", TRAIN, json.dumps(config), str(grace)],
        env=environment, capture_output=True, text=True, timeout=180,
    )  # fmt: skip


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
    assert "tracker: W&B online (a key was found)" in first.stdout
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
    server.failing = True
    assert train(config, server, grace=2.0).returncode == STOPPED
    assert server.history == {}
    server.failing = False
    assert train(config, server).returncode == 0
    rows = [row for row in server.history["caught-up"].values() if "train/loss" in row]
    assert [row["_step"] for row in rows] == [1, 2, 3, 4]


def test_a_file_that_was_cut_off_with_its_host_is_completed_on_the_server(
    lab: Path, server: Server
) -> None:
    config = small_config(lab, "cut-off-online", steps=4, tracker__mode="online")
    folder = to_be_stopped(lab, "cut-off-online")
    server.failing = True
    assert train(config, server, grace=2.0).returncode == STOPPED
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    file.write_bytes(file.read_bytes()[:1000])
    server.failing = False
    second = train(config, server)
    assert second.returncode == 0, second.stderr
    rows = [row for row in server.history["cut-off-online"].values() if "train/loss" in row]
    assert [row["_step"] for row in rows] == [1, 2, 3, 4]


def test_a_killed_run_leaves_no_uploader_behind(lab: Path, server: Server) -> None:
    config = small_config(lab, "killed-online", steps=100_000, tracker__mode="online")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "k" * 40}
    process = subprocess.Popen(
        [sys.executable, "-c", TRAIN, json.dumps(config), "1"], env=environment
    )
    metrics_file = lab / "runs/killed-online/metrics.jsonl"
    wait_until(metrics_file.exists)
    wait_until(lambda: uploaders("killed-online") != [])
    process.kill()
    process.wait()
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
