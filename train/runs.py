"""The run folder: made or continued, locked against a second writer, recorded before step 0."""

import errno
import fcntl
import hashlib
import json
import os
import platform
import secrets
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import IO, Any, TypeVar

from tuneloom.errors import ConfigError, RefusedError
from tuneloom.redact import own_secrets, redact, redacted
from tuneloom.train.config import TrainConfig

PATIENCE_SECONDS = 30.0
"""How long a restart waits for the attempt before it to let go of the run folder."""
HELD = (errno.EWOULDBLOCK, errno.EACCES)
"""What flock says of a lock that another holds; NFS, which makes it a lock by fcntl, the second."""
LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What it says on a file system without locks, such as Lustre without `-o flock`."""
RECORD = "run.json"
WEIGHTS = "weights"
"""Folder of what was trained."""
LOCK = "lock"
"""Its content names the process that holds it."""
C = TypeVar("C", bound=TrainConfig)
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "ray", "wandb", "hydra-core",
            "bitsandbytes",
            "flash-attn", "triton", "numpy", "pyarrow", "tokenizers")  # fmt: skip


def new_id(name: str) -> str:
    """`name-20261122-120000-a1b2`: sorts by time, unique without asking anyone."""
    return f"{name[:40]}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


def with_id(config: C) -> C:
    """The same config with `run.id` filled in, so that every rank and restart names one folder.

    Raises ConfigError under torchrun, whose restarts would each fill in another.
    """
    if config.run.id is not None:
        return config
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError(
            "run.id: torchrun starts ranks anew after a loss, and each start would begin another "
            "run; set run.id=NAME, the same at each start"
        )
    return config.model_copy(
        update={"run": config.run.model_copy(update={"id": new_id(config.run.name)})}
    )


def folder_of(config: TrainConfig) -> Path:
    assert config.run.id is not None, "with_id comes first"
    return Path(config.run.root) / config.run.id


def claim(config: TrainConfig) -> IO[str]:
    """Make or reopen the run folder and lock it; the lock lives as long as the returned file.

    Raises RefusedError when another process writes this run, ConfigError when the folder holds a
    finished or different run and resume does not allow it, or when it cannot be made.
    """
    folder = folder_of(config)
    lock = locked(folder, PATIENCE_SECONDS if _is_restart() else 0.0)
    _check_same_run(config, folder)
    return lock


def locked(folder: Path, patience: float = 0.0) -> IO[str]:
    """The lock of a run's folder, which is made; held while the returned file is open.

    Raises RefusedError when another process holds it for more than `patience` seconds, ConfigError
    when the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"run.root: {folder} cannot be written ({error.strerror}); choose another"
        ) from None
    if not _taken(lock, patience):
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        raise RefusedError(
            f"run.id: {folder} is being written by {holder}; wait for it, or choose another run.id"
        )
    lock.seek(0)
    lock.truncate()
    lock.write(f"{_here()}\n")
    lock.flush()
    return lock


def is_ours(folder: Path) -> bool:
    """False once another process has taken the run's lock: a network's file system gives a lock
    away when it has not heard of its holder for a while, and does not tell the holder.
    """
    lock = folder / LOCK
    return not lock.exists() or lock.read_text(encoding="utf-8").strip() == _here()


def _here() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def _is_restart() -> bool:
    """True for a later attempt of one launch, whose ranks before may still be on their way out."""
    return (
        os.environ.get("TUNELOOM_ATTEMPT", os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) != "0"
    )


