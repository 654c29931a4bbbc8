"""Checkpoints that are one or do not exist: written aside, hashed, fsynced, renamed; verified
before use.

    checkpoints/step-000500/MANIFEST.json   every file with size and digest; step, world, ZeRO stage
                            trainer.json    data position, ledger, counters
                            rng-00000.safetensors ...                      one a rank
                            engine/         DeepSpeed's shards (adapters only under LoRA)
    latest                                  the newest one's name: a hint, never trusted alone

DeepSpeed's own `latest` moves before its last barrier, and no flipped bit in a shard is noticed by
`torch.load` (395 of 400 trials); so a folder without a manifest that verifies does not exist here.
The manifest carries its own digest.

Digests are XXH3 of 128 bits, which keeps up with the memory (20 GiB/s, SHA-256 1.9), and all ranks
share the work: what verifies is damage. What a shard may make is not left to it (`shards.py`).
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tuneloom.errors import ConfigError, DiskError, TrainingError
from tuneloom.train import distributed, masters, runs, shards
from tuneloom.train.distributed import ALONE, World

MANIFEST = "MANIFEST.json"
ENGINE = "engine"
TRAINER = "trainer.json"
SEAL = "manifest_sha256"
PARAMETERS = "zero"
"""Holds one folder a parameter, whole, in DeepSpeed's universal format: any layout can load it."""
ROOM = 1.2
"""Free space to have before a save, in sizes of the last checkpoint."""
DIGESTS: dict[str, Callable[[], Any]] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}
"""By their name in a manifest; those of before have the second."""
NUMBERED = re.compile(r"(?:rank_|rng-)(\d+)")
"""Names of files with the number of the rank that wrote them."""
Files = dict[str, dict[str, Any]]
"""Facts by file name."""
FAILURES = (OSError, RuntimeError, SafetensorError)
"""What writing raises when it fails; torch's own is a RuntimeError without an errno."""


@dataclass(frozen=True)
class Found:
    """A checkpoint that verified."""

    folder: Path
    manifest: dict[str, Any]
    trainer: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    def size(self) -> int:
        """Bytes of its files."""
        return sum(int(facts["bytes"]) for facts in self.manifest["files"].values())

    @property
    def made_with(self) -> dict[str, Any]:
        """Settings that its content depends on, by dotted key; those of before may lack some."""
        return dict(self.trainer["made_with"])

    def same_layout(self, *, world_size: int, stage: int, dtype: str) -> bool:
        """True when DeepSpeed can load the shards as they are."""
        saved = int(self.manifest["world_size"])
        same_stage = int(self.manifest["zero_stage"]) == stage
        if (self.folder / ENGINE / PARAMETERS).exists():
            return False
        same_dtype = self.made_with.get("model.dtype", dtype) == dtype
        return same_stage and same_dtype and (saved == world_size or stage == 0)


def name(step: int) -> str:
    return f"step-{step:06d}"


def save(
    engine: Any,
    root: Path,
    world: World,
    *,
    step: int,
    zero_stage: int,
    trainer: dict[str, Any],
    adapters_only: bool,
    digests: dict[str, str],
    keep: int,
) -> Path:
    """Write checkpoints/step-NNNNNN; collective. Returns its folder.

    Raises DiskError on all ranks when any rank could not write; the torn folder is removed and
    older checkpoints stay as they were.
    """
    needs = partial(bytes_of, engine, world, adapters_only=adapters_only)
    torn = open_torn(root, world, step=step, keep=keep, needs=needs)
    all_do = partial(agreed, torn=torn, step=step, world=world, needs=needs)
    all_do(lambda: write_share(engine, torn, world, trainer, adapters_only))
    files = dict(
        sorted(f for part in all_do(lambda: _hash_share(torn, world)) for f in part.items())
    )
    manifest = {
        "step": step, "world_size": world.size, "zero_stage": zero_stage, "digests": digests,
        "files": files,
    }  # fmt: skip
    all_do(lambda: commit(torn, root / name(step), manifest, keep) if world.first else None)
    return root / name(step)


