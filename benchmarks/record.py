"""Results of benchmarks: one JSON a benchmark, with the machine and the versions it was made on."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel", "deepspeed", "numpy", "trl",
            "ray", "datasets", "bitsandbytes", "rensa", "pyarrow")  # fmt: skip


def write(name: str, result: dict[str, Any], *, seed: int, folder: Path = RESULTS) -> Path:
    """Write results/<name>.json: `result`, and what one must know to repeat it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    document = {"benchmark": name, "seed": seed, **result, "made": made()}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path


def made() -> dict[str, Any]:
    """When, on which machine, with which code and versions."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "code": code(),
        "python": platform.python_version(),
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "gpu": _gpu(),
        },
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Short hash of the commit that is checked out, with -dirty where files differ from it; None
    without git or a repository.
    """
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def code() -> str:
    """Digest of what is measured and of what measures it: also without git, and whatever results
    are written meanwhile, it says whether a result is of this code.
    """
    root, sha = RESULTS.parents[1], hashlib.sha256()
    parts = ("benchmarks", "conf", "kernels", "launch", "train", "tuneloom")
    for path in sorted(p for part in parts for p in (root / part).rglob("*")):
        if path.suffix in (".py", ".yaml"):
            sha.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()[:16]


def _cpu() -> str:
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return platform.processor()
    lines = information.read_text(encoding="utf-8").splitlines()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
