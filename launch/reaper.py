"""Outlives a killed driver by seconds, to end what its embedded Ray leaves behind.

Ray's DashboardAgent and RuntimeEnvAgent (2.60.0) outlive a raylet whose driver got kill -9 by more
than 30 s. A child of the driver holds the reading end of a pipe: when that ends without a word, the
driver is dead, and what it had named is killed.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

GRACE_SECONDS = 5.0
"""Ranks were gone 2 to 4 s after their driver (measured), so most of Ray ends by itself."""
DONE = "done"


@contextmanager
def reaping() -> Iterator[None]:
    """While it lasts, the processes that this one has now started do not outlive it long."""
    family = [(p.pid, p.create_time()) for p in psutil.Process().children(recursive=True)]
    reaper = subprocess.Popen(
        [sys.executable, "-P", __file__], stdin=subprocess.PIPE, text=True, start_new_session=True
    )
    assert reaper.stdin is not None
    reaper.stdin.write(json.dumps(family) + "\n")
    reaper.stdin.flush()
    try:
        yield
    finally:
        reaper.communicate(DONE)


def alive(family: list[tuple[int, float]]) -> list[psutil.Process]:
    """Those that still run; a pid that was given to another process since does not count."""
    found = []
    for pid, created in family:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def main() -> None:
    """Read the family, wait for the driver's end, then end what it left."""
    family = json.loads(sys.stdin.readline() or "[]")
    if sys.stdin.read() == DONE:
        return
    deadline = time.monotonic() + GRACE_SECONDS
    while alive(family) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in alive(family):
        with suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    main()
