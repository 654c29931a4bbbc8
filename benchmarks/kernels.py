"""What a CPU can tell of kernels: registers, spills, the loss head's CPU-seconds, FP8's rounding.

    python -m benchmarks.kernels

Compiled for sm_80, sm_90a and sm_100 by Triton's own ptxas, resources read from the cubin; FP8 has
no instructions on sm_80. The loss head runs on the CPU, ours against the full logits in the same
process, as CPU-seconds. FP8 is emulated there: what it does to a product and to logits of the
shipped base, on the first records of the shipped data.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks import record
from tuneloom.kernels import fp8, linear_cross_entropy, rms_norm, rope, swiglu
from tuneloom.kernels.jit import Kernel

EXAMPLES = Path(__file__).parents[1] / "examples"
RECORDS = 64
"""Of the shipped data, whose logits are compared."""
TARGETS = {"sm_80": 80, "sm_90a": 90, "sm_100": 100}


@dataclass(frozen=True)
class Case:
    """A kernel at the constants of a shape that matters."""

    kernel: Kernel
    constants: dict[str, Any]
    warps: int
    registers: int
    """At most this many a thread: 64 keeps 1,024 threads on an SM, 128 keeps 512."""
    pointers: tuple[str, ...]
    floats: tuple[str, ...] = ()
    """Scalars; all other arguments are int32."""
    kinds: tuple[tuple[str, str], ...] = ()
    """Pointers that are not bf16."""
    spilled: int = 0
    """Bytes of stack a thread may use: none, but where the case says why."""
    targets: tuple[str, ...] = tuple(TARGETS)


HOPPER = ("sm_90a", "sm_100")
"""What has e4m3 in its instructions."""
TURN = {"WIDTH": 128, "HALF": 64, "Q_HEADS": 32, "K_HEADS": 8, "HALF_BLOCK": 64, "REST_BLOCK": 1}
PART = {"WIDTH": 80, "HALF": 16, "Q_HEADS": 32, "K_HEADS": 32, "HALF_BLOCK": 16, "REST_BLOCK": 64}
"""Phi-2."""
CASES = {
    "cross entropy, V 128256": Case(
        linear_cross_entropy._cross_entropy_kernel,
        {"CAPPED": False, "GRADIENT": True, "BLOCK": 4096}, 8, 128,
        ("logits", "labels", "losses"), ("softcap",), (("labels", "i64"), ("losses", "fp32")),
    ),
    "cross entropy, loss only": Case(
        linear_cross_entropy._cross_entropy_kernel,
        {"CAPPED": False, "GRADIENT": False, "BLOCK": 4096}, 8, 128,
        ("logits", "labels", "losses"), ("softcap",), (("labels", "i64"), ("losses", "fp32")),
    ),
    "cross entropy, capped": Case(
        linear_cross_entropy._cross_entropy_kernel,
        {"CAPPED": True, "GRADIENT": True, "BLOCK": 4096}, 8, 128,
        ("logits", "labels", "losses"), ("softcap",), (("labels", "i64"), ("losses", "fp32")),
    ),
    "cross entropy, capped, loss only": Case(
        linear_cross_entropy._cross_entropy_kernel,
        {"CAPPED": True, "GRADIENT": False, "BLOCK": 4096}, 8, 128,
        ("logits", "labels", "losses"), ("softcap",), (("labels", "i64"), ("losses", "fp32")),
    ),
    "RMSNorm, D 4096": Case(
        rms_norm._forward_kernel, {"ROWS": 1, "BLOCK": 4096, "RESIDUAL": False}, 8, 128,
        ("x", "residual", "weight", "y", "total", "scale"), ("eps", "offset"),
        (("scale", "fp32"),),
    ),
    "RMSNorm with residual, D 4096": Case(
        rms_norm._forward_kernel, {"ROWS": 1, "BLOCK": 4096, "RESIDUAL": True}, 8, 128,
        ("x", "residual", "weight", "y", "total", "scale"), ("eps", "offset"),
        (("scale", "fp32"),),
    ),
    "RMSNorm with residual, D 8192": Case(
        rms_norm._forward_kernel, {"ROWS": 1, "BLOCK": 8192, "RESIDUAL": True}, 16, 128,
        ("x", "residual", "weight", "y", "total", "scale"), ("eps", "offset"),
        (("scale", "fp32"),),
    ),
    "RMSNorm with residual, D 16384": Case(
        rms_norm._forward_kernel, {"ROWS": 1, "BLOCK": 16384, "RESIDUAL": True}, 16, 128,
        ("x", "residual", "weight", "y", "total", "scale"), ("eps", "offset"),
        (("scale", "fp32"),),
    ),
    "RMSNorm of heads, C 128": Case(
        rms_norm._forward_kernel, {"ROWS": 16, "BLOCK": 128, "RESIDUAL": False}, 1, 128,
        ("x", "residual", "weight", "y", "total", "scale"), ("eps", "offset"),
        (("scale", "fp32"),),
    ),
    "RMSNorm backward, frozen weight": Case(
        rms_norm._backward_kernel, {"BLOCK": 4096, "RESIDUAL": True, "WEIGHT": False}, 8, 128,
        ("dy", "total", "weight", "scale", "dtotal", "ds", "partial"), ("offset",),
        (("scale", "fp32"), ("partial", "fp32")),
    ),
    "RMSNorm backward, trained weight": Case(
        rms_norm._backward_kernel, {"BLOCK": 4096, "RESIDUAL": True, "WEIGHT": True}, 8, 128,
        ("dy", "total", "weight", "scale", "dtotal", "ds", "partial"), ("offset",),
        (("scale", "fp32"), ("partial", "fp32")),
    ),
    "RMSNorm backward, frozen weight, no residual": Case(
        rms_norm._backward_kernel, {"BLOCK": 4096, "RESIDUAL": False, "WEIGHT": False}, 8, 128,
        ("dy", "total", "weight", "scale", "dtotal", "ds", "partial"), ("offset",),
        (("scale", "fp32"), ("partial", "fp32")),
    ),
    "RMSNorm backward, trained weight, no residual": Case(
        rms_norm._backward_kernel, {"BLOCK": 4096, "RESIDUAL": False, "WEIGHT": True}, 8, 128,
        ("dy", "total", "weight", "scale", "dtotal", "ds", "partial"), ("offset",),
        (("scale", "fp32"), ("partial", "fp32")),
    ),
    "RMSNorm backward, D 8192": Case(
        rms_norm._backward_kernel,
        {"BLOCK": 8192, "RESIDUAL": True, "WEIGHT": True}, 16, 128,
        ("dy", "total", "weight", "scale", "dtotal", "ds", "partial"), ("offset",),
        (("scale", "fp32"), ("partial", "fp32")),
    ),
    # 512 threads may have 128 registers, and 32 numbers each of w, dw, s and dy want a few more.
    "RMSNorm backward, D 16384": Case(
        rms_norm._backward_kernel,
        {"BLOCK": 16384, "RESIDUAL": True, "WEIGHT": True}, 16, 128,
        ("dy", "total", "weight", "scale", "dtotal", "ds", "partial"), ("offset",),
        (("scale", "fp32"), ("partial", "fp32")), spilled=256,
    ),
    "RoPE, 32 and 8 heads of 128": Case(
        rope._rope_kernel, {**TURN, "BACKWARD": False}, 4, 128,
        ("q", "k", "out_q", "out_k", "cos", "sin"),
    ),
    "RoPE backward": Case(
        rope._rope_kernel, {**TURN, "BACKWARD": True}, 4, 128,
        ("q", "k", "out_q", "out_k", "cos", "sin"),
    ),
    "RoPE of 32 in 80 columns, 32 heads": Case(
        rope._rope_kernel, {**PART, "BACKWARD": False}, 4, 128,
        ("q", "k", "out_q", "out_k", "cos", "sin"),
    ),
    "RoPE of 32 in 80 columns, backward": Case(
        rope._rope_kernel, {**PART, "BACKWARD": True}, 4, 128,
        ("q", "k", "out_q", "out_k", "cos", "sin"),
    ),
    "SwiGLU": Case(
        swiglu._forward_kernel, {"ACTIVATION": 0, "BLOCK": 2048}, 8, 64, ("gate", "up", "h"),
    ),
    "SwiGLU backward": Case(
        swiglu._backward_kernel, {"ACTIVATION": 0, "BLOCK": 2048}, 8, 64,
        ("dh", "gate", "up", "dgate", "dup"),
    ),
    "GeGLU by erf": Case(
        swiglu._forward_kernel, {"ACTIVATION": 1, "BLOCK": 2048}, 8, 64, ("gate", "up", "h"),
    ),
    "GeGLU by erf, backward": Case(
        swiglu._backward_kernel, {"ACTIVATION": 1, "BLOCK": 2048}, 8, 64,
        ("dh", "gate", "up", "dgate", "dup"),
    ),
    "GeGLU by tanh": Case(
        swiglu._forward_kernel, {"ACTIVATION": 2, "BLOCK": 2048}, 8, 64, ("gate", "up", "h"),
    ),
    "GeGLU by tanh, backward": Case(
        swiglu._backward_kernel, {"ACTIVATION": 2, "BLOCK": 2048}, 8, 64,
        ("dh", "gate", "up", "dgate", "dup"),
    ),
    "FP8 of a row, D 4096": Case(
        fp8._quantise_kernel, {"COLUMNS": False, "BLOCK": 4096}, 8, 64,
        ("x", "numbers", "scale", "columns"), (),
        (("numbers", "fp8e4nv"), ("scale", "fp32"), ("columns", "fp32")), targets=HOPPER,
    ),
    "FP8 of a scaled row, D 14336": Case(
        fp8._quantise_kernel, {"COLUMNS": True, "BLOCK": 16384}, 16, 128,
        ("x", "numbers", "scale", "columns"), (),
        (("numbers", "fp8e4nv"), ("scale", "fp32"), ("columns", "fp32")), targets=HOPPER,
    ),
    # The same: 64 numbers a thread and 128 registers; twice the threads have 64 and spill, too.
    "FP8 of a row, D 28672": Case(
        fp8._quantise_kernel, {"COLUMNS": False, "BLOCK": 32768}, 16, 128,
        ("x", "numbers", "scale", "columns"), (),
        (("numbers", "fp8e4nv"), ("scale", "fp32"), ("columns", "fp32")), spilled=64,
        targets=HOPPER,
    ),
    "FP8 of a scaled row, D 28672": Case(
        fp8._quantise_kernel, {"COLUMNS": True, "BLOCK": 32768}, 16, 128,
        ("x", "numbers", "scale", "columns"), (),
        (("numbers", "fp8e4nv"), ("scale", "fp32"), ("columns", "fp32")), spilled=64,
        targets=HOPPER,
    ),
}  # fmt: skip


def compiled(case: Case, capability: int) -> Any:
    """As a launch compiles it whose pointers, sizes and strides are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function: Any = case.kernel.compiled
    kinds, signature, aligned = dict(case.kinds), {}, {}
    for index, name in enumerate(function.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
        elif name in case.pointers:
            signature[name] = f"*{kinds.get(name, 'bf16')}"
        else:
            signature[name] = "fp32" if name in case.floats else "i32"
        if signature[name] not in ("constexpr", "fp32"):
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, case.constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": case.warps})


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL of a cubin, by the cuobjdump that Triton brings."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def table() -> dict[str, dict[str, dict[str, int]]]:
    """Kernel -> target -> registers, bytes spilled, bytes of shared memory."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for name, case in CASES.items():
        for target in case.targets:
            binary = compiled(case, TARGETS[target])
            used = resources(binary.asm["cubin"])
            row = {"registers": used["REG"], "spilled": used["STACK"]}
            found.setdefault(name, {})[target] = {**row, "shared": binary.metadata.shared}
    return found


def loss_head(
    tokens: int, width: int, classes: int, *, trained: bool, ignored: float
) -> dict[str, Any]:
    """Median CPU-seconds of forward and backward over 7 interleaved rounds, and the ratio."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(classes, width, requires_grad=trained)
    labels = torch.randint(0, classes, (tokens,))
    labels[: int(tokens * ignored)] = linear_cross_entropy.IGNORED

    def full() -> torch.Tensor:
        return functional.cross_entropy(hidden @ weight.t(), labels, reduction="sum")

    def ours() -> torch.Tensor:
        return linear_cross_entropy.linear_cross_entropy(hidden, weight, labels)

    seconds: dict[str, list[float]] = {"full logits": [], "ours": []}
    for _ in range(7):
        for name, loss in (("full logits", full), ("ours", ours)):
            start = time.process_time()
            loss().backward()
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    shape = {"tokens": tokens, "width": width, "classes": classes}
    return {
        **shape,
        "trained": trained,
        "ignored": ignored,
        "cpu_seconds": {name: round(value, 4) for name, value in medians.items()},
        "spread": {
            name: round((max(v) - min(v)) / medians[name], 3) for name, v in seconds.items()
        },
        "full / ours": round(medians["full logits"] / medians["ours"], 3),
    }


def fp8_rounding() -> dict[str, Any]:
    """What FP8 does to a product of normal numbers, and to the shipped base's logits in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    x, weight = torch.randn(256, 1024), torch.randn(1024, 1024)
    exact = x @ weight.t()
    moved = fp8.product(x, fp8.hold(weight)) - exact
    lines = (EXAMPLES / "debian" / "packages.jsonl").read_text("utf-8").splitlines()[:RECORDS]
    texts = [json.loads(line)["description"] for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tiny-base")
    model: Any = AutoModelForCausalLM.from_pretrained(EXAMPLES / "tiny-base", dtype=torch.float32)
    pages = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    with torch.no_grad():
        plain = torch.cat([model(page).logits[0] for page in pages])  # (T, V)
        held = fp8.hold_linears(model)
        rounded = torch.cat([model(page).logits[0] for page in pages])
    error = (rounded - plain) / plain.std()
    return {
        "product_error_rms": round(float(moved.norm() / exact.norm()), 4),
        "tiny_base": {
            "linears": len(held),
            "tokens": len(plain),
            "logits_error_rms_over_deviation": round(float(error.square().mean().sqrt()), 4),
            "logits_error_most_over_deviation": round(float(error.abs().max()), 4),
        },
    }


def main() -> int:
    """Compile, time, and write benchmarks/results/kernels.json."""
    argparse.ArgumentParser(description=__doc__.split("\n", 1)[0]).parse_args()
    torch.set_num_threads(1)
    heads = [
        loss_head(2048, width, classes, trained=trained, ignored=ignored)
        for width, classes in ((256, 4096), (512, 32000))
        for trained in (False, True)
        for ignored in (0.0, 0.5)
    ]
    result = {"compiled": table(), "loss_head_cpu": heads, "fp8_cpu": fp8_rounding()}
    path = record.write("kernels", result, seed=0)
    for head in heads:
        print({k: head[k] for k in ("classes", "trained", "ignored", "full / ours")})
    print(result["fp8_cpu"])
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