def _taken(lock: IO[str], patience: float) -> bool:
    """Take the lock, if need be within `patience` seconds; False when another process holds it.

    Raises RefusedError where the file system has no locks: two writers could not be kept apart.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in LOCKLESS:
                raise RefusedError(
                    f"run.root: the file system of {Path(lock.name).parent} gives no lock "
                    f"({error.strerror}), so a second writer would not be seen; choose a run.root "
                    "on another, or mount it with flock (Lustre: -o flock)"
                ) from None
            if error.errno not in HELD:
                raise
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)


def _check_same_run(config: TrainConfig, folder: Path) -> None:
    """A folder that already holds a run is continued only when asked to, with the same config."""
    record = folder / RECORD
    if not record.exists():
        return
    if config.resume == "never" and earlier(config) is None:
        raise ConfigError(
            f"run.id: {folder} holds a run already and resume=never; choose another run.id"
        )
    before = recorded(folder)
    if not before:  # a bad disk, or a hand; what checkpoints say of themselves is still compared
        record.rename(record.with_name("run.json.damaged"))
        print(f"{record} is damaged: set aside as run.json.damaged, written anew", flush=True)
        return
    if before["config_digest"] != digest(config):
        changed = changes(before["config"], plain(config))
        raise ConfigError(
            f"run.id: {folder} was started with another config ({', '.join(changed)}); "
            "choose another run.id, or start as before"
        )


def _slurm() -> dict[str, Any]:
    """The job this process is of, and how often Slurm has queued it again."""
    return {
        "job": os.environ.get("SLURM_JOB_ID"),
        "requeues": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    }


def _queued_again(last: dict[str, Any]) -> bool:
    """True in a job that was queued again since; a second command of one job is none."""
    now = _slurm()
    return now["job"] is not None and (
        last.get("job") == now["job"] and last.get("requeues", 0) < now["requeues"]
    )


def earlier(config: TrainConfig) -> dict[str, Any] | None:
    """What the last attempt took up by `resume`, where this one goes on with that attempt: a
    restart, a job that Slurm queued again, the same command once more. None where it does not.
    """
    attempts = recorded(folder_of(config)).get("attempts", [])
    last = attempts[-1] if attempts and isinstance(attempts[-1], dict) else {}
    if last.get("resume") != config.resume:
        return None
    if config.resume == "never" and not _is_restart() and not _queued_again(last):
        return None
    return {"named_step": last.get("named_step")}


RESUMABLE = (
    "resume",
    "launch",
    "tracker",
    "zero",
    "debug",
    "train",
    "checkpoint",
    "batch.accumulation",
    "batch.sequence_parallel",
)
"""Keys that a resumed run may change: none of them moves the loss curve."""
INPUTS = {"base": "model.path", "dataset": "data.path"}
MADE_WITH = (
    *(f"method.{key}" for key in ("kind", "rank", "alpha", "targets", "extra_modules", "dora")),
    "method.rslora", "optim.name", "model.dtype",
)  # fmt: skip
"""Keys that decide what a checkpoint's weights and optimizer state are, and in which form."""
CONVERTED = ("model.dtype",)
"""Those of them that a run which takes a checkpoint up may have otherwise."""
KEPT = ("first_loss", "weights_step")
"""Keys of run.json that a later attempt cannot know: only the first one, or the last that ended."""


