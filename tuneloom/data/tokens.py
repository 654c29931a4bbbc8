"""The token cache: rows are rendered once, by one thread of global rank 0, and read by every rank.

The folder's name is a digest of the rows, the tokenizer, the template and the options, so an
earlier run's work, finished or not, is taken up. Rows are written in the order in which the first
epoch needs them, in shards that start small: the first step waits for the first window, not for
the dataset. Construct the store on the writer first, let the other ranks pass a barrier, then
construct theirs: the writer clears the error of an earlier attempt.
"""

import fcntl
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from tuneloom.data import shards
from tuneloom.data.render import Renderer
from tuneloom.data.rows import Rows
from tuneloom.errors import DataError
from tuneloom.redact import redact

FIRST_SHARD, SHARD = 64, 1024
"""Rows. Shards double from the first size to the second; larger datasets get larger shards."""
MOST_SHARDS = 4096
"""Each shard is one memory map; Linux allows 65,530 a process."""
ENOUGH_ROWS = 1000
"""Rows seen before the share of lost answer tokens is judged (or all, when there are fewer)."""
POLL_SECONDS = 0.05
AHEAD_ROWS = 512
"""Rows that a paced writer tokenises before they are asked for: what sizes the first window."""
PATIENCE_SECONDS = 10.0
"""How long a paced writer lets others come first; a large model loads for longer than that."""
STALL_SECONDS = 1800.0
"""A reader gives up when no shard has come for this long: the writer is gone without a word."""


@dataclass
class Seen:
    """Sums over the rows tokenised so far."""

    rows: int = 0
    dropped: int = 0
    tokens: int = 0
    """Tokens kept: what will be trained on or masked."""
    targets: int = 0
    """Target tokens before any cut."""
    lost: int = 0
    """Target tokens that over-length rows lose."""


@dataclass(frozen=True)
class Facts:
    """(n,) int32 each: tokens before the cut, tokens kept (0: dropped), target tokens kept, and the
    index of the row's source in `TokenStore.sources`."""

    tokens: np.ndarray
    kept: np.ndarray
    trained: np.ndarray
    sources: np.ndarray


