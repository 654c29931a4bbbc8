"""What this machine has: GPUs (nvidia-smi is asked, not torch), memory, disk, processors."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

GIB = 2**30

# What nvidia-smi reports as memory.total, in MiB.
GPU_MIB = {
    "b200-180": 183359, "h200-141": 143771, "h100-80": 81559, "a100-80": 81920, "a100-40": 40960,
    "l40s-48": 46068, "v100-32": 32768, "rtx4090-24": 24564, "rtx3090-24": 24576, "l4-24": 23034,
}  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    name: str
    bytes: int
    driver: str


def gpus() -> list[Gpu]:
    """The NVIDIA GPUs that this process may use; empty where there is no driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") is None or visible == "":
        return []
    query = [
        "nvidia-smi",
        "--query-gpu=name,memory.total,driver_version",
        "--format=csv,noheader,nounits",
        *(["-i", visible] if visible else []),
    ]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        print("nvidia-smi does not answer within 20 s: no GPU is counted", file=sys.stderr)
        return []
    if answer.returncode != 0:
        return []
    rows = [
        [part.strip() for part in line.split(",")] for line in answer.stdout.splitlines() if line
    ]
    return [Gpu(name, _bytes(mib, name), driver) for name, mib, driver in rows]


def _bytes(mib: str, name: str) -> int:
    """Memory of a GPU; one that shares the host's has none of its own to report."""
    if mib.isdigit():
        return int(mib) * 2**20
    print(
        f"{name}: nvidia-smi says {mib} for its memory, so what the host has left is counted",
        file=sys.stderr,
    )
    return host_bytes()


def host_bytes(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process may yet take: what the machine has left, or its control groups."""
    left = [int(psutil.virtual_memory().available)]
    for limit, used, cache in _group_files(own, root):
        text = limit.read_text(encoding="utf-8").strip() if limit.exists() else "max"
        if text.isdigit():  # cgroup v1 writes no limit as a number that no machine has
            left.append(int(text) - int(used.read_text(encoding="utf-8")) + _reclaimable(cache))
    return max(0, min(left))


def _group_files(own: Path, root: Path) -> list[tuple[Path, Path, Path]]:
    """Limit, use and statistics of the control groups that this process is in, innermost first."""
    files = []
    for line in own.read_text(encoding="utf-8").splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        inner = top / path.lstrip("/")
        for folder in (inner, *inner.parents):
            files.append((folder / names[0], folder / names[1], folder / "memory.stat"))
            if folder == top:
                break
    return files


def _reclaimable(statistics: Path) -> int:
    """Bytes of files that the kernel takes back when they are needed."""
    if not statistics.exists():
        return 0
    rows = dict(line.split() for line in statistics.read_text(encoding="utf-8").splitlines())
    return int(rows.get("total_inactive_file", rows.get("inactive_file", 0)))


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0))


def free_disk(path: str) -> int:
    """Free bytes where `path` is, or will be."""
    at = Path(path).absolute()
    while not at.exists():
        at = at.parent
    return shutil.disk_usage(at).free


def killed_for_memory() -> int:
    """Processes that this host's kernel has killed for memory since it started; a worker that died
    with SIGKILL says nothing itself.
    """
    counters = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(counters.get("oom_kill", 0))
