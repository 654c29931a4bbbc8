"""Checkpoints written beside training (`checkpoint.asynchronous`): a step waits for a copy of the
state in host memory and no longer.

    step N         all ranks copy their state; on each, a thread writes, fsyncs and hashes it
    a later step   all have written: a thread of rank 0 commits, manifest last, then the name
    the next save, a stop, the end   wait until that is done

Threads talk to no other rank: whether they are done travels in the sum that every step makes
anyway (`Session.agree`), and all collectives are made by the loop. A rank that could not write ends
the run at the next step, on all ranks. Until the commit the checkpoint before is the newest.
"""

import json
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from safetensors.torch import save_file

from tuneloom.train import checkpoint, distributed
from tuneloom.train.checkpoint import Files
from tuneloom.train.distributed import World
from tuneloom.train.snapshot import Snapshot

SLOTS = 2
"""Numbers that this adds to the sum of a step: ranks that are done, and that failed."""


class Background:
    """At most one save under way. Methods and the constructor are collective unless they say
    otherwise.
    """

    def __init__(self, root: Path, world: World, *, keep: int) -> None:
        self.root, self.world, self.keep = root, world, keep
        self._snapshot = Snapshot()
        self._state: Literal["idle", "writing", "committing"] = "idle"  # the same on all ranks
        self._task: Task | None = None
        self._writer = Writer()
        own = secrets.token_hex(4) if world.first else ""
        self._gang, self._saves = distributed.broadcast_object(own), 0
        self._torn = root
        self._manifest: dict[str, Any] = {}
        self._needs: Callable[[], int] = int  # nothing is written yet

    def save(
        self, engine: Any, *, step: int, zero_stage: int, trainer: dict[str, Any],
        adapters_only: bool, digests: dict[str, str],
    ) -> None:  # fmt: skip
        """Copy the state of `step` and start to write it, the save before being done; raises
        TrainingError on all ranks when either could not be.
        """
        self.settle()
        self._needs = partial(checkpoint.bytes_of, engine, self.world, adapters_only=adapters_only)
        self._saves += 1  # names that no other attempt writes to, and this one once
        self._torn = self.root / f".torn-{checkpoint.name(step)}-{self._gang}-{self._saves}"
        self._manifest = {
            "step": step, "world_size": self.world.size, "zero_stage": zero_stage,
            "digests": digests,
        }  # fmt: skip
        writes: list[Write] = []
        self._all_did(lambda: self.world.first and checkpoint.make_room(self._torn, self.keep))
        self._all_did(lambda: writes.extend(self._copy(engine, trainer, adapters_only)))
        self._task, self._state = self._writer.start(partial(self._write, writes)), "writing"

    def slots(self) -> list[int]:
        """What this rank adds to the step's sum. Not collective."""
        if self._task is None or self._task.running:
            return [0, 0]
        return [1, int(self._task.failed)]

    def note(self, summed: list[float]) -> None:
        """Go on with what all ranks have done; raises TrainingError when one could not write."""
        done, failed = (int(v) for v in summed)
        if failed:
            self.settle()
        elif self._state == "writing" and done == self.world.size:
            self._commit()
        elif self._state == "committing" and done:  # by rank 0
            self._task, self._state = None, "idle"

    def settle(self) -> None:
        """Wait until the save under way is a checkpoint; raises TrainingError where it failed."""
        if self._state == "writing":
            self._commit()
        if self._state == "committing":
            self._agreed(self._result)
        self._task, self._state = None, "idle"

    def close(self) -> None:
        """No thread of this rank writes after this. Not collective."""
        self._writer.close()

    def _copy(self, engine: Any, trainer: dict[str, Any], adapters_only: bool) -> list["Write"]:
        """What is to be written of this rank. DeepSpeed says what its shards are: its writer is
        handed a state, and copies it in place of writing.
        """
        torn, world, snapshot = self._torn, self.world, self._snapshot
        write_shard, write_scripts = engine.checkpoint_engine.save, engine._copy_recovery_script
        writes: list[Write] = []
        snapshot.begin()

        def shard(state_dict: Any, path: str) -> None:
            state = snapshot.copied(state_dict)
            writes.append(Write(Path(path), partial(write_shard, state, path)))

        def scripts(folder: str) -> None:
            writes.append(Write(Path(folder), partial(write_scripts, folder)))

        with checkpoint.writing_with(engine, shard, scripts), _without_barriers():
            checkpoint.save_engine(engine, torn, adapters_only)
        rng, rng_file = checkpoint.rng_state(world), checkpoint.rng_file(torn, world)
        writes.append(Write(rng_file, partial(save_file, rng, rng_file)))
        if world.first:
            path, text = torn / checkpoint.TRAINER, json.dumps(trainer)
            writes.append(Write(path, partial(path.write_text, text, encoding="utf-8")))
        snapshot.complete()
        return writes

    def _write(self, writes: list["Write"]) -> Files:
        """In the thread: this rank's files, each with size and digest."""
        files: Files = {}
        for write in writes:
            write.run()
            for path in write.files():
                files[str(path.relative_to(self._torn))] = checkpoint.durable_facts(path)
        return files

    def _commit(self) -> None:
        """All have written, or one could not: rank 0 begins to make it a checkpoint."""
        parts = self._agreed(self._result)
        self._task, self._state = None, "committing"
        if self.world.first:
            files = dict(sorted(file for part in parts for file in part.items()))
            manifest = self._manifest | {"files": files}
            final = self.root / checkpoint.name(self._manifest["step"])
            commit = partial(checkpoint.commit, self._torn, final, manifest, self.keep)
            self._task = self._writer.start(commit)

    def _result(self) -> Any:
        """What this rank's thread returned or raised; None without one."""
        return self._task.result() if self._task is not None else None

    def _agreed(self, work: Callable[[], Any]) -> list[Any]:
        step = self._manifest["step"]
        return checkpoint.agreed(
            work, torn=self._torn, step=step, world=self.world, needs=self._needs
        )

    def _all_did(self, work: Callable[[], Any]) -> None:
        step = self._manifest["step"]
        checkpoint.all_did(work, torn=self._torn, step=step, world=self.world, needs=self._needs)


