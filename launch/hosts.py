"""Two hosts on one machine for drills: network namespaces joined by a cable, a Ray over both.

Needs root and iproute2. The hosts share the machine's files, as nodes share a run folder; what Ray
starts on one has a /dev/shm of its own, which goes with the host.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tuneloom.errors import RefusedError
from tuneloom.launch.drill_lab import ENDING_SECONDS, is_rank

ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}
PORT = 6379
START_SECONDS = 90.0
REPLACED_SECONDS = 3.0
"""Until another host takes the place of one that died."""
OWN_MEMORY = ["sh", "-c", 'mount -t tmpfs -o size=2g tmpfs /dev/shm && exec "$@"', "sh"]
"""Words before a command inside a host: `ip netns exec` gives it mounts that no other sees."""


class Hosts:
    """Host `a` holds the head and one slot, `b` one slot; leaving kills all that runs on both."""

    def __init__(self) -> None:
        if os.geteuid() != 0 or shutil.which("ip") is None:
            raise RefusedError("hosts: network namespaces need root and `ip` (iproute2)")
        # Short: Ray's socket names must stay under 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="tl"))
        self._started: list[subprocess.Popen[bytes]] = []
        token = self.folder / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32), encoding="utf-8")
        outer = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.environment = outer | {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "HOME": str(self.folder),
            "RAY_USAGE_STATS_ENABLED": "0", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def __enter__(self) -> "Hosts":
        try:
            self._cable()
            self._up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in ADDRESSES:
            self.kill(host)
            subprocess.run(["ip", "netns", "del", self.name(host)], capture_output=True)
        for process in self._started:
            process.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)

    def name(self, host: str) -> str:
        return f"{self.folder.name}-{host}"

    def inside(self, host: str) -> list[str]:
        """Words before a command that run it on `host`."""
        return ["ip", "netns", "exec", self.name(host)]

    def start(self, host: str) -> None:
        """Start Ray there: the head on `a`, a node that joins it on `b`."""
        # A folder of its own: by the one in /tmp `ray start` takes other hosts' head for this one.
        role = ["--head", f"--port={PORT}", "--include-dashboard=false",
                f"--temp-dir={self.folder}/ray"]  # fmt: skip
        if host != "a":
            role = [f"--address={ADDRESSES['a']}:{PORT}"]
        with (self.folder / f"{host}.log").open("ab") as log:
            self._started.append(subprocess.Popen(
                [*self.inside(host), *OWN_MEMORY, sys.executable, "-m", "ray.scripts.scripts",
                 "start", *role, "--block", "--num-cpus=1", "--num-gpus=0",
                 "--object-store-memory=80000000", f"--node-ip-address={ADDRESSES[host]}",
                 "--disable-usage-stats"],
                env=self.environment, stdout=log, stderr=log, cwd="/", start_new_session=True,
            ))  # fmt: skip

    def again(self) -> None:
        """A new head and a new node, after the head was lost."""
        for host in ADDRESSES:
            self.kill(host)
        self._up()

    def _up(self) -> None:
        self.start("a")
        self._until_it_listens()
        self.start("b")

    def pids(self, host: str) -> list[int]:
        """All processes on that host."""
        said = subprocess.run(
            ["ip", "netns", "pids", self.name(host)], capture_output=True, text=True
        )
        return [int(word) for word in said.stdout.split()]

    @property
    def command(self) -> dict[str, str]:
        """The environment of a command that finds this Ray."""
        return self.environment | {"RAY_ADDRESS": f"{ADDRESSES['a']}:{PORT}"}

    def ranks(self) -> list[int]:
        """Process ids of the ranks at work on both."""
        return [pid for host in ADDRESSES for pid in self.pids(host) if is_rank(pid)]

    def orphans(self) -> int:
        """Ranks that live ENDING_SECONDS from now; ends as none does."""
        deadline = time.monotonic() + ENDING_SECONDS
        while (left := self.ranks()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return len(left)

    def kill(self, host: str) -> None:
        """kill -9 of everything on that host."""
        while pids := self.pids(host):
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:  # it died with its parent
                    continue
            time.sleep(0.05)

    @contextmanager
    def slowed(self, host: str, rate: str) -> Iterator[None]:
        """What leaves `host` passes at `rate` (`50mbit`) within; what comes is not slowed."""
        place = ["tc", "-n", self.name(host), "qdisc"]
        _do(*place, "add", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "64kb",
            "latency", "50ms")  # fmt: skip
        try:
            yield
        finally:
            _do(*place, "del", "dev", "eth0", "root")

    def cable(self, state: str) -> None:
        """Cut the cable (`down`) or mend it (`up`)."""
        _do("ip", "-n", self.name("b"), "link", "set", "eth0", state)

    def _cable(self) -> None:
        a, b = (self.name(host) for host in ADDRESSES)
        _do("ip", "netns", "add", a)
        _do("ip", "netns", "add", b)
        _do("ip", "-n", a, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0",
            "netns", b)  # fmt: skip
        for host, address in ADDRESSES.items():
            _do("ip", "-n", self.name(host), "addr", "add", f"{address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _do("ip", "-n", self.name(host), "link", "set", link, "up")

    def _until_it_listens(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        probe = [*self.inside("a"), "bash", "-c", f"</dev/tcp/{ADDRESSES['a']}/{PORT}"]
        while subprocess.run(probe, capture_output=True).returncode:
            if time.monotonic() > deadline:
                raise RefusedError(f"hosts: no Ray head in {START_SECONDS:.0f} s on host a")
            time.sleep(0.3)


def _do(*command: str) -> None:
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise RefusedError(f"hosts: `{' '.join(command)}` failed: {ran.stderr.strip()}")
