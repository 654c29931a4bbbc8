"""The ways to save and to restore that `benchmarks/checkpoint.py` times, over one engine."""

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

Spent = tuple[float, float]
"""Seconds and CPU seconds of the loop's thread."""
COPY = "memory copy"
READ = "page-cache read"
CONTENT: dict[str, Any] = {
    "zero_stage": 2, "trainer": {}, "adapters_only": False, "digests": {}, "step": 1,
}  # fmt: skip


def nothing(folder: Path) -> Spent:
    """A way that leaves nothing to do beside the loop."""
    return 0.0, 0.0


class Way:
    """`blocked` is what the loop waits for, `rest` what happens beside it; it returns what the loop
    waited there once more.
    """

    def __init__(
        self, blocked: Callable[[Path], Any], rest: Callable[[Path], Spent] = nothing
    ) -> None:
        self.blocked, self.rest = blocked, rest


def saves(engine: Any, world: Any, root: Path) -> dict[str, Callable[[], Way]]:
    """How to set up each way to save, by name; collective where it is called."""
    from tuneloom.train import checkpoint

    files = shards_of(engine, root / "probe")
    values = [t for state in files.values() for t in tensors(state)]

    def torch_save(folder: Path) -> None:
        import torch

        for name, state in files.items():
            torch.save(state, folder / name)

    def synchronous(folder: Path) -> None:
        checkpoint.save(engine, folder / "checkpoints", world, keep=1, **CONTENT)

    return {
        COPY: lambda: memory_copy(values),
        "tuneloom, asynchronous": lambda: beside(engine, world, root / "beside"),
        "tuneloom, synchronous": lambda: Way(synchronous),
        "tuneloom, copies": lambda: copies_in(".", engine, world, root),
        "tuneloom, copies and a neighbour's": lambda: copies_in(
            f"host-{world.rank}", engine, world, root
        ),
        "torch.save": lambda: Way(torch_save),
        "DCP async_save": lambda: dcp(values, world, keep_stager=False),
        "DCP async_save, stager kept": lambda: dcp(values, world, keep_stager=True),
        "DeepSpeed save_checkpoint": lambda: Way(lambda f: engine.save_checkpoint(str(f))),
    }


def memory_copy(values: list[Any]) -> Way:
    """The unit: as many bytes as this rank saves, into memory that is there already."""
    import torch

    targets = [torch.ones_like(value) for value in values]

    def copied(folder: Path) -> None:
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)

    return Way(copied)


def beside(engine: Any, world: Any, root: Path) -> Way:
    """Ours, while steps pass, each with the sum that carries who is done."""
    import torch

    from tuneloom.train import background, checkpoint, distributed

    thread = background.Background(root / "checkpoints", world, keep=1)

    def rest(folder: Path) -> Spent:
        wall = cpu = 0.0
        over = False
        while not over:
            over = distributed.broadcast_object((thread.root / checkpoint.name(1)).exists())
            time.sleep(0.02)
            summed = torch.tensor(thread.slots(), dtype=torch.float64)
            done = distributed.sum_over_ranks(summed).tolist()
            started, cpu_started = time.perf_counter(), time.thread_time()
            thread.note(done)
            wall += time.perf_counter() - started
            cpu += time.thread_time() - cpu_started
        return wall, cpu

    return Way(lambda folder: thread.save(engine, **CONTENT), rest)


def copies_in(host: str, engine: Any, world: Any, root: Path) -> Way:
    """Ours in host memory; ranks with folders of their own stand for hosts."""
    from tuneloom.train import copies, distributed, shm

    memory = shm.ROOT / distributed.broadcast_object(shm.name_of(root) if world.first else None)
    kept = copies.Copies(memory / host, root, world)
    steps = itertools.count(1)
    return Way(lambda _: kept.save(engine, **CONTENT | {"step": next(steps)}, exposure=None))


def dcp(values: list[Any], world: Any, *, keep_stager: bool) -> Way:
    """torch's own, with a stager a save, as by default, or one for all."""
    import torch
    from torch.distributed.checkpoint import async_save, staging

    flat = {f"{world.rank}.{i}": tensor for i, tensor in enumerate(values)}
    group = torch.distributed.new_group()
    pending: list[Future[Any]] = []
    options = staging.StagingOptions(False, False, False, False)  # all others need a GPU
    stager = staging.DefaultStager(options) if keep_stager else None

    def save(folder: Path) -> None:
        future = async_save(flat, checkpoint_id=folder, process_group=group, async_stager=stager)
        pending.append(future)

    def rest(folder: Path) -> Spent:
        pending.pop().result()
        return 0.0, 0.0

    return Way(save, rest)


def restores(engine: Any, world: Any, root: Path) -> dict[str, Callable[[], Way]]:
    """The same for restoring what is saved here first; every file is in the page cache."""
    import torch
    from torch.distributed import checkpoint as torch_dcp

    from tuneloom.train import checkpoint

    saved = checkpoint.save(engine, root / "restored" / "checkpoints", world, keep=1, **CONTENT)
    mine = [
        path
        for path in (saved / checkpoint.ENGINE).glob("*.pt")
        if "zero_pp_rank" not in path.name or f"zero_pp_rank_{world.rank}_" in path.name
    ]

    def ours(folder: Path) -> None:
        found = checkpoint.opened(saved, world)
        checkpoint.restore(engine, found, world, universal=None)

    def read() -> Way:
        buffer = memoryview(bytearray(max(path.stat().st_size for path in mine)))
        return Way(lambda _: [read_into(buffer, path) for path in mine])

    def dcp_load() -> Way:
        files = shards_of(engine, root / "probe")
        values = [t for state in files.values() for t in tensors(state)]
        flat = {f"{world.rank}.{i}": tensor for i, tensor in enumerate(values)}
        torch_dcp.save(flat, checkpoint_id=root / "restored-dcp")
        return Way(lambda _: torch_dcp.load(flat, checkpoint_id=root / "restored-dcp"))

    def load(folder: Path) -> None:
        for path in mine:
            torch.load(path, weights_only=False)

    return {
        READ: read,
        "tuneloom, verified": lambda: Way(ours),
        "torch.load, put nowhere": lambda: Way(load),
        "DCP load": dcp_load,
        "DeepSpeed load_checkpoint": lambda: Way(
            partial(deepspeed_load, engine, saved, checkpoint.ENGINE)
        ),
    }


def read_into(buffer: memoryview, path: Path) -> None:
    """A file, into memory that is there already."""
    with path.open("rb", buffering=0) as file:
        at = 0
        while count := file.readinto(buffer[at:]):
            at += count


def deepspeed_load(engine: Any, saved: Path, tag: str, folder: Path) -> None:
    """What `checkpoint.restore` builds on, as it comes."""
    loaded, _ = engine.load_checkpoint(
        str(saved), tag=tag, load_module_strict=False, load_lr_scheduler_states=False
    )
    assert loaded is not None


def tensors(value: Any) -> Iterator[Any]:
    """All of a nested state."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value.detach()
    elif isinstance(value, dict | list | tuple):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from tensors(entry)


def shards_of(engine: Any, folder: Path) -> dict[str, Any]:
    """What DeepSpeed would write on this rank, by file name."""
    from tuneloom.train import checkpoint

    held: dict[str, Any] = {}
    with checkpoint.writing_with(
        engine, lambda state_dict, path: held.update({Path(path).name: state_dict}), nothing
    ):
        checkpoint.save_engine(engine, folder, adapters_only=False)
    return held
