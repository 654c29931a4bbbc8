"""DeepSpeed's C++ ops, built once a machine by one process at a time.

torch guards a build with a file (torch.utils.file_baton): that of a builder that was killed makes
each later run wait for ever. Here the kernel keeps the lock, and lets go of a killed holder's.
"""

import fcntl
import hashlib
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from tuneloom.private import own_folder
from tuneloom.train.config import ZeroConfig
from tuneloom.train.runs import LOCKLESS

logger = logging.getLogger("tuneloom")
LONGEST_SECONDS = 3600.0
"""No build takes so long."""


def build_ops(zero: ZeroConfig) -> None:
    """Build and load what `zero` offloads with: CPU Adam (0.5 min on two cores), async I/O (2.5).

    Called by each rank before the collectives of DeepSpeed's start: the first builds, the others
    wait. Raises what torch raises when an op cannot be built: RuntimeError, OSError, ImportError.
    """
    if zero.offload == zero.offload_parameters == "none":
        return
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder

    builders = [CPUAdamBuilder()] if zero.offload != "none" else []
    if "nvme" in (zero.offload, zero.offload_parameters):
        builders.append(AsyncIOBuilder())
    if all(installed_ops.get(builder.name) for builder in builders):
        return  # built when DeepSpeed was installed, as in images
    with _alone() as folder:
        _remove_stale_locks(folder)
        for builder in builders:
            builder.load(verbose=False)


def _remove_stale_locks(folder: Path) -> None:
    """Nobody else builds here, but on another host where a mount keeps locks of each host alone."""
    owner, host = folder / "host", platform.node()
    ours = owner.exists() and owner.read_text(encoding="utf-8") == host
    locks = list(folder.glob("*/lock"))
    for lock in locks:
        if ours or time.time() - lock.stat().st_mtime > LONGEST_SECONDS:
            lock.unlink()
    if ours or not locks:
        owner.write_text(host, encoding="utf-8")


@contextmanager
def _alone() -> Iterator[Path]:
    """The folder of this user, torch, DeepSpeed and processor, in which no other process builds;
    torch builds there as long.
    """
    from torch.utils.cpp_extension import get_default_build_root

    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = Path(given or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    folder = _folder(root)
    lock = (folder / "tuneloom.lock").open("a")
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in LOCKLESS:
                raise
            lock.close()
            folder = _folder(None)
            logger.warning(
                "%s has no locks (%s): DeepSpeed's ops are built in %s",
                root,
                error.strerror,
                folder,
            )
            lock = (folder / "tuneloom.lock").open("a")
            fcntl.flock(lock, fcntl.LOCK_EX)
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
        yield folder
    finally:
        lock.close()
        os.environ.pop("TORCH_EXTENSIONS_DIR", None)
        if given is not None:
            os.environ["TORCH_EXTENSIONS_DIR"] = given


def _folder(root: Path | None) -> Path:
    """Ops are compiled for the processor at hand, and homes are shared by machines that differ."""
    key = f"{sys.prefix} {version('torch')} {version('deepspeed')} {_processor()}"
    folder = own_folder(root) / f"ops-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    folder.mkdir(exist_ok=True)
    return folder


def _processor() -> str:
    """What a compiler's -march=native reads: the flags of the first processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
