"""Who hears us: an embedded Ray nobody but this machine, a cluster's head no one without the token
(S1).

`python -m tests.launch.test_ports ADDRESS PORT...` knocks at ports and prints what opened as JSON.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launch.test_ray import ROOT, arguments
from tuneloom.errors import RefusedError
from tuneloom.launch.hosts import ADDRESSES, PORT, Hosts

CALLS = [
    "/ray.rpc.InternalKVGcsService/InternalKVGet", "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.InternalKVGcsService/InternalKVPut",
    "/ray.rpc.InternalKVGcsService/GetInternalConfig",
    "/ray.rpc.JobInfoGcsService/AddJob", "/ray.rpc.JobInfoGcsService/GetAllJobInfo",
    "/ray.rpc.ActorInfoGcsService/RegisterActor", "/ray.rpc.ActorInfoGcsService/GetAllActorInfo",
    "/ray.rpc.NodeInfoGcsService/RegisterNode", "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.NodeInfoGcsService/GetClusterId", "/ray.rpc.TaskInfoGcsService/GetTaskEvents",
    "/ray.rpc.ControlPlanePubSubGcsService/GcsSubscriberPoll",
    "/ray.rpc.autoscaler.AutoscalerStateService/GetClusterStatus",
    "/ray.rpc.NodeManagerService/RequestWorkerLease", "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.NodeManagerService/GetSystemConfig", "/ray.rpc.NodeManagerService/ShutdownRaylet",
    "/ray.rpc.ObjectManagerService/Pull", "/ray.rpc.ObjectManagerService/Push",
    "/ray.rpc.CoreWorkerService/PushTask", "/ray.rpc.CoreWorkerService/GetObjectStatus",
    "/ray.rpc.CoreWorkerService/KillActor", "/ray.rpc.CoreWorkerService/Exit",
    "/ray.rpc.ReporterService/GetTraceback", "/ray.rpc.ReporterService/CpuProfiling",
]  # fmt: skip
"""What reads, runs or ends something, of every service of Ray that a port may offer."""
PAGES = [
    ("GET", "/"), ("GET", "/api/jobs/"), ("POST", "/api/jobs/"), ("GET", "/api/cluster_status"),
    ("GET", "/nodes?view=summary"), ("GET", "/api/job_agent/jobs/"),
    ("POST", "/api/job_agent/jobs/"), ("POST", "/get_or_create_runtime_env"), ("GET", "/metrics"),
]  # fmt: skip
WRONG = (None, "", "0" * 64)


def listening(pids: list[int]) -> dict[tuple[str, int], str]:
    """Address and port of every listening TCP socket of these processes, and whose it is.

    Read from /proc, where each process shows its own network namespace; psutil reads ours.
    """
    found = {}
    for pid in pids:
        proc = Path(f"/proc/{pid}")
        try:
            inodes = {os.readlink(fd) for fd in (proc / "fd").iterdir()}
            lines = [
                line.split()
                for table in ("tcp", "tcp6")
                for line in (proc / "net" / table).read_text().splitlines()[1:]
            ]
            name = (proc / "comm").read_text().strip()
        except OSError:  # it ended meanwhile
            continue
        for fields in lines:
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                address, port = fields[1].split(":")
                found[spelled(address), int(port, 16)] = name
    return found


def spelled(hexed: str) -> str:
    """An address of /proc/net/tcp: words of 4 bytes, each of them backwards."""
    raw = bytes.fromhex(hexed)
    ip = ip_address(b"".join(raw[n : n + 4][::-1] for n in range(0, len(raw), 4)))
    return str(getattr(ip, "ipv4_mapped", None) or ip)


def on_loopback(address: str) -> bool:
    return ip_address(address).is_loopback


@contextmanager
def training(
    lab: Path, run_id: str, prefix: tuple[str, ...] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """The driver of a real `launch=local` run of two ranks that has made two steps."""
    log = lab / f"{run_id}.log"
    driver = subprocess.Popen(
        [*prefix, sys.executable, "-m", "tuneloom", "train",
         *arguments(lab, run_id, "launch=local", "launch.workers=2", "steps=100000")],
        cwd=ROOT, stdout=log.open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        rows = lab / "runs" / run_id / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while not rows.exists() or rows.read_text(encoding="utf-8").count("\n") < 2:
            assert driver.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        yield driver
        if driver.poll() is None:
            driver.send_signal(signal.SIGTERM)
            assert driver.wait(60) == 75, log.read_text()
    finally:
        if driver.poll() is None:
            driver.kill()


def family(pid: int) -> list[int]:
    """A process and all that descends from it."""
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def test_nothing_of_a_local_run_listens_beyond_this_machine(lab: Path) -> None:
    """Ray's control store, raylet, agents, monitor; ranks, their store and their groups (S22)."""
    with training(lab, "loopback") as driver:
        sockets = listening(family(driver.pid))
    assert [s for s in sockets.items() if not on_loopback(s[0][0])] == []
    assert len(sockets) >= 12  # so it was looked at the right processes
    assert {"gcs_server", "raylet"} <= set(sockets.values())


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with ExitStack() as stack:
        try:
            pair = stack.enter_context(Hosts())
        except RefusedError as error:
            if os.environ.get("TUNELOOM_REQUIRE_SLURM") == "1":
                pytest.fail(f"TUNELOOM_REQUIRE_SLURM=1, but {error}")
            pytest.skip(str(error))
        yield pair


