"""The lock of a run folder: held by another process, or not to be had on this file system."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from tuneloom.errors import RefusedError
from tuneloom.train.runs import locked


def flock_fails(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES])
def test_a_held_lock_is_another_writer(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock_fails(monkeypatch, number)
    with pytest.raises(RefusedError, match="is being written by another process"):
        locked(tmp_path / "run")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_at_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock_fails(monkeypatch, number)
    with pytest.raises(RefusedError, match=f"file system of {tmp_path}/run gives no lock") as told:
        locked(tmp_path / "run", patience=5)  # a restart waits for a holder; here is none
    assert os.strerror(number) in str(told.value) and "choose a run.root" in str(told.value)


def test_a_disk_error_is_not_taken_for_a_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock_fails(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        locked(tmp_path / "run")


def test_a_folder_is_free_again_when_its_writer_let_go(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "run"),
        pytest.raises(RefusedError, match=f"process {os.getpid()} on"),
    ):
        locked(tmp_path / "run")
    locked(tmp_path / "run").close()
