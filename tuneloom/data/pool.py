"""Blocks prepared in this process or in several; a few are in flight, so memory does not grow.

`launch/ingest.py` has the same on a cluster: whoever prepares, blocks come back in order.
"""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

from tuneloom.data.gather import Spill, write_run
from tuneloom.data.prepare import Prepared, Preparer
from tuneloom.data.readers import Block, Passed, Refused, read_blocks
from tuneloom.data.recipe import IngestConfig, Recipe
from tuneloom.data.sources import Source

Prepare = Callable[
    [IngestConfig, list[Source], Path, list[Passed | Refused]], Iterator[tuple[Block, Prepared]]
]
"""Writes every block's rows into a folder and yields what became of each, in order; the list grows
by every source, read or refused."""
AHEAD = 3
"""Blocks in flight for each process: one at work, one waiting, one being sent."""
_preparer: Preparer


def prepare_here(
    config: IngestConfig, sources: list[Source], folder: Path, ends: list[Passed | Refused]
) -> Iterator[tuple[Block, Prepared]]:
    """`Prepare` by `config.workers` processes of this machine."""
    _start(config.data)  # a recipe that cannot run is refused here, not as a broken pool
    blocks = read_blocks(
        sources, ends, max_archive_bytes=config.max_archive_bytes,
        refuse_files=config.max_refused_files > 0,
    )  # fmt: skip
    if config.workers == 1:
        for block in blocks:
            yield block, _prepare(block, folder)
        return
    context = multiprocessing.get_context(
        "spawn"
    )  # forking a process with Arrow's threads can hang
    waiting: deque[tuple[Block, Future[Prepared]]] = deque()
    with ProcessPoolExecutor(
        config.workers, context, initializer=_start, initargs=(config.data,)
    ) as pool:
        for block in blocks:
            waiting.append((block.without_rows(), pool.submit(_prepare, block, folder)))
            if len(waiting) >= AHEAD * config.workers:
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
