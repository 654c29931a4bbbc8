"""The ops' tests a second time, their Triton kernels run by the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Chosen before Triton is imported, hence a process of its own.
NUMERICS = ["linear_cross_entropy", "elementwise"]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is that process")
def test_triton_kernels_pass_the_same_tests_as_plain_pytorch() -> None:
    files = [str(HERE / f"test_{name}.py") for name in NUMERICS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1]
    )
    assert done.returncode == 0, done.stdout[-6000:]