@contextmanager
def _without_barriers() -> Iterator[None]:
    """DeepSpeed's two barriers in a save order files of ranks; none is written here, and all ranks
    agree afterwards.
    """
    from deepspeed import comm

    barrier, comm.barrier = comm.barrier, lambda *_, **__: None
    try:
        yield
    finally:
        comm.barrier = barrier


@dataclass(frozen=True)
class Write:
    """One call in the thread, and the file it makes, or the folder it puts scripts into."""

    path: Path
    run: Callable[[], object]

    def files(self) -> list[Path]:
        return sorted(self.path.glob("*.py")) if self.path.is_dir() else [self.path]


class Task:
    """A call in the writer's thread."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._outcome: Any = None
        self._error: Exception | None = None
        self._over = threading.Event()

    def run(self) -> None:
        try:
            self._outcome = self._work()
        except Exception as error:  # raised by `result`, in the loop
            self._error = error
        self._over.set()

    @property
    def running(self) -> bool:
        return not self._over.is_set()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def result(self) -> Any:
        """Wait for it; raises what it raised, wrapped where that is no failure to write."""
        self._over.wait()
        if isinstance(self._error, checkpoint.FAILURES):
            raise self._error
        if self._error is not None:
            raise RuntimeError(f"{type(self._error).__name__}: {self._error}") from self._error
        return self._outcome


class Writer:
    """One thread, there before it is needed: to start one costs the loop 4 ms, until it has the
    interpreter.
    """

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True, name="save")
        self._thread.start()

    def start(self, work: Callable[[], Any]) -> Task:
        task = Task(work)
        self._tasks.put(task)
        return task

    def close(self) -> None:
        """After what it was given."""
        self._tasks.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task.run()
