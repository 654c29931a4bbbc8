"""A pytest plugin: which modules of kernels/ had a Triton kernel launched, into a file."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

from tuneloom.kernels import jit

LAUNCHED: Counter[str] = Counter()
getitem = jit.Kernel.__getitem__


def counted(kernel: jit.Kernel, grid: tuple[int, ...]) -> Any:
    LAUNCHED[kernel.compiled.fn.__module__.rpartition(".")[2]] += 1  # type: ignore[union-attr]
    return getitem(kernel, grid)


jit.Kernel.__getitem__ = counted  # type: ignore[method-assign]


def pytest_sessionfinish() -> None:
    lines = "".join(f"{name} {count}\n" for name, count in sorted(LAUNCHED.items()))
    Path(os.environ["TUNELOOM_LAUNCHES"]).write_text(lines, encoding="utf-8")
