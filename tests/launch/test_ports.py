"""S1 as a port scan: what a Ray of ours says to who has no token, on every port it listens on."""

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest
import ray

from tuneloom.launch.head import listens
from tuneloom.launch.hosts import ADDRESSES, PORT, Hosts

DRIVES = """
import os, sys
from tuneloom.launch.config import LaunchConfig
from tuneloom.launch.supervise import connect, private_token
kind = sys.argv[1]
if kind == "local":
    private_token()
connect(LaunchConfig(kind=kind, workers=2, nodes=1 if kind == "local" else 2))
import ray
@ray.remote(num_cpus=1)
class Rank:
    def pid(self): return os.getpid()
ranks = [Rank.remote(), Rank.remote()]
ray.get([rank.pid.remote() for rank in ranks])
print("ready", flush=True)
sys.stdin.read()
"""
AGENTS_SECONDS = 5.0
"""Ray's agents open their ports late."""


@contextmanager
def driver(kind: str, environment: dict[str, str], prefix: Sequence[str] = ()) -> Iterator[int]:
    """The pid of a driver with two actors on a Ray of its own (`local`) or of a cluster (`ray`)."""
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", DRIVES, kind], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(AGENTS_SECONDS)
        yield process.pid
    finally:
        process.communicate(timeout=60)


def test_no_process_of_an_embedded_ray_listens_beyond_loopback() -> None:
    outer = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with driver("local", outer) as pid:
        me = psutil.Process(pid)
        found = [
            (one.name(), place.laddr.ip)
            for one in [me, *me.children(recursive=True)]
            for place in one.net_connections("inet") if place.status == psutil.CONN_LISTEN
        ]  # fmt: skip
    assert {"gcs_server", "raylet"} <= {name for name, _ in found} and len(found) >= 8
    assert [f for f in found if f[1].removeprefix("::ffff:") not in ("127.0.0.1", "::1")] == []


def methods() -> list[str]:
    """Every method of Ray's services, by the names its own stubs call, and OpenTelemetry's."""
    found = {"/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"}
    for stub in (Path(ray.__file__).parent / "core" / "generated").glob("*_pb2_grpc.py"):
        found |= set(re.findall(r"'(/ray\.rpc\.[\w.]+/\w+)'", stub.read_text()))
    return sorted(found)


def ask(port: int, token: str | None, names: list[str]) -> dict[str, str]:
    """By method what the port answers to an empty request."""
    headers = [("authorization", f"Bearer {token}")] if token else []
    said = {}
    with grpc.insecure_channel(f"{ADDRESSES['a']}:{port}") as channel:
        for name in names:
            call = channel.unary_unary(name)
            try:
                call(b"", timeout=5.0, metadata=headers)
                said[name] = "OK"
            except grpc.RpcError as error:
                said[name] = error.code().name
                if said[name] == "UNAVAILABLE":  # speaks no gRPC
                    break
    return said


def fetch(port: int, path: str, body: bytes | None = None) -> str:
    """Status and first characters of what an HTTP request without a token gets; or that the port
    speaks no HTTP.
    """
    address = f"http://{ADDRESSES['a']}:{port}{path}"
    try:
        with urllib.request.urlopen(urllib.request.Request(address, body), timeout=5) as answer:
            return f"{answer.status} {answer.read(6).decode()}".strip()
    except urllib.error.HTTPError as error:
        return str(error.code)
    except (OSError, http.client.HTTPException):
        return "no HTTP"


def scan() -> dict[str, object]:
    """Run on the other host."""
    with ThreadPoolExecutor(64) as pool:
        ports = range(1, 65536)
        taken = pool.map(lambda port: listens(f"{ADDRESSES['a']}:{port}"), ports)
        found = [port for port, there in zip(ports, taken, strict=True) if there]
    names, token = methods(), Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    read = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"
    return {
        "methods": len(names),
        "ports": {
            port: {
                "none": ask(port, None, names), "wrong": ask(port, "0" * 64, names),
                "right": ask(port, token, [read]),
                "http": [fetch(port, "/"), fetch(port, "/api/jobs/"),
                         fetch(port, "/api/jobs/", b'{"entrypoint": "true"}')],
            }
            for port in found
        },
    }  # fmt: skip


def test_no_port_that_another_host_can_reach_answers_without_the_token() -> None:
    if os.geteuid() or shutil.which("ip") is None:
        reason = "network namespaces need root and `ip` (iproute2)"
        assert os.environ.get("TUNELOOM_REQUIRE_SLURM") != "1", reason
        pytest.skip(reason)
    with Hosts() as hosts, driver(
        "ray", hosts.environment | {"RAY_ADDRESS": f"{ADDRESSES['a']}:{PORT}"}, hosts.inside("a")
    ):  # fmt: skip
        done = subprocess.run(
            [*hosts.inside("b"), sys.executable, __file__], env=hosts.environment,
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    ports = said["ports"]
    answers = [port[token] for port in ports.values() for token in ("none", "wrong")]
    codes = {code for answer in answers for code in answer.values()}
    assert codes == {"UNAUTHENTICATED", "UNIMPLEMENTED", "UNAVAILABLE"}
    refused = [name for answer in answers for name, code in answer.items()
               if code == "UNAUTHENTICATED"]  # fmt: skip
    assert said["methods"] == 147 and len(ports) >= 10 and len(refused) >= 2 * 150
    assert "OK" in ports[str(PORT)]["right"].values(), "with the token the store does answer"
    # Pages of counters for Prometheus answer anyone who reads, whatever the path, and no one else.
    assert {tuple(port["http"]) for port in ports.values()} == {
        ("no HTTP",) * 3, ("401",) * 3, ("200 # HELP", "200 # HELP", "405"),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(scan()))
