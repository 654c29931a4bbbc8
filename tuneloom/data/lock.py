"""One writer at a time in a folder that several people or jobs write to."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tuneloom.errors import RefusedError

PATIENCE_SECONDS = 60.0


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold FOLDER/.lock, which the kernel lets go of whatever happens to this process.

    Waits for whoever holds it; raises RefusedError after PATIENCE_SECONDS, or where it cannot be
    made.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    try:
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise RefusedError(
            f"{folder}: cannot be written ({error.strerror}); choose another folder"
        ) from None
    with lock as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RefusedError(
                        f"{folder}: another process has been writing here for "
                        f"{PATIENCE_SECONDS:.0f} s; wait for it, then try again"
                    ) from None
                time.sleep(0.02)
        yield
