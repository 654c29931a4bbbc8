"""Is this machine fit to train? `tuneloom doctor [json=true]`: one line a part, verdict and fix.

Reads package metadata, asks the driver and imports no torch: it answers in a second. Exit 0
when training can run here (processors count), 4 when something it cannot run without is broken.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

from packaging.requirements import Requirement
from packaging.version import Version
from pydantic import Field

from tuneloom.config import Config
from tuneloom.errors import REFUSED
from tuneloom.launch import machine
from tuneloom.train import shm

Verdict = Literal["ok", "note", "broken"]
SHARED_MEMORY = 2 * 2**30
"""Ray's object store and gloo want /dev/shm; containers give 64 MiB unless told otherwise."""
DISK = 5 * 2**30
"""Below this a checkpoint and a token cache of even a small model are at risk."""


class DoctorConfig(Config):
    run_root: str = "runs"
    """Folder whose disk is looked at."""
    as_json: Annotated[bool, Field(alias="json")] = False


CONFIG = DoctorConfig


@dataclass(frozen=True)
class Line:
    """`ok`; `note`: something is missing that training can do without; `broken`: it cannot."""

    part: str
    verdict: Verdict
    found: str
    fix: str = ""


def main(config: DoctorConfig) -> int:
    """Print the examination; 0 when training can run here, else 4."""
    lines = list(examine(config.run_root))
    broken = [line for line in lines if line.verdict == "broken"]
    if config.as_json:
        print(json.dumps({"fit": not broken, "parts": [asdict(line) for line in lines]}, indent=2))
    else:
        show(lines)
    return REFUSED if broken else 0


def show(lines: list[Line]) -> None:
    """One line a part on a terminal, a summary last."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    colours = {"ok": "green", "note": "yellow", "broken": "red"}
    for line in lines:
        text = Text.assemble(
            f"{line.part:<15}", (f"{line.verdict:<8}", colours[line.verdict]), line.found
        )
        if line.fix:
            text.append(f"; {line.fix}", style="dim")
        console.print(text)
    broken = [line.part for line in lines if line.verdict == "broken"]
    where = "on its GPUs" if machine.gpus() else "on its processors"
    console.print(f"cannot train here: {', '.join(broken)}" if broken else f"fit to train {where}")


def examine(run_root: str) -> Iterator[Line]:
    """Every part, in the order a run needs them."""
    gpus = machine.gpus()
    yield python()
    yield driver(gpus)
    yield torch(cuda=bool(gpus))
    for name in ("deepspeed", "transformers", "peft", "ray"):
        yield package(name)
    yield optional(
        "flash-attn", "pip install 'tuneloom[flash]'; torch's own varlen attention serves"
    )
    yield package("bitsandbytes")
    yield optional("triton", "pip install triton; kernels run as plain torch without it")
    yield compiler()
    yield nvcc(cuda=bool(gpus))
    yield shared_memory()
    yield disk(run_root)
    yield wandb_key()


def python() -> Line:
    cores, size = machine.cores(), machine.host_bytes() / machine.GIB
    version = platform.python_version()
    return Line("python", "ok", f"{version}, {cores} processors, {size:.0f} GiB of memory")


def driver(gpus: list[machine.Gpu]) -> Line:
    """GPUs and their driver; a device node without a working driver is broken."""
    if gpus:
        names = ", ".join(sorted({gpu.name for gpu in gpus}))
        size = min(gpu.bytes for gpu in gpus) / machine.GIB
        return Line("driver", "ok", f"{gpus[0].driver}: {len(gpus)} x {names}, {size:.0f} GiB")
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return Line("driver", "note", "CUDA_VISIBLE_DEVICES hides all GPUs", "unset it to use them")
    if Path("/dev/nvidia0").exists():
        return Line("driver", "broken", "a GPU is there but nvidia-smi does not answer",
                    "reinstall the NVIDIA driver")  # fmt: skip
    return Line("driver", "note", "no NVIDIA GPU", "training runs on the processors")


def torch(*, cuda: bool) -> Line:
    """torch's version and whether its build matches the machine."""
    line = package("torch")
    if line.verdict == "broken":
        return line
    built = _cuda_of_torch()
    if cuda and built is None:
        return Line("torch", "broken", f"{line.found}, a build without CUDA on a machine with GPUs",
                    "install a CUDA build: pip install torch --index-url "
                    "https://download.pytorch.org/whl/cu130")  # fmt: skip
    return Line("torch", "ok", f"{line.found}, {f'CUDA {built}' if built else 'processors only'}")


