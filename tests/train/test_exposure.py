"""Which row was in which step, however often the run went back."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tuneloom.train.exposure import Exposure

ONE = np.ones(1, np.int32)


def steps(exposure: Exposure, first: int, last: int) -> None:
    for step in range(first, last + 1):
        exposure.add([f"row {step}"], step, ONE, ONE, ONE)


def test_a_run_that_resumes_inside_a_part_keeps_each_step_once(tmp_path: Path) -> None:
    """A save that died after its part was written, and a copy in memory of an earlier step."""
    lost = Exposure(tmp_path)
    steps(lost, 1, 10)
    lost.flush(10)
    steps(lost, 11, 15)
    lost.write_pending(tmp_path / "copy.parquet")
    steps(lost, 16, 20)
    lost.flush(20)
    for _ in range(2):  # the second attempt dies before a step
        again = Exposure(tmp_path)
        again.rewind(15)
        again.adopt(tmp_path / "copy.parquet")
    steps(again, 16, 20)
    again.flush(20)
    steps(again, 21, 25)
    again.finish(25)
    table = pq.read_table(tmp_path / "exposure.parquet")
    assert table["step"].to_pylist() == list(range(1, 26))
    assert table["record_id"].to_pylist() == [f"row {step}" for step in range(1, 26)]


def test_a_copy_of_the_step_that_a_part_ends_with_leaves_the_part_alone(tmp_path: Path) -> None:
    """The part of a save is written, its checkpoint is not; the copy of that step is whole."""
    lost = Exposure(tmp_path)
    steps(lost, 1, 10)
    lost.flush(10)
    lost.write_pending(tmp_path / "copy.parquet")
    again = Exposure(tmp_path)
    again.rewind(10)
    again.adopt(tmp_path / "copy.parquet")
    again.finish(10)
    assert pq.read_table(tmp_path / "exposure.parquet")["step"].to_pylist() == list(range(1, 11))


def test_a_run_that_is_lost_as_it_removes_its_parts_has_each_step_once(tmp_path: Path) -> None:
    lost = Exposure(tmp_path)
    steps(lost, 1, 10)
    lost.flush(10)
    shutil.copytree(lost.parts, tmp_path / "aside")
    lost.finish(10)
    (tmp_path / "aside").rename(lost.parts)
    again = Exposure(tmp_path)
    again.rewind(10)
    again.finish(10)
    assert pq.read_table(tmp_path / "exposure.parquet")["step"].to_pylist() == list(range(1, 11))
