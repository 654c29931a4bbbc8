"""B7, the loss head: ours, transformers, torch.compile, Liger, CCE, and the bare products.

Forward and backward of T hidden rows and a (V, D) head. The limit is the matrix products alone, in
the same run: two for a frozen head, three for a trained one, on the rows that carry a label.
"""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.timing import UNLIKE, Plan, agreement, device, failure, interleave
from tuneloom.kernels.linear_cross_entropy import IGNORED, linear_cross_entropy


@dataclass(frozen=True)
class Shape:
    """T rows of width D against V classes; a share of rows without label."""

    tokens: int
    width: int
    classes: int
    trained: bool
    ignored: float


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
PEERS = ("transformers", "torch.compile", "Liger", "CCE", "CCE, torch.compile")


def shapes(dry: bool) -> list[Shape]:
    """B7's shapes, or one tiny of each kind."""
    llama = [(tokens, 4096, 128256) for tokens in (4096, 8192, 16384)]
    sizes = [(64, 32, 503)] if dry else [*llama, (8192, 1024, 151936)]
    kinds = [(trained, ignored) for trained in (False, True) for ignored in (0.0, 0.5)]
    return [Shape(*size, *kind) for size in sizes for kind in kinds]


def run(plan: Plan, dry: bool) -> dict[str, Any]:
    """Every shape; a contender that float32 agrees with is timed."""
    return {"shapes": [_shape(shape, plan) for shape in shapes(dry)]}


def _shape(shape: Shape, plan: Plan) -> dict[str, Any]:
    torch.manual_seed(0)
    kind = torch.bfloat16
    hidden = torch.randn(shape.tokens, shape.width, device=device(), dtype=kind)
    weight = torch.randn(shape.classes, shape.width, device=device(), dtype=kind) * 0.02
    labels = torch.randint(0, shape.classes, (shape.tokens,), device=device())
    labels[: int(shape.tokens * shape.ignored)] = IGNORED
    hidden.requires_grad_()
    weight.requires_grad_(shape.trained)
    truth = _step(_exact, hidden, weight, labels)
    losses = contenders(labels)
    gates: dict[str, Any] = {}
    calls: dict[str, Callable[[], object]] = {}
    not_run = {name: "needs to be installed, and a GPU" for name in PEERS if name not in losses}
    for name, loss in losses.items():
        try:
            gates[name] = agreement(_step(loss, hidden, weight, labels), truth)
        except Exception as error:
            not_run[name] = failure(error)
            if name.startswith("ours") and not isinstance(error, torch.OutOfMemoryError):
                traceback.print_exception(error)
            continue
        if gates[name]["passed"]:
            calls[name] = _call(loss, hidden, weight, labels)
        else:
            not_run[name] = UNLIKE
    calls["limit: products alone"] = _products(hidden, weight, labels, shape.trained)
    times = interleave(calls, plan)
    limit = times["limit: products alone"].median_ms
    return {
        **vars(shape),
        "parity": gates,
        "not_run": not_run,
        "times": {name: t.as_dict() for name, t in times.items()},
        "of_limit": {name: round(limit / t.median_ms, 4) for name, t in times.items()},
    }


def contenders(labels: Tensor) -> dict[str, Loss]:
    """Ours, with and without the positions known beforehand, and every peer that is installed."""
    kept = torch.nonzero(labels != IGNORED).squeeze(1)
    found: dict[str, Loss] = {
        "ours": lambda h, w, y: linear_cross_entropy(h, w, y, kept=kept),
        "ours, positions found": linear_cross_entropy,
        "transformers": _plain,
    }
    if not torch.cuda.is_available():
        return found
    torch.compiler.reset()  # at its second size a function would be compiled for any size
    found["torch.compile"] = torch.compile(_plain, dynamic=False)
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction as Liger,
        )

        def liger(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
            loss: Tensor = Liger.apply(h, w, y, None, None, IGNORED, 0.0, 0.0, "sum")[0]
            return loss

        found["Liger"] = liger
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cce

        found["CCE"] = lambda h, w, y: cce(h, w, y, reduction="sum")
        found["CCE, torch.compile"] = lambda h, w, y: cce(
            h, w, y, reduction="sum", impl="torch_compile"
        )
    return found


def _plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = functional.linear(hidden, weight).float()
    return functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def _exact(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The truth: float32 logits, a slice at a time."""
    parts = zip(hidden.split(1024), labels.split(1024), strict=True)
    losses = [_plain(h.float(), weight.float(), y) for h, y in parts]
    return torch.stack(losses).sum()


def _step(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> dict[str, Tensor]:
    leaves = [t for t in (hidden, weight) if t.requires_grad]
    value = loss(hidden, weight, labels)
    gradients = torch.autograd.grad(value, leaves)
    return {"loss": value.detach(), **{str(i): g for i, g in enumerate(gradients)}}


def _call(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> Callable[[], object]:
    return lambda: _step(loss, hidden, weight, labels)


def _products(
    hidden: Tensor, weight: Tensor, labels: Tensor, trained: bool
) -> Callable[[], object]:
    rows = hidden.detach()[labels != IGNORED]
    head = weight.detach()
    logits = rows @ head.t()

    def products() -> None:
        rows @ head.t()
        logits @ head
        if trained:
            logits.t() @ rows

    return products
