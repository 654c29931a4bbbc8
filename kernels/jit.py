"""Where Triton enters: `jit` makes a kernel, `runs_triton(x)` says whether an op on x launches it.

Yes on a GPU; no on the CPU, where the same autograd Function takes its plain PyTorch path. With
TRITON_INTERPRET=1 in the environment the CPU runs the kernels too, one program after another, so
that their arithmetic is checked where there is no GPU (slow: small sizes only).

Arguments of kernels are annotated `tl.tensor`, pointers and scalars alike: the compiler looks
names in annotations up, and refuses any that is not Triton's. `tl` is None where Triton has no
wheel (macOS, Windows); kernel files therefore start with `from __future__ import annotations`, so
that `tl.constexpr` is never evaluated.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: `runs_triton` says no
    triton = None
    tl = None

CALLS: Counter[str] = Counter()
"""How often each op ran forward, and why the activation diet did not: evidence for effects.json."""

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(x: torch.Tensor) -> bool:
    """Whether an op on `x` launches its Triton kernel, rather than plain PyTorch."""
    return triton is not None and (x.is_cuda or INTERPRETING)


class Kernel:
    """A Triton kernel: `kernel[grid](*arguments, **constants)` launches it."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.compiled = triton.jit(function) if triton is not None else None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert self.compiled is not None, "runs_triton() is asked before a launch"
        launch: Callable[..., None] = self.compiled[grid]
        return launch if INTERPRETING else _on_device(launch)


def _on_device(launch: Callable[..., None]) -> Callable[..., None]:
    """Triton launches on the current device, which need not be that of its arguments."""

    def guarded(first: torch.Tensor, *rest: Any, **constants: Any) -> None:
        with torch.cuda.device(first.device):
            launch(first, *rest, **constants)

    return guarded


def jit(function: Callable[..., None]) -> Kernel:
    """Decorator of a Triton kernel."""
    return Kernel(function)


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n: Triton's block sizes."""
    return 1 << max(n - 1, 0).bit_length()


def plain_dtype(dtype: torch.dtype) -> torch.dtype:
    """What plain PyTorch computes numbers of `dtype` in, where the kernels take fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
