"""Ranges and runs on disk: what is merged does not depend on how it was cut."""

import os
import random
import resource
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneloom.config import build
from tuneloom.data import gather
from tuneloom.data.ingest import ingest
from tuneloom.data.prepare import ROW
from tuneloom.data.recipe import IngestConfig
from tuneloom.data.records import canonical, content_id

FILES, ROWS = 240, 12


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Many small files; a quarter of all rows stand in several, and in some twice."""
    rng = random.Random(5)
    folder = tmp_path / "raw"
    folder.mkdir()
    for number in range(FILES):
        picks = [rng.randrange(FILES * ROWS) for _ in range(ROWS)] + [rng.randrange(40)] * 2
        lines = [canonical({"text": f"paragraph {pick}"}) for pick in picks]
        (folder / f"{number:04d}.jsonl").write_text("\n".join(lines))
    return folder


def make(raw: Path, root: Path) -> Path:
    trust = [{"match": f"*{n}.jsonl", "trust": n} for n in range(10)]
    mapping = {"data": {"name": "d", "provenance": trust}, "source": str(raw), "root": str(root)}
    return ingest(build(IngestConfig, mapping))


def content(folder: Path) -> dict[str, object]:
    """Every byte, but of set_aside.parquet the rows: a row group of it is a range."""
    files: dict[str, object] = {p.name: p.read_bytes() for p in folder.iterdir()}
    return files | {
        "timing.json": None,
        "set_aside.parquet": pq.read_table(folder / "set_aside.parquet").to_pylist(),
    }


def test_joined_runs_and_narrow_ranges_give_the_same_dataset(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = content(make(raw, tmp_path / "whole"))
    ranges: list[int] = []
    cut = gather.Spill.ranges
    monkeypatch.setattr(
        gather.Spill, "ranges", lambda spill: (ranges.append(len(t)) or t for t in cut(spill))
    )
    for fan_in, range_bytes in ((FILES, 64 << 10), (7, 64 << 10), (7, 1 << 20)):
        monkeypatch.setattr(gather, "FAN_IN", fan_in)
        monkeypatch.setattr(gather, "RANGE_BYTES", range_bytes)
        ranges.clear()
        assert content(make(raw, tmp_path / f"{fan_in}-{range_bytes}")) == whole
        assert sum(ranges) == FILES * (ROWS + 2)
        assert max(ranges) < sum(ranges) if range_bytes == 64 << 10 else len(ranges) <= 3


def test_more_files_than_may_be_open_at_once_are_ingested(raw: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = len(os.listdir("/proc/self/fd")) + FILES // 4
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    try:
        folder = make(raw, tmp_path / "datasets")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (folder / "manifest.json").is_file()


def test_joining_leaves_few_runs_and_keeps_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spill = gather.Spill(tmp_path)
    for number in range(50):
        ids = sorted(content_id({"text": f"{number} {i}"}) for i in range(20))
        rows = [{"id": i, "record": "", "source": "a", "line": 1, "rank": number} for i in ids]
        gather.write_run(spill.block(number), pa.Table.from_pylist(rows, schema=ROW))
    monkeypatch.setattr(gather, "FAN_IN", 10)
    size = spill.block(0).stat().st_size
    monkeypatch.setattr(gather, "RANGE_BYTES", 10 * size)
    found = [i for table in spill.ranges() for i in table["id"].to_pylist()]
    assert found == sorted(found) and len(set(found)) == 1000
    assert len(list(tmp_path.glob("block-*"))) == 5