def open_torn(root: Path, world: World, *, step: int, keep: int, needs: Callable[[], int]) -> Path:
    """Rank 0's new folder, where a save is written until it is one, on all ranks; collective. A
    name nobody else has: a process of a dead attempt that wakes up writes into its own folder.
    """
    torn = root / f".torn-{name(step)}-{secrets.token_hex(4)}"
    made = agreed(
        lambda: make_room(torn, keep) if world.first else None,
        torn=torn, step=step, world=world, needs=needs,
    )  # fmt: skip
    first: Path = made[0]
    return first


def bytes_of(engine: Any, world: World, *, adapters_only: bool) -> int:
    """About what a checkpoint of this engine takes: weights, fp32 masters and optimizer state, from
    this rank's share of them.
    """
    sizes = [
        (getattr(p, "ds_numel", p.numel()), p.element_size(), p.requires_grad)
        for p in engine.module.parameters()
    ]
    weights = sum(count * size for count, size, trained in sizes if trained or not adapters_only)
    whole = sum(4 * count for count, size, trained in sizes if trained and size < 4)
    entries = engine.basic_optimizer.state.values()
    tensors = [t for entry in entries for t in entry.values() if torch.is_tensor(t)]
    shares = world.size if engine.zero_optimization_stage() else 1
    return weights + whole + shares * sum(t.numel() * t.element_size() for t in tensors)


def agreed(
    work: Callable[[], Any], *, torn: Path, step: int, world: World, needs: Callable[[], int]
) -> list[Any]:
    """What every rank's `work` returned, in rank order; one rank's failure is every rank's, and the
    torn folder is gone by then. `needs`: the bytes of a whole checkpoint, asked for when the disk
    is full.
    """
    result, failure = _tried(work, torn, needs)
    outcomes: list[Any] = distributed.gather_objects((result, failure))
    _raise([reason for _, reason in outcomes], torn, step, world)
    return [value for value, _ in outcomes]


def all_did(
    work: Callable[[], Any], *, torn: Path, step: int, world: World, needs: Callable[[], int]
) -> None:
    """`agreed` without what was returned: one small sum where no rank failed."""
    _, failure = _tried(work, torn, needs)
    failed = torch.tensor([float(failure is not None)])
    if float(distributed.sum_over_ranks(failed)):
        _raise(distributed.gather_objects(failure), torn, step, world)


def _tried(work: Callable[[], Any], torn: Path, needs: Callable[[], int]) -> tuple[Any, str | None]:
    """What it returned, and why it could not be done."""
    try:
        return work(), None
    except FAILURES as error:
        return None, why(error, torn, needs)


def _raise(reasons: list[Any], torn: Path, step: int, world: World) -> None:
    failures = [reason for reason in reasons if reason]
    if not failures:
        return
    if world.first:
        shutil.rmtree(torn, ignore_errors=True)
    raise DiskError(f"checkpoint: step {step} could not be saved in {torn.parent}: {failures[0]}")


def make_room(torn: Path, keep: int) -> Path:
    """The torn folder; where the last checkpoint would not fit again, all but that one go first."""
    root = torn.parent
    root.mkdir(parents=True, exist_ok=True)
    if keep > 1 and shutil.disk_usage(root).free < ROOM * _last_bytes(root):
        prune(root, 1)
    (torn / ENGINE).mkdir(parents=True)
    return torn


def _last_bytes(root: Path) -> int:
    """Size of the newest checkpoint, 0 without one."""
    folders = ordered(root)
    return sum(p.stat().st_size for p in folders[-1].rglob("*") if p.is_file()) if folders else 0


def write_share(
    engine: Any, torn: Path, world: World, trainer: dict[str, Any], adapters_only: bool
) -> None:
    """This rank's part of a checkpoint."""
    with writing_with(engine, engine.checkpoint_engine.save, engine._copy_recovery_script):
        save_engine(engine, torn, adapters_only)
    if masters.swapped(engine):
        _write_whole(engine, torn / ENGINE, world)
    save_file(rng_state(world), rng_file(torn, world))
    if world.first:
        (torn / TRAINER).write_text(json.dumps(trainer), encoding="utf-8")


