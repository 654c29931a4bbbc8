"""Where a run's copies lie in host memory, and how they go: no torch, the launcher uses it too.

    runs/<id>/copies                      a token, so that a run made anew finds no old copies
    /dev/shm/tuneloom-<token>/owner       the run folder; /dev/shm is memory (tmpfs) of one host
    /dev/shm/tuneloom-<token>/job         the Slurm job, if any, for the next one on the host
    /dev/shm/tuneloom-<token>/rank-00000/step-000041/      written by `train/copies.py`

They outlive a rank that is killed, and go with the run, with its launcher (also one that is killed:
`launch/reaper.py`, on a cluster `launch/keepers.py`), with the next job on a host where Slurm
killed theirs, or with the host. Those of a run that a full disk ended wait for the same command
(`kept`), until `sweep` finds them stale.
"""

import fcntl
import os
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path

from tuneloom.errors import RefusedError
from tuneloom.private import is_private

ROOT = Path("/dev/shm")
TOKEN = "copies"
OWNER = "owner"
JOB = "job"
MEMORY = "memory"
KEPT = "kept"
ENDING_SECONDS = 5.0
STALE_SECONDS = 3600.0
"""What nobody has written for so long, of a run that nobody runs, goes: its reaper was killed too,
or nobody came back for it.
"""


def name_of(run: Path) -> str:
    """The folder of the run's copies in ROOT; the run gets its token where it has none."""
    path, aside = run / TOKEN, run / f".{TOKEN}.tmp"
    if not path.exists() or not path.stat().st_size:  # a disk was full when it was made
        aside.touch(0o600)
        aside.write_text(secrets.token_hex(16), encoding="utf-8")
        os.replace(aside, path)
    return f"tuneloom-{path.read_text(encoding='utf-8')}"


def open_base(base: Path, run: Path) -> str:
    """Make the folder, for this user alone; raises RefusedError where it cannot be.

    Returns a name of this memory, the same for all that share it, whatever their hosts are called.
    """
    try:
        base.mkdir(0o700, exist_ok=True)
        (base / OWNER).write_text(str(run.resolve()), encoding="utf-8")
        if job := os.environ.get("SLURM_JOB_ID"):
            (base / JOB).write_text(job, encoding="utf-8")
        name = secrets.token_hex(8)
        (base / name).write_text(name, encoding="utf-8")
        with suppress(FileExistsError):  # of another rank: then its name is the name
            os.link(base / name, base / MEMORY)
        (base / name).unlink()
        found = (base / MEMORY).read_text(encoding="utf-8")
    except OSError as error:
        raise RefusedError(
            f"checkpoint.memory_every: {base} cannot be made ({error.strerror}); set "
            "checkpoint.memory_every=0, or mount a tmpfs there"
        ) from None
    if not is_private(base):
        raise RefusedError(f"checkpoint.memory_every: {base} is not this user's alone; remove it")
    return found


def forget(base: Path) -> None:
    """Give this host's memory back."""
    shutil.rmtree(base, ignore_errors=True)


def keep(base: Path) -> bool:
    """Have `forget_run` leave them; False in a batch job, whose nodes others get."""
    if "SLURM_JOB_ID" in os.environ or not base.exists():
        return False
    (base / KEPT).touch()
    return True


def keep_run(run: Path) -> None:
    """The same by the run's folder."""
    if (run / TOKEN).exists():
        keep(ROOT / name_of(run))


def forget_run(run: Path) -> None:
    """The same by the run's folder, unless they are kept, or a rank 0 still writes there: a second
    launcher of a run is refused, and ends without the first one's copies.
    """
    if (run / TOKEN).exists() and not _is_written(run):
        base = ROOT / name_of(run)
        if not (base / KEPT).exists():
            forget(base)


def forget_when_ended(run: Path) -> None:
    """`forget_run`, as soon as the rank 0 that was just killed has let go of the lock."""
    deadline = time.monotonic() + ENDING_SECONDS
    while _is_written(run) and time.monotonic() < deadline:
        time.sleep(0.1)
    forget_run(run)


def sweep() -> None:
    """Remove what runs of ours left on this host whose launcher was lost, and reaper with it."""
    for base in ROOT.glob("tuneloom-*"):
        with suppress(FileNotFoundError):  # another process gives it back just now
            if is_private(base) and (base / OWNER).exists() and _is_stale(base):
                shutil.rmtree(base, ignore_errors=True)


def _is_stale(base: Path) -> bool:
    written = max((p.stat().st_mtime for p in base.iterdir()), default=0.0)
    if time.time() - written < STALE_SECONDS:
        return False
    return not _is_written(Path((base / OWNER).read_text(encoding="utf-8")))


def _is_written(run: Path) -> bool:
    """True when a rank 0 holds the lock of the run."""
    lock = run / "lock"
    if not lock.exists():
        return False
    with lock.open("r", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