def _cuda_of_torch() -> str | None:
    """torch.version.cuda, read from torch/version.py without importing torch."""
    source = Path(str(metadata.distribution("torch").locate_file("torch/version.py")))
    found = re.search(r"^cuda(?::[^=]+)? = ['\"]([^'\"]+)", source.read_text("utf-8"), re.M)
    return found.group(1) if found else None


def package(name: str) -> Line:
    """A package that pyproject.toml requires, and whether its version is in the range."""
    try:
        found = Version(metadata.version(name))
    except metadata.PackageNotFoundError:
        return Line(name, "broken", "not installed", f"pip install {name}, or make install")
    wanted = _required().get(name)
    if wanted is not None and not wanted.specifier.contains(found, prereleases=True):
        return Line(name, "broken", str(found), f"pip install '{wanted}'")
    return Line(name, "ok", str(found))


def _required() -> dict[str, Requirement]:
    """What this project requires, by name; read from its metadata, or pyproject.toml in a clone."""
    try:
        texts = metadata.requires("tuneloom") or []
    except metadata.PackageNotFoundError:
        import tomllib

        file = Path(__file__).resolve().parents[1] / "pyproject.toml"
        texts = tomllib.loads(file.read_text("utf-8"))["project"]["dependencies"]
    parsed = [Requirement(text) for text in texts]
    return {need.name: need for need in parsed if need.marker is None}


def optional(name: str, fix: str) -> Line:
    try:
        return Line(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Line(name, "note", "not installed", fix)


def compiler() -> Line:
    """DeepSpeed builds its CPU Adam, for zero.offload, with a C++ compiler and ninja."""
    ninja = shutil.which(
        "ninja", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    )
    missing = [name for name, path in (("c++", shutil.which("c++")), ("ninja", ninja)) if not path]
    if missing:
        return Line("compiler", "note", f"no {' and no '.join(missing)}",
                    "zero.offload needs both: apt-get install g++ ninja-build")  # fmt: skip
    return Line("compiler", "ok", "c++ and ninja, for zero.offload")


def nvcc(*, cuda: bool) -> Line:
    """Only DeepSpeed's CUDA ops are compiled with it; no default setting uses one."""
    path = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if path is None:
        fix = "only building flash-attn from source needs it" if cuda else "no GPU, no need"
        return Line("nvcc", "note", "not found", fix)
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    release = re.search(r"release ([\d.]+)", answer.stdout)
    return Line("nvcc", "ok", release.group(1) if release else path)


def shared_memory() -> Line:
    """Ranks and Ray exchange data there."""
    if not shm.ROOT.is_dir():
        return Line("shared memory", "broken", f"no {shm.ROOT}", "mount a tmpfs there")
    total = shutil.disk_usage(shm.ROOT).total
    size = f"{total / machine.GIB:.1f} GiB"
    if total < SHARED_MEMORY:
        return Line("shared memory", "note", size, "Ray falls back to disk; run with --shm-size=8g")
    return Line("shared memory", "ok", size)


def disk(run_root: str) -> Line:
    """Room and the right to write where runs go."""
    at = Path(run_root).absolute()
    while not at.exists():
        at = at.parent
    free = f"{machine.free_disk(run_root) / machine.GIB:.0f} GiB free at {at}"
    try:
        with tempfile.NamedTemporaryFile(dir=at):
            pass
    except OSError as error:
        return Line("disk", "broken", f"{at} cannot be written ({error.strerror})", "set run.root")
    if machine.free_disk(run_root) < DISK:
        return Line("disk", "note", free, "tuneloom plan says what a run takes")
    return Line("disk", "ok", free)


def wandb_key() -> Line:
    """Whether tracker=auto would be online."""
    from tuneloom.train.tracker import key

    where, fault = key()
    if where is not None:
        return Line("W&B key", "ok", where)
    if fault is not None:
        return Line("W&B key", "note", fault, "run wandb login again")
    return Line(
        "W&B key", "note", "none", "runs are tracked offline; wandb login, or WANDB_API_KEY"
    )
