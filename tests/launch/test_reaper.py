"""What a killed driver had started does not outlive it; what it ended itself is left alone."""

import signal
import subprocess
import sys
import time

import psutil

DRIVER = """
import subprocess, sys, time
from tuneloom.launch.reaper import reaping
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"],
                         start_new_session=True)
with reaping():
    print(child.pid, flush=True)
    {body}
"""


def driver(body: str) -> tuple["subprocess.Popen[str]", psutil.Process]:
    """A process with a child in a session of its own, as Ray's agents are."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER.format(body=body)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, psutil.Process(int(process.stdout.readline()))


def test_a_child_of_a_killed_driver_is_gone_within_ten_seconds() -> None:
    process, child = driver("time.sleep(300)")
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    deadline = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child outlives its driver"
        time.sleep(0.1)


def test_nothing_is_killed_after_a_driver_that_ended_by_itself() -> None:
    process, child = driver("pass")
    assert process.wait(30) == 0
    time.sleep(6.0)  # more than the reaper's patience
    assert child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    child.kill()