class TokenStore:
    """Examples by row index; blocks where a row is not tokenised yet. Safe to use from threads."""

    def __init__(
        self,
        cache: str | Path,
        rows: Rows,
        renderer: Renderer,
        order: np.ndarray,
        *,
        writer: bool = True,
        paced: bool = False,
        max_lost_answer_tokens: float = 1.0,
    ) -> None:
        """`paced`: until `hurry`, tokenise only what is waited for, as it competes with the imports
        and the first step for processors and the interpreter (0.9 of 5.5 CPU-seconds).
        """
        # Sources stand in the cache, and those of a raw file are its name.
        named = f"{rows.digest} {Path(rows.where(0)).name} {renderer.digest}"
        key = hashlib.sha256(named.encode()).hexdigest()
        self.folder = Path(cache) / key[:32]
        self.rows, self.renderer, self.order = rows, renderer, order
        self._writer, self._limit = writer, max_lost_answer_tokens
        self._shards: list[shards.Shard] = []
        self._files: set[str] = set()
        self._shard = np.full(len(rows), -1, np.int32)
        self._position = np.zeros(len(rows), np.int32)
        self._length, self._tokens, self._trained, self._source = (
            np.zeros(len(rows), np.int32) for _ in range(4)
        )
        self.sources: list[str] = []
        """Names that `Facts.sources` counts by."""
        self.seen = Seen()
        self._changed = threading.Condition(threading.RLock())
        self._error: Exception | None = None
        self._stop = threading.Event()
        self._waiting, self._free_from = 0, time.monotonic() + PATIENCE_SECONDS * paced
        self._thread: threading.Thread | None = None
        if writer:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("w")
            if _locked(self._lock):
                self._forget_error()
            self._thread = threading.Thread(target=self._guarded, name="tokenise", daemon=True)
            self._thread.start()

    def __enter__(self) -> "TokenStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the writer after the shard it is at; what is written stays for the next run."""
        self._stop.set()
        if self._thread:
            self._thread.join()
            self._thread = None

    def hurry(self) -> None:
        """From now on tokenise all that is left, waited for or not."""
        self._free_from = 0.0

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of each row, 0 for dropped ones: (n,) int32; waits for the tokeniser."""
        self._wait(rows)
        return self._length[rows]

    def example(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """ids: (L,) int32, read-only; target: (L,) bool."""
        return self._at(row)[0].example(self._position[row])

    def record_id(self, row: int) -> str:
        return self._at(row)[0].text("id", self._position[row])

    def source(self, row: int) -> str:
        return self._at(row)[0].text("source", self._position[row])

    def dropped(self, row: int) -> str:
        """Why a row is not trained on; empty for a row that is."""
        return self._at(row)[0].text("dropped", self._position[row])

    def facts(self, rows: np.ndarray) -> Facts:
        """What the ledger books for these rows."""
        self._wait(rows)
        return Facts(
            self._tokens[rows], self._length[rows], self._trained[rows], self._source[rows]
        )

    def _at(self, row: int) -> tuple[shards.Shard, int]:
        if self._shard[row] < 0:
            self._wait(np.asarray([row]))
        return self._shards[self._shard[row]], int(self._position[row])

    def _wait(self, rows: np.ndarray) -> None:
        """Until every row is tokenised; raises what the writer died of, on every rank alike."""
        if (self._shard[rows] < 0).any():
            self._waiting += 1
            try:
                self._wait_for_writer(rows)
            finally:
                self._waiting -= 1
        with self._changed:  # rows are there, but the run may have been refused while they came
            self._raise_if_failed()

    def _wait_for_writer(self, rows: np.ndarray) -> None:
        last, known = time.monotonic(), -1
        while (self._shard[rows] < 0).any():
            with self._changed:
                if not (self._thread and self._thread.is_alive()):
                    self._scan()
                if (self._shard[rows] >= 0).all():
                    break
                self._raise_if_failed()
                if len(self._shards) != known:
                    last, known = time.monotonic(), len(self._shards)
                self._changed.wait(POLL_SECONDS)
            if time.monotonic() - last > STALL_SECONDS:
                raise DataError(
                    f"{self.folder}: no new tokens for {STALL_SECONDS:.0f} s; is rank 0 alive, and "
                    f"is this folder on a disk that all nodes share?"
                )

    def _raise_if_failed(self) -> None:
        if self._error is not None:
            raise self._error
        file = self.folder / "error.json"
        if not self._writer and file.exists():
            error = json.loads(file.read_text())
            raise (DataError if error["data"] else RuntimeError)(error["message"])

    def _scan(self, *, repair: bool = False) -> None:
        """Take in shards that are new in the folder; with `repair`, remove damaged ones."""
        if not self.folder.exists():
            return
        with self._changed:
            for path in sorted(self.folder.glob("*.arrow")):
                if path.name in self._files:
                    continue
                shard = shards.read(path)
                if shard is not None:
                    self._take(path, shard)
                elif repair:
                    path.unlink()

    def _take(self, path: Path, shard: shards.Shard) -> None:
        """Register the rows of a shard that no earlier one holds."""
        with self._changed:
            fresh = np.flatnonzero(self._shard[shard.rows] < 0)
            rows = shard.rows[fresh]
            self._position[rows] = fresh
            self._length[rows] = shard.lengths[fresh]
            self._tokens[rows] = shard.tokens[fresh]
            self._trained[rows] = shard.trained[fresh]
            self._source[rows] = self._codes(shard)[fresh]
            self._shards.append(shard)
            self._files.add(path.name)
            # Last, because readers of other threads look at it without the lock.
            self._shard[rows] = len(self._shards) - 1
            self.seen.rows += len(rows)
            self.seen.dropped += int((shard.lengths[fresh] == 0).sum())
            self.seen.tokens += int(shard.lengths[fresh].sum())
            self.seen.targets += int(shard.targets[fresh].sum())
            self.seen.lost += int((shard.targets[fresh] - shard.trained[fresh]).sum())
            self._changed.notify_all()

    def _codes(self, shard: shards.Shard) -> np.ndarray:
        """The source of each row of a shard as an index into `sources`: (n,)."""
        names = np.asarray(shard.table["source"].to_pylist(), object)
        self.sources += [name for name in dict.fromkeys(names) if name not in self.sources]
        return np.asarray([self.sources.index(name) for name in names], np.int32)

    def _guarded(self) -> None:
        """The writer thread: what goes wrong here is raised where tokens are waited for."""
        try:
            self._write()
        except OSError as error:
            self._fail(
                DataError(
                    f"{self.folder}: the token cache cannot be written ({error.strerror}); free "
                    f"space there or move the cache"
                )
            )
        except Exception as error:
            self._fail(error)
        finally:  # another run may want more of the rows
            self._lock.close()

    def _forget_error(self) -> None:
        """Of a writer before this one."""
        (self.folder / "error.json").unlink(missing_ok=True)

    def _fail(self, error: Exception) -> None:
        message = redact(str(error) or repr(error))
        report = {"data": isinstance(error, DataError), "message": message}
        with self._changed:
            self._error = error
            self._changed.notify_all()
        try:
            if _locked(self._lock):
                shards.write_whole(self.folder / "error.json", json.dumps(report).encode())
        except OSError:  # disk full: this rank raises all the same, and its exit ends the others
            return

    def _write(self) -> None:
        """Tokenise what is missing, or wait while another run's writer does."""
        while not _locked(self._lock):
            with self._changed:
                self._scan()
                self._judge_losses()
            if self._stop.wait(POLL_SECONDS) or not len(self._missing()):
                return
        self._forget_error()
        for path in self.folder.glob("*.tmp"):
            path.unlink()
        with self._changed:
            self._scan(repair=True)
            self._judge_losses()
        for number, chunk in enumerate(_chunks(self._missing()), start=len(self._files)):
            self._let_others_go_first()
            if self._stop.is_set():
                return
            records = [self.rows[int(row)] for row in chunk]
            places = [self.rows.where(int(row)) for row in chunk]
            examples = self.renderer.render_many(records, places)
            path = shards.write(self.folder, number, chunk, records, examples)
            shard = shards.read(path)
            if shard is None:
                raise DataError(f"{path}: read back other bytes than were written; check the disk")
            with self._changed:
                self._take(path, shard)
                self._judge_losses()

    def _let_others_go_first(self) -> None:
        while self.seen.rows >= AHEAD_ROWS and not self._waiting and not self._stop.is_set():
            if time.monotonic() >= self._free_from:
                return
            self._stop.wait(POLL_SECONDS)

    def _missing(self) -> np.ndarray:
        return self.order[self._shard[self.order] < 0]

    def _judge_losses(self) -> None:
        """Called with the lock held, so that nobody is given rows of a run that is refused."""
        seen = self.seen
        if seen.rows < ENOUGH_ROWS and len(self._missing()):
            return
        if seen.lost > self._limit * seen.targets:
            self._error = DataError(
                f"batch.max_lost_answer_tokens: at most {self._limit:.2%} of answer tokens may "
                f"be lost, but {seen.lost / seen.targets:.2%} ({seen.lost:,} of {seen.targets:,} "
                f"in the first {seen.rows:,} rows) are, in rows longer than batch.max_length="
                f"{self.renderer.max_length}; raise batch.max_length or this limit"
            )
            raise self._error


def _locked(file: IO[str]) -> bool:
    """Take the writer's lock if no other process holds it; kept until the file is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Shards' worth of rows, the first ones small."""
    largest = max(SHARD, len(rows) // MOST_SHARDS)
    start, size = 0, FIRST_SHARD
    while start < len(rows):
        yield rows[start : start + size]
        start, size = start + size, min(size * 2, largest)