def save_engine(engine: Any, torn: Path, adapters_only: bool) -> None:
    """DeepSpeed's part of a checkpoint; collective."""
    engine.save_checkpoint(
        str(torn),
        tag=ENGINE,
        client_state=_for_other_layouts(engine),
        save_latest=False,
        exclude_frozen_parameters=adapters_only,
    )


def _write_whole(engine: Any, folder: Path, world: World) -> None:
    """Masters and moments in place of copies of the swap files, which DeepSpeed 0.19.8 cannot
    resume from: it restores neither the groups too small to swap nor the weights themselves.
    """
    distributed.barrier()
    if world.first:
        shutil.rmtree(folder / "offloaded_tensors", ignore_errors=True)
        for shard in folder.glob("*_optim_states.pt"):
            shard.unlink()
    masters.write_whole(engine, folder / PARAMETERS, first=world.first)


def _for_other_layouts(engine: Any) -> dict[str, Any]:
    """What a resume at another world size or ZeRO stage asks the shards for."""
    if engine.zero_optimization_stage() == 0:
        return {"trained_parameters": masters.names(engine)}
    # Without this ds_to_universal refuses ZeRO 1 and 2 (deepspeed 0.19.8).
    return {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}


@contextmanager
def writing_with(
    engine: Any, shard: Callable[..., Any], scripts: Callable[..., Any]
) -> Iterator[None]:
    """Let `save_checkpoint` write its shards and its two scripts with these, and raise their first
    failure only when it is over: it has barriers, and ranks that could write would wait there for
    one that could not (deepspeed 0.19.8).
    """
    failures: list[Exception] = []

    def held_back(write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            try:
                return write(*arguments, **named)
            except (OSError, RuntimeError) as error:
                failures.append(error)

        return call

    shards = engine.checkpoint_engine
    shards.save = held_back(shard)
    engine._copy_recovery_script = held_back(scripts)
    engine._checkpoint_tag_validation = _one_tag
    try:
        yield
    finally:
        del shards.save, engine._copy_recovery_script
        del engine._checkpoint_tag_validation
    if failures:
        raise failures[0]


def _one_tag(tag: str) -> None:
    """Two collectives that a constant needs not."""


def why(error: Exception, torn: Path, needs: Callable[[], int]) -> str:
    """Why `torn` could not be written, in words for a person.

    torch reports a full disk as `unexpected pos`, with no errno (measured on 2.13).
    """
    text = str(error).strip().splitlines()[0]
    full = "unexpected pos" in text or "No space left" in text
    if not full and getattr(error, "errno", None) != errno.ENOSPC:
        return f"{type(error).__name__}: {text}"
    there = next(folder for folder in (torn, *torn.parents) if folder.exists())
    free, needed = shutil.disk_usage(there).free, _last_bytes(torn.parent) or needs()
    return (
        f"disk full: about {needed} bytes needed, {free} bytes free; free some space or move "
        f"run.root ({text})"
    )


def commit(torn: Path, final: Path, manifest: dict[str, Any], keep: int) -> None:
    """The manifest last, then the name; from the rename on the checkpoint exists. Raises OSError
    where another process has taken the run over.
    """
    _write_durably(torn / MANIFEST, sealed(manifest))
    for folder in (torn / ENGINE, torn):
        _sync_folder(folder)
    if not runs.is_ours(final.parent.parent):
        raise OSError("another process has taken this run over, and writes it now")
    if final.exists():  # of a process that outlived its gang: this run has gone back behind it
        replaced = final.with_name(f".torn-replaced-{final.name}")
        shutil.rmtree(replaced, ignore_errors=True)  # of a process that died before it was pruned
        os.rename(final, replaced)
    os.rename(torn, final)
    _sync_folder(final.parent)
    point_latest(final.parent.parent, final.name)
    prune(final.parent, keep)


def sealed(manifest: dict[str, Any]) -> str:
    """The manifest as text that carries its own digest."""
    digest = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    return json.dumps(manifest | {SEAL: digest}, indent=1)


def unsealed(text: str) -> dict[str, Any]:
    """The manifest of a text that is, byte for byte, what `sealed` gave; raises ValueError."""
    manifest = json.loads(text)
    if not isinstance(manifest, dict) or SEAL not in manifest:
        raise ValueError("no seal")
    del manifest[SEAL]
    if sealed(manifest) != text:
        raise ValueError("not what was sealed")
    return manifest


def _hash_share(folder: Path, world: World) -> Files:
    """Fsync and hash every n-th file on this rank."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): durable_facts(p) for p in files[world.rank :: world.size]}


def durable_facts(path: Path) -> dict[str, Any]:
    """Size and digest of a file that is on the disk from now on."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return facts_of(path)


def facts_of(path: Path) -> dict[str, Any]:
    """Size and digest of a file."""
    return {"bytes": path.stat().st_size, "xxh3_128": _digest(path, "xxh3_128")}


def _digest(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return str(hashlib.file_digest(file, DIGESTS[kind]).hexdigest())


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def point_latest(run: Path, checkpoint: str) -> None:
    """Move runs/<id>/latest, last of all."""
    _write_durably(run / ".latest", checkpoint + "\n")
    os.rename(run / ".latest", run / "latest")


def ordered(root: Path) -> list[Path]:
    """Checkpoint folders by step, oldest first; names alone would put step 1,000,000 before
    999,999.
    """
    folders = [f for f in root.glob("step-*") if f.name.removeprefix("step-").isdecimal()]
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step-")))


def supersede(root: Path, step: int) -> None:
    """Set aside what lies after `step`: the run goes on from there, so what it saves is newer. It
    takes the place of what was set aside before, or that would grow without end.
    """
    later = [f for f in ordered(root) if int(f.name.removeprefix("step-")) > step]
    for old in root.glob("superseded-*") if later else ():
        shutil.rmtree(old, ignore_errors=True)
    for folder in later:
        aside = folder.with_name(f"superseded-{folder.name}")
        os.rename(folder, aside)
        size = sum(file.stat().st_size for file in aside.rglob("*") if file.is_file())
        print(
            f"checkpoint {folder.name} lies after step {step}, from which the run goes on: set "
            f"aside as {aside.name} ({size / 2**30:.1f} GiB)",
            flush=True,
        )


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and torn ones of dead attempts."""
    for folder in ordered(root)[:-keep]:
        # Renamed first: half a deletion must not look like damage.
        os.rename(folder, folder.with_name(f".torn-pruned-{folder.name}"))
    for folder in [*root.glob(".torn-*"), *root.glob(".universal-*")]:
        shutil.rmtree(folder, ignore_errors=True)


def rng_state(world: World) -> dict[str, torch.Tensor]:
    """State of the generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(world.device)
    return state


def rng_file(folder: Path, world: World) -> Path:
    """Where the generators' state of this rank lies in a checkpoint."""
    return folder / f"rng-{world.rank:05d}.safetensors"


def restore_rng(folder: Path, world: World) -> None:
    """Put this rank's generators back; a rank that did not exist then keeps its seed."""
    file = rng_file(folder, world)
    if not file.exists():
        return
    state = load_file(file)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and world.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], world.device)


