"""How the report spells times, sizes, shares and nested evidence."""

import math
from collections.abc import Callable, Sequence
from typing import Any


def mean(values: Sequence[float]) -> float:
    """Of the finite ones; NaN of none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def seconds(value: float) -> str:
    """`48 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(value)
    if whole < 60:
        return f"{value:.1f} s" if value < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """`1.2 MiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"


def flat(value: Any) -> str:
    """Nested evidence on one line."""
    if isinstance(value, dict):
        return "; ".join(f"{key.replace('_', ' ')} {flat(v)}" for key, v in value.items())
    if isinstance(value, list):
        return ", ".join(flat(item) for item in value) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def moment(stamp: str) -> str:
    """`2026-11-22 13:00 UTC` of an ISO time in UTC; anything else as it is."""
    if len(stamp) == 20 and stamp[10] == "T" and stamp.endswith("Z"):
        return f"{stamp[:10]} {stamp[11:16]} UTC"
    return stamp


FILTERS: dict[str, Callable[..., Any]] = {
    "seconds": seconds,
    "moment": moment,
    "thousands": lambda value: f"{value:,}",
    "percent": lambda share: f"{100 * share:.1f} %",
    "short": lambda digest: str(digest)[:16] if digest else "none",
}
