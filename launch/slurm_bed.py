"""A real Slurm of two nodes on one machine, for tests and drills.

python -m tuneloom.launch.slurm_bed holds one until interrupted, and says how to use it.
Each node is a slurmd in its own network, process, mount, host name and IPC namespace, joined by a
bridge; this machine is the login node. Needs root and Debian's slurmctld, slurmd, slurm-client,
munge. Everything hangs off processes started here and dies with them.
"""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter", "setpriv")
GPUS = 4
"""Of each node, which Slurm hands out by number and nothing computes on."""
CONTROLLERS = ("freezer", "memory", "cpuset", "cpu", "cpuacct", "devices")
SWITCH = "ip link set lo up; ip link add br0 type bridge; ip link set br0 up; exec sleep infinity"
# Process 1 of a node; arguments: name, address, base, cgroup subtree or "".
NODE = r"""
name=$1 address=$2 base=$3 group=$4 checkout=$5
hostname "$name"
ip link set lo up
for i in $(seq 500); do ip link show eth0 >/dev/null 2>&1 && break; sleep 0.02; done
ip addr add "$address/24" dev eth0; ip link set eth0 up
mount -t tmpfs -o size=2g tmpfs /dev/shm; chmod 1777 /dev/shm
mkdir -p "$base/checkout.$name"; mount --bind "$checkout" "$base/checkout.$name"
mount -t tmpfs -o size=4g tmpfs /tmp; chmod 1777 /tmp
if [ ! -d "$checkout" ]; then  # a checkout under /tmp stays visible on the nodes
  mkdir -p "$checkout"; mount --bind "$base/checkout.$name" "$checkout"
fi
mount --bind "$base/etc/hosts" /etc/hosts
if [ -n "$group" ]; then
  for c in freezer memory cpuset cpu cpuacct devices; do
    d=/sys/fs/cgroup/$c; [ -d $d ] || continue
    mkdir -p $d/$group; mount --bind $d/$group $d
  done
fi
slurmd -D -N "$name" > "$base/log/slurmd.$name.out" 2>&1 & child=$!
trap 'kill -TERM $child 2>/dev/null; wait $child; exit 0' TERM
while kill -0 $child 2>/dev/null; do wait $child; done
"""
SLURM_CONF = """\
ClusterName=testbed
SlurmctldHost={host}({login})
SlurmctldPort={port}
SlurmdPort=6818
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={base}/run/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/run/slurmctld.pid
SlurmdPidFile={base}/run/slurmd.%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/{track}
TaskPlugin=task/{task}
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
ReturnToService=2
SlurmdTimeout=10
KillWait=30
MinJobAge=600
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""
CGROUP_CONF = """\
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
CgroupAutomount=no
ConstrainCores=no
ConstrainDevices=no
ConstrainRAMSpace=yes
ConstrainSwapSpace=no
"""


def missing() -> str | None:
    """Why this machine cannot hold a bed, or None."""
    if os.geteuid() != 0:
        return "needs root for namespaces"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"lacks {', '.join(absent)} (apt-get install slurm-wlm munge)" if absent else None


class SlurmBed:
    """Start with `with SlurmBed() as bed`; `bed.base` is the folder that login and nodes share."""

    def __init__(self, *, nodes: int = 2, cpus: int = 4, megabytes: int = 8000) -> None:
        # Outside /tmp, which each node has for itself; munged refuses a socket below a 0700 folder.
        self.base = Path(tempfile.mkdtemp(prefix="bed", dir="/var/tmp"))
        self.base.chmod(0o755)
        self._lock, number = _subnet()
        self.login = f"10.66.{number}.1"
        self.addresses = {f"n{i + 1}": f"10.66.{number}.{11 + i}" for i in range(nodes)}
        self.cpus, self.megabytes, self.port = cpus, megabytes, 16000 + number
        self._link, self._group = f"sb{number}r", f"slurmbed{number}"
        self._cgroups = os.access("/sys/fs/cgroup/freezer/cgroup.procs", os.W_OK)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "SlurmBed":
        try:
            self._write_files()
            self._start_switch()
            self._start_munge()
            self._spawn("slurmctld", ["slurmctld", "-D", "-i"])
            for name in self.addresses:
                self.start_node(name)
            self.wait_idle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        hosts = [name for name in self.processes if name.startswith("host.")]
        for name in [*hosts, "slurmctld", "munged", "switch"]:
            process = self.processes.pop(name, None)
            if process is None:
                continue
            process.send_signal(
                signal.SIGTERM if name in ("slurmctld", "munged") else signal.SIGKILL
            )
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        subprocess.run(["ip", "link", "del", self._link], capture_output=True, check=False)
        if self._cgroups:
            self._remove_cgroups()
        self._lock.close()
        shutil.rmtree(self.base, ignore_errors=True)

    # files and daemons

    def _write_files(self) -> None:
        for folder in ("etc", "run", "log", "state", "spool"):
            (self.base / folder).mkdir()
        key = self.base / "etc/munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        host = socket.gethostname().split(".")[0]
        names = [f"127.0.0.1 localhost\n{self.login} {host}\n"]
        names += [f"{address} {name}\n" for name, address in self.addresses.items()]
        (self.base / "etc/hosts").write_text("".join(names), encoding="utf-8")
        (self.base / "etc/gres.conf").write_text(
            f"Name=gpu File=/dev/tty[0-{GPUS - 1}]\n", encoding="utf-8"
        )
        (self.base / "etc/cgroup.conf").write_text(CGROUP_CONF, encoding="utf-8")
        nodes = [
            f"NodeName={name} NodeAddr={address} CPUs={self.cpus} RealMemory={self.megabytes} "
            f"Gres=gpu:{GPUS}"
            for name, address in self.addresses.items()
        ]
        text = SLURM_CONF.format(
            host=host, login=self.login, port=self.port, base=self.base, nodes="\n".join(nodes),
            track="cgroup" if self._cgroups else "linuxproc",
            task="cgroup" if self._cgroups else "none",
        )  # fmt: skip
        (self.base / "etc/slurm.conf").write_text(text, encoding="utf-8")

    def _spawn(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.base / "log" / f"{name}.out").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command], stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True, env=self.environment(),
            )  # fmt: skip
        return self.processes[name]

    def _start_switch(self) -> None:
        subprocess.run(["ip", "link", "del", self._link], capture_output=True, check=False)
        switch = self._spawn("switch", ["unshare", "--net", "sh", "-c", SWITCH]).pid
        in_switch = ["nsenter", "-t", str(switch), "-n"]
        _until(lambda: _ran([*in_switch, "ip", "link", "show", "br0"]), "the bridge came up")
        _do("ip", "link", "add", self._link, "type", "veth", "peer", "name", "r0",
            "netns", str(switch))  # fmt: skip
        _do("ip", "addr", "add", f"{self.login}/24", "dev", self._link)
        _do("ip", "link", "set", self._link, "up")
        _do(*in_switch, "ip", "link", "set", "r0", "master", "br0")
        _do(*in_switch, "ip", "link", "set", "r0", "up")

    def _start_munge(self) -> None:
        run = self.base / "run"
        self._spawn("munged", [
            "munged", "--foreground", f"--key-file={self.base}/etc/munge.key",
            f"--socket={run}/munge.socket", f"--pid-file={run}/munged.pid",
            f"--log-file={self.base}/log/munged.log", f"--seed-file={run}/munged.seed",
        ])  # fmt: skip
        _until((run / "munge.socket").exists, "munged answered")

    def start_node(self, name: str) -> None:
        """Boot a node; also after `kill_node`."""
        group = self._group if self._cgroups else ""
        outer = self._spawn(f"host.{name}", [
            "unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork",
            "--kill-child=KILL", "--mount-proc", "--propagation", "private",
            "bash", "-c", NODE, "node", name, self.addresses[name], str(self.base), group,
            str(ROOT),
        ])  # fmt: skip
        first, ours = Path(f"/proc/{outer.pid}/task/{outer.pid}/children"), "/proc/self/ns/net"
        _until(lambda: bool(first.read_text(encoding="utf-8").split()), f"{name} has a process 1")
        child = first.read_text(encoding="utf-8").split()[0]
        _until(
            lambda: os.readlink(f"/proc/{child}/ns/net") != os.readlink(ours), f"{name} is apart"
        )
        in_switch = ["nsenter", "-t", str(self.processes["switch"].pid), "-n"]
        _do(*in_switch, "ip", "link", "add", f"v{name}", "type", "veth", "peer", "name", "eth0",
            "netns", child)  # fmt: skip
        _do(*in_switch, "ip", "link", "set", f"v{name}", "master", "br0")
        _do(*in_switch, "ip", "link", "set", f"v{name}", "up")

    def kill_node(self, name: str) -> None:
        """Power cut: every process of the node is gone at once."""
        process = self.processes.pop(f"host.{name}")
        process.kill()
        process.wait()

    def _remove_cgroups(self) -> None:
        for controller in CONTROLLERS:
            top = Path("/sys/fs/cgroup") / controller / self._group
            for _ in range(20):
                for folder, _, _ in os.walk(top, topdown=False):
                    with contextlib.suppress(OSError):  # busy until the kernel has reaped
                        os.rmdir(folder)
                if not top.exists():
                    break
                time.sleep(0.05)

    # what a user of the cluster does

    def environment(self) -> dict[str, str]:
        """This process's environment, pointed at the bed and free of an outer Slurm and Ray."""
        outer = ("SLURM_", "SBATCH_", "SRUN_", "RAY_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
        return kept | {"SLURM_CONF": str(self.base / "etc/slurm.conf")}

    def run(self, *command: str, cwd: Path | None = None, timeout: float = 60.0) -> str:
        """Run a command on the login node; returns its output, raises when it fails."""
        done = subprocess.run(
            command, env=self.environment(), text=True, capture_output=True, timeout=timeout,
            cwd=cwd, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{command} ended {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout.strip()

    def inside(self, node: str, *command: str) -> str:
        """Run a command in a node's namespaces; returns its output."""
        outer = self.processes[f"host.{node}"].pid
        child = Path(f"/proc/{outer}/task/{outer}/children").read_text(encoding="utf-8").split()[0]
        return subprocess.run(
            ["nsenter", "-t", child, "-a", *command], text=True, capture_output=True, timeout=60,
            check=False, env=self.environment(),
        ).stdout  # fmt: skip

    def job(self, number: str) -> dict[str, str]:
        """What scontrol says of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "-o", number)))

    def wait_job(self, number: str, states: set[str], *, timeout: float = 180.0) -> dict[str, str]:
        """Until the job is in one of `states`; returns what scontrol says then."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            facts = self.job(number)
            if facts.get("JobState") in states:
                return facts
            time.sleep(0.3)
        raise TimeoutError(f"job {number} is {facts.get('JobState')} ({facts.get('Reason')})")

    def wait_idle(self) -> None:
        """Until every node of the bed is idle."""

        def idle() -> bool:
            for name, process in self.processes.items():
                if process.poll() is not None:
                    log = (self.base / "log" / f"{name}.out").read_text(encoding="utf-8")
                    raise RuntimeError(f"{name} died: {log[-2000:]}")
            shown = subprocess.run(
                ["sinfo", "-h", "-N", "-p", "debug", "-o", "%n %T"], env=self.environment(),
                text=True, capture_output=True, timeout=20, check=False,
            ).stdout  # fmt: skip
            return shown.split().count("idle") == len(self.addresses)

        _until(idle, "all nodes are idle", seconds=60.0)


def _subnet() -> tuple[IO[str], int]:
    """A free 10.66.k.0/24, held by a lock for as long as the file is open."""
    folder = Path("/run/slurmbed")
    folder.mkdir(exist_ok=True)
    for number in range(1, 250):
        file = (folder / f"{number}.lock").open("w", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file, number
        except OSError:
            file.close()
    raise RuntimeError("249 beds hold every subnet of 10.66.0.0/16")


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=20)


def _ran(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0


def _until(true: Callable[[], bool], what: str, *, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not in {seconds:.0f} s: {what}")
        time.sleep(0.05)


def main() -> int:
    """Hold a bed until interrupted; prints what a shell needs to use it."""
    reason = missing()
    if reason:
        print(f"slurm bed: this machine {reason}", file=sys.stderr)
        return 4
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with SlurmBed() as bed, contextlib.suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={bed.base}/etc/slurm.conf; cd {bed.base}", flush=True)
        signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