def verify(folder: Path, *, rank: int = 0, ranks: int = 1) -> str | None:
    """None when the folder holds what its manifest lists and nothing else, else the first
    difference. Of `ranks` that call it each looks at its share of the files.
    """
    try:
        manifest = unsealed((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "no manifest: the save never finished" if folder.is_dir() else "there is none"
    except (ValueError, RecursionError):  # json's and Unicode's errors are ValueErrors
        return "the manifest is damaged"
    if folder.name.startswith("step-") and folder.name != name(manifest["step"]):
        return f"it holds step {manifest['step']}"
    stray = _stray(folder, manifest) if rank == 0 else None
    if stray is not None:  # DeepSpeed unpickles what it finds by pattern
        return f"{stray} is not in the manifest"
    for relative in share(list(manifest["files"]), rank, ranks):
        if fault := _fault(folder / relative, relative, manifest["files"][relative]):
            return fault
    return None


def _stray(folder: Path, manifest: dict[str, Any]) -> str | None:
    """A file that the manifest does not list."""
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}
    return min(present - set(manifest["files"]) - {MANIFEST}, default=None)


def share(files: list[str], rank: int, ranks: int) -> list[str]:
    """Those of a checkpoint's files that this rank verifies: its own, which it reads next, and its
    part of those that are nobody's.
    """
    owners = [NUMBERED.search(file) for file in files]
    return [
        file
        for index, (file, owner) in enumerate(zip(files, owners, strict=True))
        if (int(owner[1]) if owner else index) % ranks == rank
    ]


def _fault(path: Path, relative: str, facts: dict[str, Any]) -> str | None:
    """How a file differs from what was saved."""
    if not path.is_file():
        return f"{relative} is missing"
    if path.stat().st_size != facts["bytes"]:
        return f"{relative} has {path.stat().st_size} bytes, saved were {facts['bytes']}"
    digest = next(kind for kind in DIGESTS if kind in facts)
    if _digest(path, digest) != facts[digest]:
        return f"{relative} differs from what was saved ({digest})"
    return None


def fault_of(folder: Path, world: World) -> str | None:
    """What `verify` finds, the files shared out among all ranks; collective. Raises TrainingError
    on all where one cannot read its files.
    """
    fault: str | OSError | None
    try:
        fault = verify(folder, rank=world.rank, ranks=world.size)
    except OSError as error:
        fault = error
    faults = [f for f in distributed.gather_objects(fault) if f is not None]
    for found in faults:
        if isinstance(found, OSError):
            raise TrainingError(f"resume: {folder} cannot be read: {found}")
    return str(faults[0]) if faults else None


def newest(root: Path, world: World = ALONE, say: Any = print) -> Found | None:
    """The newest checkpoint that verifies; damaged ones are set aside with a line each.
    Collective.
    """
    folders: list[Path] = distributed.on_first(partial(ordered, root), where=root)
    for folder in reversed(folders):
        fault = fault_of(folder, world)
        if fault is None:
            return _found(folder)
        distributed.on_first(partial(_set_aside, folder, fault, say), where=root)
    return None


def _set_aside(folder: Path, fault: str, say: Any) -> None:
    aside = folder.with_name(f"damaged-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    say(
        f"checkpoint {folder.name} is damaged ({fault}); "
        f"set aside as {aside.name}, using the one before"
    )


def opened(folder: Path, world: World = ALONE) -> Found:
    """A checkpoint named by the user; raises ConfigError when it does not verify. Collective."""
    fault = fault_of(folder, world)
    if fault:
        raise ConfigError(
            f"resume: {folder} cannot be used: {fault}; resume=auto takes the newest good one"
        )
    return _found(folder)


def _found(folder: Path) -> Found:
    """One that verified, as rank 0 reads it; collective."""

    def read() -> Found:
        manifest = unsealed((folder / MANIFEST).read_text(encoding="utf-8"))
        trainer = json.loads((folder / TRAINER).read_text(encoding="utf-8"))
        if "made_with" not in trainer:  # as in those of before
            before = runs.recorded(folder.parent.parent)
            trainer["made_with"] = runs.made_with(before.get("config", {}))
        return Found(folder, manifest, trainer)

    found: Found = distributed.on_first(read, where=folder)
    return found


def restore(engine: Any, found: Found, world: World, *, universal: Path | None) -> None:
    """Load engine state and this rank's generators; collective."""
    source = universal or found.folder
    groups = engine.optimizer.param_groups
    mine = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    clip = getattr(engine.optimizer, "clip_grad", None)
    with shards.read_by(engine):
        loaded, _ = engine.load_checkpoint(
            str(source), tag=ENGINE, load_module_strict=False, load_lr_scheduler_states=False
        )
    if loaded is None:
        raise TrainingError(f"resume: DeepSpeed found nothing to load in {source}")
    # A universal load under ZeRO-3 copies the first group's weight decay over all (0.19.8).
    for group, settings in zip(engine.optimizer.param_groups, mine, strict=True):
        group.update(settings)
    # Into ZeRO 1 and 2 it loads the clipping of the checkpoint, which ZeRO 0 and 3 do not write.
    if clip is not None:
        engine.optimizer.clip_grad = clip
    masters.place_steps(engine.basic_optimizer)
    restore_rng(found.folder, world)
