"""The last state in host memory (`checkpoint.memory_every`): a lost rank costs the steps since.

    every n steps   each rank writes its part of a checkpoint into /dev/shm, with a manifest, and
                    sends it to a rank on another host, which keeps it beside its own
    a restart       the newest step of which all ranks' parts are left and verify becomes a
                    checkpoint of the run (`rescue`), and is resumed from like any other

Two steps are kept: when a rank dies while it writes one, all have the one before. Parts of one step
belong together when they carry the same `gang`, a name that each start of the ranks gives itself.
"""

import json
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tuneloom.errors import RefusedError, TrainingError
from tuneloom.private import is_private
from tuneloom.train import checkpoint, distributed, shm
from tuneloom.train.checkpoint import Files
from tuneloom.train.distributed import World

KEPT = 2
EXPOSURE = "exposure.parquet"
"""In rank 0's part: rows of the steps that no file of the run folder holds yet."""
Parts = dict[tuple[int, int], dict[str, Any]]
"""Manifests by rank and step."""


def neighbours(hosts: list[str]) -> list[int | None]:
    """For each rank, the one on the next host that keeps its copy; None where there is one host.

    `hosts` holds a name of every rank's, in rank order.
    """
    names = list(dict.fromkeys(hosts))
    ranks = {name: [r for r, host in enumerate(hosts) if host == name] for name in names}
    if len(names) == 1:
        return [None] * len(hosts)
    after = {name: ranks[names[(i + 1) % len(names)]] for i, name in enumerate(names)}
    return [
        after[host][ranks[host].index(rank) % len(after[host])] for rank, host in enumerate(hosts)
    ]


