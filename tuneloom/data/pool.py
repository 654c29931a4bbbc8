"""Blocks prepared in this process or in several; a few are in flight, so memory does not grow."""

import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

from tuneloom.data.gather import Spill, write_run
from tuneloom.data.prepare import Prepared, Preparer
from tuneloom.data.readers import Block
from tuneloom.data.recipe import Recipe

AHEAD = 3
"""Blocks in flight for each process: one at work, one waiting, one being sent."""
_preparer: Preparer


def prepare_all(
    blocks: Iterable[Block], recipe: Recipe, folder: Path, *, workers: int
) -> Iterator[tuple[Block, Prepared]]:
    """Write every block's rows into `folder`; yields what became of each, in order."""
    _start(recipe)  # a recipe that cannot run is refused here, not as a broken pool
    if workers == 1:
        for block in blocks:
            yield block, _prepare(block, folder)
        return
    context = multiprocessing.get_context(
        "spawn"
    )  # forking a process with Arrow's threads can hang
    waiting: deque[tuple[Block, Future[Prepared]]] = deque()
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(recipe,)) as pool:
        for block in blocks:
            waiting.append((block.without_rows(), pool.submit(_prepare, block, folder)))
            if len(waiting) >= AHEAD * workers:
                done, result = waiting.popleft()
                yield done, result.result()
        while waiting:
            done, result = waiting.popleft()
            yield done, result.result()


def _start(recipe: Recipe) -> None:
    """Compile the recipe once a process."""
    global _preparer
    _preparer = Preparer(recipe)


def _prepare(block: Block, folder: Path) -> Prepared:
    """One block to disk; what goes back through the pipe is small."""
    done = _preparer(block)
    write_run(Spill(folder).block(block.number), done.table)
    done.table = done.table.slice(0, 0)
    return done
