"""Asked to stop: SIGTERM, SIGUSR1 (Slurm's warning) or a `stop` file in the run folder set a flag,
no more.

Ranks agree on the flag at the step boundary, save the same step and leave with exit 75. A handler
that saves by itself deadlocks with more than one rank (transformers' JIT checkpoint, measured).
"""

import signal
import threading
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
HEARD: list[int] = []
"""Those that runs in this process were sent, also when it was too late to act on: a sweep starts no
further run then.
"""


class StopFlag:
    """True once this rank was asked to stop."""

    def __init__(self, folder: Path, *, first: bool) -> None:
        self.file, self.first = folder / "stop", first
        self._signalled = False
        self._previous: dict[int, object] = {}
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        HEARD.append(number)
        self._signalled = True

    def asked(self) -> bool:
        """Cheap enough for every step: one stat on rank 0."""
        return self._signalled or (self.first and self.file.exists())

    def clear(self, *, heard: bool) -> None:
        """Give the signals back, and forget the request; one that was not `heard`, as a rank was
        lost meanwhile, is for the ranks that come next.
        """
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self.first and heard:
            self.file.unlink(missing_ok=True)
