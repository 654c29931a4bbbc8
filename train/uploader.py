"""`python -m tuneloom.train.uploader LIVE [EARLIER ...]`: upload W&B files while a run writes them.

Runs of earlier attempts that were cut off come first, so that the one run on the server gets its
rows in order; then LIVE, until its writer closes it. Ends by itself within two seconds when the
process that started it is gone: the next attempt, or `wandb sync`, uploads the rest.
"""

import http.client
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

GRACE_SECONDS = 15.0
"""How long a finished run waits for its upload, where the server answers."""
SYNC = [sys.executable, "-m", "wandb", "beta", "sync", "--yes"]


class Uploader:
    """The side process, as seen by rank 0."""

    def __init__(self, earlier: list[Path], live: Path) -> None:
        self.live = live
        environment = {k: v for k, v in os.environ.items() if k not in ("WANDB_MODE", "RANK")}
        with (live / "upload.log").open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tuneloom.train.uploader", str(live), *map(str, earlier)],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,  # Ctrl-C stops the run, which then still uploads
            )  # fmt: skip

    def finish(self) -> str | None:
        """None when all rows are on the server, else one line that says what to do."""
        answers = _server_answers()
        try:
            code = self._process.wait(GRACE_SECONDS if answers else 0.1)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            code = self._process.wait(10)
        if code == 0:
            return None
        why = "does not answer" if not answers else "did not take all rows"
        return (
            f"the W&B server {why} ({_server()}); no row is lost: `wandb sync {self.live}` "
            "uploads them"
        )


def _server() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def _server_answers() -> bool:
    """Whether it says anything to an HTTP request within a second but that it is broken."""
    try:
        with urllib.request.urlopen(_server(), timeout=1):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (OSError, http.client.HTTPException):
        return False


def main(arguments: list[str]) -> int:
    """Upload EARLIER, then LIVE; 0 when both are done."""
    live, *earlier = arguments
    parent = os.getppid()
    while not _server_answers():
        if os.getppid() != parent:
            return 1
        time.sleep(1)
    for command in ([*SYNC, *earlier], [*SYNC, "--live", live]):
        if command[-1] != "--yes" and not _ran(command, parent):
            return 1
    return 0


def _ran(command: list[str], parent: int) -> bool:
    """True when the command ended well; it is ended when our parent is gone."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while process.poll() is None:
        if os.getppid() != parent:
            process.terminate()
            process.wait()
            return False
        time.sleep(0.2)
    return process.returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
