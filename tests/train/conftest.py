"""What W&B's own files hold, for the tests of tracking."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuneloom.train.tracker import rows_written

History = Callable[[Path], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def offline_history() -> History:
    return rows_written