def knocked(hosts: Hosts, ports: list[int]) -> dict[str, dict[str, Any]]:
    """What host `b` gets from ports of host `a` without the token."""
    done = subprocess.run(
        [*hosts.inside("b"), sys.executable, "-m", "tests.launch.test_ports", ADDRESSES["a"],
         *map(str, ports)],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.slurm
def test_no_port_of_a_head_opens_to_a_stranger_on_another_host(hosts: Hosts) -> None:
    """26 calls and 9 pages at each port, with no token, an empty one and a wrong one: 0 are
    answered, but that Ray's three metrics ports show figures to all (2.60.0).
    """
    drive = ("import ray, time; ray.init(address='{}:{}', logging_level='error');"
             "a = ray.remote(type('A', (), {{'f': lambda self: 1}})).options(num_cpus=1).remote();"
             "ray.get(a.f.remote()); print('up', flush=True); time.sleep(600)")  # fmt: skip
    driver = subprocess.Popen(
        [*hosts.inside("a"), sys.executable, "-c", drive.format(ADDRESSES["a"], PORT)],
        env=hosts.environment, stdout=subprocess.PIPE, text=True, cwd="/",
    )  # fmt: skip
    try:
        assert driver.stdout is not None and driver.stdout.readline().strip() == "up"
        sockets = listening(hosts.pids("a"))
        ports = sorted({port for address, port in sockets if not on_loopback(address)})
        said = knocked(hosts, ports)
        assert driver.poll() is None
    finally:
        driver.kill()
        driver.wait(10)
    assert {"gcs_server", "raylet"} <= set(sockets.values()) and PORT in ports
    assert {port: facts["opened"] for port, facts in said.items() if facts["opened"]} == {}
    calls = sum(facts["calls"] for facts in said.values())
    assert calls == len(ports) * len(WRONG) * (len(CALLS) + len(PAGES))
    refused = [port for port, facts in said.items() if facts["refused"]]
    metrics = [port for port, facts in said.items() if facts["metrics"]]
    print(f"S1: {len(ports)} ports, {calls} calls, 0 opened; {len(refused)} say unauthenticated, "
          f"{len(metrics)} show /metrics")  # fmt: skip
    assert str(PORT) in refused and len(refused) >= 4  # store, raylet, object manager, worker
    assert len(metrics) <= 3


LINKS = """
import json
from tuneloom.launch.preflight import links
print(json.dumps(links(timeout_seconds=60)["link"]))
"""


@pytest.mark.slurm
def test_the_slow_direction_of_a_cable_is_the_link_that_is_slow(hosts: Hosts) -> None:
    """A rank that sent while it received waited for the link behind it, and bore its name."""
    shared = hosts.environment | {
        "WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES["a"], "MASTER_PORT": "29500",
        "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0",
    }  # fmt: skip
    with hosts.slowed("a", "400mbit"):
        ranks = [
            subprocess.Popen(
                [*hosts.inside(host), sys.executable, "-c", LINKS], stdout=subprocess.PIPE,
                env=shared | {"RANK": str(rank)}, text=True,
            )
            for rank, host in enumerate(ADDRESSES)
        ]  # fmt: skip
        back, there = (float(rank.communicate(timeout=120)[0]) for rank in ranks)
    assert there > 0.3 > 3 * back  # 16 MiB at 50 MB/s


@pytest.mark.slurm
def test_no_port_of_a_local_run_can_be_reached_from_another_host(lab: Path, hosts: Hosts) -> None:
    with training(lab, "scanned", tuple(hosts.inside("a"))) as driver:
        ports = sorted({port for _, port in listening(family(driver.pid))})
        said = knocked(hosts, ports)
    assert len(ports) >= 12
    assert [port for port, facts in said.items() if facts["reached"]] == []


def knock(address: str, port: int) -> dict[str, Any]:
    """Every call and page at one port with each wrong token: which were answered."""
    import grpc

    opened: list[str] = []
    codes: set[str] = set()
    refused = metrics = calls = 0
    if not reached(address, port):
        return {"reached": False, "opened": [], "refused": 0, "metrics": 0, "calls": 0}
    with grpc.insecure_channel(f"{address}:{port}") as channel:
        for token in WRONG:
            headers = [] if token is None else [("authorization", f"Bearer {token}")]
            for call in CALLS:
                calls += 1
                try:
                    channel.unary_unary(call)(b"", timeout=5, metadata=headers)
                    opened.append(f"{call} {token!r}")
                except grpc.RpcError as error:
                    codes.add(str(error.code()))
                    refused += error.code() == grpc.StatusCode.UNAUTHENTICATED
                    silent = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE,
                              grpc.StatusCode.UNIMPLEMENTED)  # fmt: skip
                    if error.code() not in silent:
                        opened.append(f"{call} {token!r} {error.code()}")
    for token in WRONG:
        for method, page in PAGES:
            calls += 1
            status, body = fetched(f"http://{address}:{port}{page}", method, token)
            refused += status in (401, 403)
            codes.add(str(status))
            shown = status == 200 and is_metrics(body)
            metrics += shown
            if status == 200 and not shown:
                opened.append(f"{method} {page} {token!r}")
    return {"reached": True, "opened": opened, "refused": refused, "metrics": metrics,
            "calls": calls, "codes": sorted(codes)}  # fmt: skip


def reached(address: str, port: int) -> bool:
    import socket

    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True


def fetched(url: str, method: str, token: str | None) -> tuple[int, bytes]:
    """A page's status and content; 0 where nobody speaks HTTP."""
    import http.client
    import urllib.error
    import urllib.request

    headers = {"Content-Type": "application/json"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    body = b'{"entrypoint": "true"}' if method == "POST" else None
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, body, headers, method=method), timeout=5
        ) as answer:
            return int(answer.status), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""
    except (OSError, http.client.HTTPException):
        return 0, b""


def is_metrics(body: bytes) -> bool:
    """True for Prometheus' text, which its server shows at every path: comments and samples."""
    sample = re.compile(rb"(#.*|[A-Za-z_:][\w:]*(\{.*\})? \S+)?")
    return all(sample.fullmatch(line) for line in body.splitlines())


if __name__ == "__main__":
    print(json.dumps({port: knock(sys.argv[1], int(port)) for port in sys.argv[2:]}))