def plain(config: TrainConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def digest(config: TrainConfig) -> str:
    """sha256 of what decides the curve: the resolved config without the keys a resume may
    change.
    """
    content = plain(config)
    for key in RESUMABLE:
        *path, last = key.split(".")
        at = content
        for part in path:
            at = at[part]
        at.pop(last, None)
    content["run"] = None
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def changes(before: Any, after: Any, path: str = "") -> list[str]:
    """Dotted keys whose values differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(set(before) | set(after))
        found: list[str] = []
        for key in keys:
            here = f"{path}.{key}" if path else key
            if here not in RESUMABLE and here != "run":
                found += changes(before.get(key), after.get(key), here)
        return found
    return [] if before == after else [f"{path}: {before!r} -> {after!r}"]


def recorded(folder: Path) -> dict[str, Any]:
    """run.json of a run; {} where there is none, or one in a wrong shape."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        [found["config_digest"], found["config"].items(), *found["attempts"]]
        [found[part]["digest"] for part in ("base", "dataset")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return dict(found)


def refuse_other_inputs(
    config: TrainConfig, facts: dict[str, Any], digests: dict[str, str | None], own: bool
) -> None:
    """A resumed run reads the base and the rows it was started with; raises RefusedError.

    `digests` are those in the checkpoint, which is this very run's where it is `own`.
    """
    before = recorded(folder_of(config))
    _refuse_other_tokens(config, before, facts, digests)
    if own and not before and digests["config"] != digest(config):
        raise RefusedError(
            f"run.id: the checkpoints of {config.run.id} are of another config, and its "
            "run.json is lost; start as before, or choose another run.id"
        )
    for part, key in INPUTS.items():
        now = facts[part]["digest"]
        lost = digests.get(part, now) if own else now
        was = before[part]["digest"] if before else lost
        if was != now:
            raise RefusedError(
                f"{key}: {facts[part]['path']} has digest {str(now)[:12]} now, but "
                f"{config.run.id} was started with {str(was)[:12]}; put it back, or choose another "
                "run.id"
            )
        if digests.get(part, now) != now:
            raise RefusedError(
                f"resume: the checkpoint was trained with a {part} of digest "
                f"{str(digests[part])[:12]}, {key}={facts[part]['path']} has {str(now)[:12]}; give "
                f"what it was trained with"
            )


def made_with(content: dict[str, Any]) -> dict[str, Any]:
    """The values of MADE_WITH in a config, by dotted key; one of before may lack some."""
    found = {}
    for key in MADE_WITH:
        section, _, name = key.partition(".")
        if name in content.get(section, {}):
            found[key] = content[section][name]
    return found


def refuse_other_method(config: TrainConfig, other: Path, before: dict[str, Any]) -> None:
    """What the run in `other` trained, `made_with` this, must be what this one trains; raises
    ConfigError. What nothing says is compared as the shards are loaded.
    """
    for key, now in made_with(plain(config)).items():
        if key not in CONVERTED and before.get(key, now) != now:
            raise ConfigError(
                f"{key}: {now}, but the checkpoint of {other} was trained with {before[key]}; set "
                "it so, or choose resume=never"
            )


def _refuse_other_tokens(
    config: TrainConfig, before: dict[str, Any], facts: dict[str, Any], digests: dict[str, Any]
) -> None:
    """Rows of other lengths lie in other packs, so a position in the old ones means other rows."""
    now = facts["dataset"]["renderer"]
    for was in (before.get("dataset", {}).get("renderer"), digests.get("tokens")):
        if was not in (None, now):  # those of before do not say it
            raise RefusedError(
                f"resume: {config.run.id} would go on with other tokens of its rows, as the "
                f"tokenizer or chat template in {facts['base']['path']}, batch.max_length or "
                "batch.over_length is not what it was; put it back, or choose another run.id and "
                "resume=never"
            )


def refuse_masked(config: TrainConfig) -> None:
    """Paths that later commands read back from the record, where no secret is written."""
    for key in ("run.root", "model.path", "data.path", "data.validation"):
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        if value is None or redact(value) == value:
            continue
        named = next((held for secret, held in own_secrets().items() if secret in value), None)
        why = f"the value of {named}" if named else "what looks like a secret"
        way = f"unset {named}, or rename the path" if named else "rename the path"
        raise ConfigError(
            f"{key}: {redact(value)} holds {why}, which no run writes into its record; {way}"
        )


def record(config: TrainConfig, facts: dict[str, Any]) -> None:
    """Write run.json and config.yaml before step 0; `facts` are dataset, base and world."""
    import yaml

    folder = folder_of(config)
    before = recorded(folder)
    attempt = {
        "workers": facts["world_size"], "accumulation": facts["accumulation"],
        "sequence_parallel": facts["sequence_parallel"], "resumed_from": facts["resumed_from"],
        "clock": facts["clock"], "resume": config.resume, "named_step": facts["named_step"],
        **_slurm(),
    }  # fmt: skip
    content = {
        **{key: before[key] for key in KEPT if key in before},
        "run_id": config.run.id,
        "parent": config.run.parent,
        "config": plain(config),
        "config_digest": digest(config),
        "code": code_version(),
        "environment": environment(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "state": "running",
        "attempts": [*before.get("attempts", []), attempt],
        **facts,
    }
    write_json(folder / RECORD, content)
    (folder / "config.yaml").write_text(
        yaml.safe_dump(redacted(plain(config)), sort_keys=False), encoding="utf-8"
    )


def update(folder: Path, facts: dict[str, Any]) -> None:
    """Add facts to run.json."""
    before = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    write_json(folder / RECORD, {**before, **facts})


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file whole: a reader sees the old or the new one, never half."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(redacted(content), indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)


def code_version() -> dict[str, Any]:
    """Digest of the package's own source, and the git commit where there is one."""
    root = Path(__file__).resolve().parent.parent
    sha = hashlib.sha256()
    for part in ("tuneloom", "train", "launch", "kernels", "conf"):
        base = root / part if (root / part).is_dir() else root
        for path in sorted(p for p in base.rglob("*") if p.suffix in (".py", ".yaml")):
            sha.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return {"digest": sha.hexdigest(), "commit": _commit(root)}


def _commit(root: Path) -> str | None:
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def environment() -> dict[str, Any]:
    """Python, platform and the versions that decide numerics."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
    }
