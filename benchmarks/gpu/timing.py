"""Fair timing: contenders interleaved in blocks, median and spread, and the machine's ceilings.

On a GPU each call is timed by CUDA events around it; on the CPU (a dry run) by process time, and
such numbers are only ever printed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

BLOCKS, WARM_UP, TIMED = 3, 3, 10
UNLIKE = "failed its parity gate"


@dataclass(frozen=True)
class Plan:
    """How often: blocks of warm-up and timed calls. A dry run takes one of each."""

    blocks: int = BLOCKS
    warm_up: int = WARM_UP
    timed: int = TIMED


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call, and memory above what was held before."""

    median_ms: float
    spread: float
    """(third quartile - first quartile) / median: a difference inside it is a tie."""
    peak_extra_mib: float
    calls: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def device() -> torch.device:
    """The GPU, or the CPU for a dry run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def interleave(contenders: dict[str, Callable[[], object]], plan: Plan) -> dict[str, Times]:
    """Time each contender in every block, A B C A B C ..., so that drift hits all alike."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    peaks = dict.fromkeys(contenders, 0.0)
    for _ in range(plan.blocks):
        for name, call in contenders.items():
            for _ in range(plan.warm_up):
                call()
            peaks[name] = max(peaks[name], _peak_extra_mib(call))
            found[name] += [_milliseconds(call) for _ in range(plan.timed)]
    return {name: _times(values, peaks[name]) for name, values in found.items()}


def _times(values: list[float], peak: float) -> Times:
    median = statistics.median(values)
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [median] * 3
    spread = (quartiles[2] - quartiles[0]) / median if median else 0.0
    return Times(round(median, 4), round(spread, 4), round(peak, 1), len(values))


def _milliseconds(call: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        start = time.process_time()
        call()
        return (time.process_time() - start) * 1e3
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    elapsed: float = first.elapsed_time(last)
    return elapsed


def _peak_extra_mib(call: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        call()
        return 0.0
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def _significant(rate: float) -> float:
    """Four digits, however slow the machine: others divide by it."""
    return float(f"{rate:.4g}")


def ceilings(plan: Plan) -> dict[str, float]:
    """What this machine reaches: bf16 matmul TFLOP/s at 8192^3, and copy TB/s (read and write)."""
    tiny = not torch.cuda.is_available()
    n, length = (128, 2**16) if tiny else (8192, 2**29)
    a, b = (torch.randn(n, n, device=device(), dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(length, device=device(), dtype=torch.bfloat16)
    target = torch.empty_like(source)
    times = interleave({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, plan)
    return {
        "matmul_tflops": _significant(2 * n**3 / times["matmul"].median_ms / 1e9),
        "copy_tb_s": _significant(2 * 2 * length / times["copy"].median_ms / 1e9),
    }


def agreement(
    got: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], *, least: float = 0.999
) -> dict[str, float | bool]:
    """The parity gate: cosine of all gradients together, and the relative error of the loss."""
    shared = [name for name in truth if name != "loss"]
    dot = sum(float((got[n].double() * truth[n].double()).sum()) for n in shared)
    norms = [sum(float(t[n].double().square().sum()) for n in shared) ** 0.5 for t in (got, truth)]
    cosine = dot / (norms[0] * norms[1]) if all(norms) else 0.0
    loss = abs(float(got["loss"]) - float(truth["loss"])) / max(abs(float(truth["loss"])), 1e-9)
    return {
        "gradient_cosine": round(cosine, 6),
        "loss_error": round(loss, 6),
        "passed": cosine > least and loss < 1e-2,
    }


def failure(error: Exception) -> str:
    """Why a contender has no number, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or ["?"]
    return f"failed: {type(error).__name__}: {lines[0][:300]}"
