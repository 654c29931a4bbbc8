"""Which row was in which step: one line per example and step, the root of every lineage question.

Kept in parts, one a checkpoint, so that a resumed run drops what it will do again; joined at the
end into exposure.parquet: record_id, step, rank, tokens, target_tokens.
"""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tuneloom.data.shards import write_whole
from tuneloom.errors import TrainingError

SCHEMA = pa.schema(
    [("record_id", pa.string()), ("step", pa.int32()), ("rank", pa.int32()),
     ("tokens", pa.int32()), ("target_tokens", pa.int32())]
)  # fmt: skip


class Exposure:
    """Rank 0's record of every rank's rows, buffered until the next checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.parts = folder / "exposure"
        self.target = folder / "exposure.parquet"
        self._tables: list[pa.Table] = []

    def add(
        self, ids: list[str], step: int, ranks: np.ndarray, tokens: np.ndarray, targets: np.ndarray
    ) -> None:
        """One step's examples; arrays are (n,) and in the order of `ids`."""
        columns = (ids, [step] * len(ids), ranks, tokens, targets)
        self._tables.append(
            pa.table(
                [pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA
            )
        )

    def flush(self, step: int) -> None:
        """Write what was buffered up to and including `step` as one part."""
        if not self._tables:
            return
        self.parts.mkdir(exist_ok=True)
        sink = pa.BufferOutputStream()
        pq.write_table(pa.concat_tables(self._tables), sink)
        write_whole(self.parts / f"step-{step:06d}.parquet", sink.getvalue())
        self._tables = []

    def write_pending(self, path: Path) -> None:
        """What is buffered, for a copy of the run's state; no part yet."""
        pq.write_table(pa.concat_tables([SCHEMA.empty_table(), *self._tables]), path)

    def adopt(self, path: Path) -> None:
        """Buffer again what a lost process had, but for steps that a part holds; after `rewind`."""
        steps = [_read(part)["step"] for part in self.parts.glob("step-*.parquet")]
        last = max((pc.max(column).as_py() for column in steps), default=0)
        table = pq.read_table(path)
        lacking = table.filter(pc.greater(table["step"], last))
        self._tables = [lacking] if lacking.num_rows else []  # or its part were written over

    def rewind(self, step: int) -> None:
        """Forget every row of steps after `step`, also of a run that had ended."""
        if self.target.exists():  # it holds them all; parts are left where the run was lost then
            shutil.rmtree(self.parts, ignore_errors=True)
            self.parts.mkdir(exist_ok=True)
            self.target.rename(self.parts / f"step-{0:06d}.parquet")
        for part in sorted(self.parts.glob("step-*.parquet")):
            table = _read(part)
            kept = table.filter(pc.less_equal(table["step"], step))
            if kept.num_rows == 0:
                part.unlink()
            elif kept.num_rows < table.num_rows:
                # Under the name of its last step now: the step it is named by will be flushed anew.
                pq.write_table(kept, part.with_suffix(".tmp"))
                part.with_suffix(".tmp").rename(self.parts / f"step-{step:06d}.parquet")
                part.unlink()

    def finish(self, step: int) -> str:
        """Join all parts into exposure.parquet, sorted by step; returns the digest of the order."""
        self.flush(step)
        tables = [_read(part) for part in sorted(self.parts.glob("step-*.parquet"))]
        joined = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
        pq.write_table(joined.sort_by("step"), self.target.with_suffix(".tmp"))
        self.target.with_suffix(".tmp").rename(self.target)
        shutil.rmtree(self.parts, ignore_errors=True)
        return order_digest(joined["step"].to_pylist(), joined["record_id"].to_pylist())


def _read(part: Path) -> pa.Table:
    """One part; raises TrainingError where it is damaged: going on would lose rows in silence."""
    try:
        with pq.ParquetFile(part) as file:  # `read_table` imports pandas: 0.5 s
            return file.read()
    except (OSError, pa.ArrowException) as error:
        raise TrainingError(
            f"{part}: which rows were trained on is not readable any more ({str(error)[:80]}); "
            "restore the file, or start a run of another name: lineage would lack them"
        ) from None


def order_digest(steps: list[int], ids: list[str]) -> str:
    """sha256 of which record came in which step, in order: the same whoever launched the run."""
    sha = hashlib.sha256()
    for step, record_id in zip(steps, ids, strict=True):
        sha.update(f"{step} {record_id}\n".encode())
    return sha.hexdigest()
