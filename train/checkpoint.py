"""Checkpoints that are one or do not exist: written aside, hashed, fsynced, renamed; verified
before use.

    checkpoints/step-000500/MANIFEST.json   every file with size and sha256; step, world, ZeRO
    stage, digests trainer.json    data position, ledger, counters
                            rng-00000.safetensors ...                      one a rank
                            engine/         DeepSpeed's shards (adapters only under LoRA)
    latest                                  the newest one's name: a hint, never trusted alone

DeepSpeed's own `latest` moves before its last barrier, and no flipped bit in a shard is noticed by
`torch.load` (395 of 400 trials); so a folder without a manifest that verifies does not exist here.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuneloom.errors import ConfigError, TrainingError
from tuneloom.train import distributed
from tuneloom.train.distributed import World

MANIFEST = "MANIFEST.json"
ENGINE = "engine"


@dataclass(frozen=True)
class Found:
    """A checkpoint that verified."""

    folder: Path
    manifest: dict[str, Any]
    trainer: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    def same_layout(self, world_size: int, stage: int) -> bool:
        """True when DeepSpeed can load the shards as they are."""
        saved = int(self.manifest["world_size"])
        same_stage = int(self.manifest["zero_stage"]) == stage
        return same_stage and (saved == world_size or stage == 0)


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

    Raises TrainingError on all ranks when any rank could not write; the torn folder is removed and
    older checkpoints stay as they were.
    """
    final, torn = root / name(step), root / f".torn-{name(step)}"
    if world.first:
        shutil.rmtree(torn, ignore_errors=True)
        torn.mkdir(parents=True)
    distributed.barrier()
    failure = _write(engine, torn, world, trainer, adapters_only)
    failures = [f for f in distributed.gather_objects(failure) if f]
    if failures:
        if world.first:
            shutil.rmtree(torn, ignore_errors=True)
        raise TrainingError(f"checkpoint: step {step} could not be saved in {root}: {failures[0]}")
    files = _hash_share(torn, world)
    if world.first:
        manifest = {
            "step": step,
            "world_size": world.size,
            "zero_stage": zero_stage,
            "digests": digests,
            "files": files,
        }
        _write_durably(torn / MANIFEST, json.dumps(manifest, indent=1))
        if final.exists():  # the same step saved twice: by a signal just after a regular save
            shutil.rmtree(final)
        os.rename(torn, final)
        _sync_folder(root)
        point_latest(root.parent, final.name)
        prune(root, keep)
    distributed.barrier()
    return final


def _write(
    engine: Any, torn: Path, world: World, trainer: dict[str, Any], adapters_only: bool
) -> str | None:
    """This rank's part of a checkpoint; the reason as a string when it failed."""
    from safetensors.torch import save_file

    try:
        engine.save_checkpoint(
            str(torn),
            tag=ENGINE,
            # Without this ds_to_universal refuses ZeRO 1 and 2 (deepspeed 0.19.8).
            client_state={"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}},
            save_latest=False,
            exclude_frozen_parameters=adapters_only,
        )
        save_file(rng_state(world), torn / f"rng-{world.rank:05d}.safetensors")
        if world.first:
            (torn / "trainer.json").write_text(json.dumps(trainer), encoding="utf-8")
    except (OSError, RuntimeError) as error:
        return _why(error, torn)
    return None


def _why(error: Exception, folder: Path) -> str:
    """torch reports a full disk as `unexpected pos`, with no errno (measured on 2.13)."""
    free = shutil.disk_usage(folder.parent).free
    text = str(error).strip().splitlines()[0]
    if "unexpected pos" in text or getattr(error, "errno", None) == 28 or free < 1 << 20:
        return f"disk full, {free} bytes free; free some space or point run.root elsewhere ({text})"
    return f"{type(error).__name__}: {text}"


def _hash_share(folder: Path, world: World) -> dict[str, dict[str, Any]]:
    """Fsync and hash every n-th file on this rank; the whole table on all ranks."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    mine = {}
    for path in files[world.rank :: world.size]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        mine[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    table: dict[str, dict[str, Any]] = {}
    for part in distributed.gather_objects(mine):
        assert isinstance(part, dict)
        table.update(part)
    return dict(sorted(table.items()))


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and torn ones of dead attempts."""
    for folder in sorted(root.glob("step-*"))[:-keep]:
        shutil.rmtree(folder)
    for folder in [*root.glob(".torn-*"), *root.glob(".universal-*")]:
        shutil.rmtree(folder, ignore_errors=True)


def rng_state(world: World) -> dict[str, torch.Tensor]:
    """State of the generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(world.device)
    return state


def restore_rng(folder: Path, world: World) -> None:
    """Put this rank's generators back; a rank that did not exist then keeps its seed."""
    from safetensors.torch import load_file

    file = folder / f"rng-{world.rank:05d}.safetensors"
    if not file.exists():
        return
    state = load_file(file)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and world.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], world.device)


def verify(folder: Path) -> str | None:
    """None when every file is what the manifest says, else the first difference."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        listed = manifest["files"]
    except FileNotFoundError:
        return "no manifest: the save never finished"
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError):
        return "the manifest is damaged"
    for relative, facts in listed.items():
        path = folder / relative
        if not path.is_file():
            return f"{relative} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{relative} has {path.stat().st_size} bytes, saved were {facts['bytes']}"
        if sha256(path) != facts["sha256"]:
            return f"{relative} differs from what was saved (sha256)"
    return None


def newest(root: Path, say: Any = print) -> Found | None:
    """The newest checkpoint that verifies; damaged ones are set aside with a line each."""
    for folder in sorted(root.glob("step-*"), reverse=True):
        fault = verify(folder)
        if fault is None:
            return opened(folder)
        aside = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
        say(
            f"checkpoint {folder.name} is damaged ({fault}); "
            f"set aside as {aside.name}, using the one before"
        )
    return None


def opened(folder: Path) -> Found:
    """A checkpoint named by the user; raises ConfigError when it does not verify."""
    fault = verify(folder)
    if fault:
        raise ConfigError(
            f"resume: {folder} cannot be used: {fault}; resume=auto takes the newest good one"
        )
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    trainer = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    return Found(folder, manifest, trainer)


def restore(engine: Any, found: Found, world: World, *, universal: Path | None) -> None:
    """Load engine state and this rank's generators; collective."""
    source = universal or found.folder
    groups = engine.optimizer.param_groups
    mine = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    loaded, _ = engine.load_checkpoint(
        str(source), tag=ENGINE, load_module_strict=False, load_lr_scheduler_states=False
    )
    if loaded is None:
        raise TrainingError(f"resume: DeepSpeed found nothing to load in {source}")
    # A universal load under ZeRO-3 copies the first group's weight decay over all (0.19.8).
    for group, settings in zip(engine.optimizer.param_groups, mine, strict=True):
        group.update(settings)
    restore_rng(found.folder, world)
