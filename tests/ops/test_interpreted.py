"""The ops' tests a second time, their Triton kernels run by the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Chosen before Triton is imported, hence a process of its own.
FAMILY = "test_patch.py::test_a_patched_family_has_the_same_loss_and_gradients"
NUMERICS = [
    "test_linear_cross_entropy.py",
    "test_elementwise.py",
    "test_fp8.py",
    *(f"{FAMILY}[{name}]" for name in ("Llama", "Gemma2", "Phi3")),
]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is that process")
def test_triton_kernels_pass_the_same_tests_as_plain_pytorch(tmp_path: Path) -> None:
    """Which pass without them, too: so it is counted whose kernels were launched."""
    tests = [str(HERE / name) for name in NUMERICS]
    plugins = ["-p", "no:cacheprovider", "-p", "tests.ops.launches"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, *tests]
    counts = tmp_path / "launches"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TUNELOOM_LAUNCHES": str(counts)}
    root = HERE.parents[1]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stdout[-6000:]
    launched = {line.split()[0] for line in counts.read_text().splitlines()}
    assert launched == {"fp8", "linear_cross_entropy", "rms_norm", "rope", "swiglu"}