class Copies:
    """This rank's side of it. Constructing and `save` are collective; older copies go."""

    def __init__(self, base: Path, run: Path, world: World) -> None:
        self.base, self.world = base, world
        self.gang: str = distributed.broadcast_object(secrets.token_hex(8))
        self.step = 0
        """The newest that is held, the same on all ranks."""
        self._failure: str | None = None
        """Why the last exchange failed here; said on all ranks at the next copy."""
        shm.sweep()
        shm.forget(base)
        distributed.barrier()  # ranks of one host have one folder
        memories: list[Any] = distributed.gather_objects(_opened(base, run))
        for memory in memories:
            if isinstance(memory, RefusedError):
                raise memory
        to = neighbours(memories)
        self.neighbour = to[world.rank]
        self.sources = [rank for rank, target in enumerate(to) if target == world.rank]
        # a group of its own: tags of two messages between two ranks never mix with others'
        self._group = dist.new_group(backend="gloo") if to[0] is not None else None
        if world.first:
            where = "and of a neighbour's" if self._group else "only: all ranks are on it"
            print(f"copies: the last state is kept in memory of each host {where}", flush=True)

    def save(
        self, engine: Any, *, step: int, zero_stage: int, trainer: dict[str, Any],
        adapters_only: bool, digests: dict[str, str], exposure: Any,
    ) -> None:  # fmt: skip
        """Copy the state of `step`; raises TrainingError on all ranks when one could not."""
        own = self.base / _of(self.world.rank)
        torn = self._torn(own, checkpoint.name(step))
        manifest = {
            "step": step, "world_size": self.world.size, "zero_stage": zero_stage,
            "digests": digests, "gang": self.gang,
        }  # fmt: skip

        def write() -> None:
            checkpoint.write_share(engine, torn, self.world, trainer, adapters_only)
            if exposure is not None:
                exposure.write_pending(torn / EXPOSURE)
            _finish(torn, manifest | {"files": part_facts(torn)})

        # DeepSpeed's save has barriers: a rank that has no folder must not leave others there.
        room = _failure_of(lambda: (torn / checkpoint.ENGINE).mkdir(parents=True))
        self._agree(self._failure or room, step)
        self._agree(_failure_of(write), step)
        self.step = step
        self._failure = self._exchange(own / checkpoint.name(step))
        for rank in (self.world.rank, *self.sources):
            checkpoint.prune(self.base / _of(rank), KEPT)

    def keep(self) -> bool:
        """For the same command: the launcher does not give the memory back. False where it does."""
        return shm.keep(self.base)

    def forget(self) -> None:
        """The run is over: give the memory back."""
        shm.forget(self.base)

    def _torn(self, root: Path, step_name: str) -> Path:
        """Where a part is written. A process of the gang before, which may be dying still, has
        another.
        """
        return root / f".torn-{step_name}-{self.gang}"

    def _agree(self, failure: str | None, step: int) -> None:
        failures = [f for f in distributed.gather_objects(failure) if f]
        if failures:
            raise TrainingError(
                f"checkpoint.memory_every: step {step} could not be copied to {shm.ROOT}: "
                f"{failures[0]}; make it larger (containers: --shm-size), or set "
                "checkpoint.memory_every=0"
            )

    def _exchange(self, own: Path) -> str | None:
        """Send this rank's part, receive those of the sources; returns why one was not kept."""
        if self._group is None:
            return None
        sent = [] if self.neighbour is None else self._send(own, self.neighbour)
        failures = [self._receive(source, own.name) for source in self.sources]
        for work, _ in sent:
            work.wait()
        return next((f for f in failures if f), None)

    def _send(self, folder: Path, to: int) -> list[tuple[Any, Tensor]]:
        text = (folder / checkpoint.MANIFEST).read_bytes()
        manifest = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        tensors = [torch.tensor([len(text)]), manifest]
        for relative, facts in json.loads(text)["files"].items():
            size = int(facts["bytes"])
            if size:
                path = str(folder / relative)
                tensors.append(torch.from_file(path, shared=False, size=size, dtype=torch.uint8))
        return [(dist.isend(t, dst=to, group=self._group), t) for t in tensors]

    def _receive(self, source: int, step_name: str) -> str | None:
        """One rank's part: all of it is taken off the wire, whatever becomes of it here."""
        text = self._take(source, int(self._take(source, 1, torch.int64)))
        manifest = json.loads(bytes(text.numpy()))
        root = self.base / _of(source)
        torn, failure = self._torn(root, step_name), None
        for relative, facts in manifest["files"].items():
            content = self._take(source, int(facts["bytes"]))
            try:
                (torn / relative).parent.mkdir(parents=True, exist_ok=True)
                content.numpy().tofile(torn / relative)
            except OSError as error:
                failure = failure or f"OSError: {error}"
        if failure is None:
            del manifest[checkpoint.SEAL]
            _finish(torn, manifest)
        return failure

    def _take(self, source: int, size: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        content = torch.empty(size, dtype=dtype)
        if size:
            dist.recv(content, src=source, group=self._group)
        return content


def part_facts(folder: Path) -> Files:
    """Size and digest of every file."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): checkpoint.facts_of(p) for p in files}


def _failure_of(work: Callable[[], None]) -> str | None:
    """Why it could not be written, None when it was."""
    try:
        work()
    except checkpoint.FAILURES as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def _opened(base: Path, run: Path) -> str | RefusedError:
    """The name of this host's memory, or why it cannot keep copies."""
    try:
        return shm.open_base(base, run)
    except RefusedError as error:
        return error


def _of(rank: int) -> str:
    return f"rank-{rank:05d}"


def _finish(torn: Path, manifest: dict[str, Any]) -> None:
    """The manifest last, then the name: a part is whole or is not there."""
    (torn / checkpoint.MANIFEST).write_text(checkpoint.sealed(manifest), encoding="utf-8")
    final = torn.with_name(checkpoint.name(manifest["step"]))
    if final.exists():  # of a process that outlived its gang: this run has gone back behind it
        shutil.rmtree(final)
    torn.rename(final)


@dataclass(frozen=True)
class Choice:
    """A step that is whole, and for each rank of that time the rank that has its part at hand."""

    step: int
    holders: dict[int, int]


def choose(views: list[Parts], *, newer_than: int) -> Choice | None:
    """The newest step of which all parts of one gang are held by someone; `views` by holder."""
    groups: dict[tuple[int, str], dict[int, int]] = {}
    sizes: dict[tuple[int, str], int] = {}
    for holder, parts in enumerate(views):
        for (rank, step), manifest in parts.items():
            key = (step, str(manifest["gang"]))
            held = groups.setdefault(key, {})
            if rank not in held or holder == rank:  # ranks of one host share the work
                held[rank] = holder
            sizes[key] = int(manifest["world_size"])
    for key in sorted(groups, reverse=True):
        if key[0] > newer_than and len(groups[key]) == sizes[key]:
            return Choice(key[0], groups[key])
    return None


def rescue(base: Path, root: Path, world: World, *, newer_than: int, keep: int) -> Path | None:
    """Make a checkpoint in `root` of the newest copies that are whole and newer than a step;
    collective. Returns its folder, None when there are none.
    """
    views: list[Any] = distributed.gather_objects(_held(base))
    while (choice := choose(views, newer_than=newer_than)) is not None:
        faults = distributed.gather_objects(_faults(base, choice, world.rank))
        for holder, found in enumerate(faults):
            for part, fault in found.items():  # type: ignore[attr-defined]
                del views[holder][part, choice.step]
                if world.first:
                    print(f"copies: rank {part}'s of step {choice.step} is damaged ({fault})")
        if not any(faults):
            return _committed(base, choice, views, root, world, keep)
    return None


def _held(base: Path) -> Parts:
    """Manifests of the parts on this host."""
    if not is_private(base):  # shards are unpickled
        return {}
    held: Parts = {}
    for folder in base.glob("rank-*/step-*"):
        try:
            manifest = checkpoint.unsealed((folder / checkpoint.MANIFEST).read_text())
        except (OSError, ValueError):  # pruned or damaged: not a part
            continue
        held[int(folder.parent.name.removeprefix("rank-")), int(manifest["step"])] = manifest
    return held


def _part(base: Path, rank: int, step: int) -> Path:
    return base / _of(rank) / checkpoint.name(step)


def _faults(base: Path, choice: Choice, mine: int) -> dict[int, str]:
    """What does not verify of the parts that this rank holds."""
    found = {}
    for part, holder in choice.holders.items():
        if holder == mine and (fault := checkpoint.verify(_part(base, part, choice.step))):
            found[part] = fault
    return found


def _committed(
    base: Path, choice: Choice, views: list[Parts], root: Path, world: World, keep: int
) -> Path:
    """All parts as one checkpoint in the run folder, by the protocol of every save."""
    step = choice.step
    manifests = {part: views[holder][part, step] for part, holder in choice.holders.items()}

    def needs() -> int:
        return sum(f["bytes"] for part in manifests.values() for f in part["files"].values())

    torn = checkpoint.open_torn(root, world, step=step, keep=keep, needs=needs)

    def copy_mine() -> Files:
        files: Files = {}
        for part, holder in choice.holders.items():
            if holder == world.rank:
                files |= _copied(_part(base, part, step), torn, manifests[part]["files"])
        return files

    parts = checkpoint.agreed(copy_mine, torn=torn, step=step, world=world, needs=needs)
    files = {name: facts for part in parts for name, facts in part.items()}
    manifest = manifests[min(manifests)] | {"files": dict(sorted(files.items()))}

    def commit() -> None:
        if world.first:
            checkpoint.commit(torn, root / checkpoint.name(step), manifest, keep)
            print(f"copies: step {step} was in memory; it is a checkpoint now", flush=True)

    checkpoint.all_did(commit, torn=torn, step=step, world=world, needs=needs)
    return root / checkpoint.name(step)


def _copied(part: Path, torn: Path, known: Files) -> Files:
    """Copy a part's files; their facts as a checkpoint has them. Raises OSError where one is not
    what it was when it was looked at.
    """
    files: Files = {}
    for relative, facts in known.items():
        target = torn / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(part / relative, target)
        files[relative] = checkpoint.durable_facts(target)
        if files[relative] != facts:
            raise OSError(f"{part / relative}: copied otherwise than it was kept")
    return files
