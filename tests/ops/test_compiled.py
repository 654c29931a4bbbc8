"""Every Triton kernel, compiled without a GPU for sm_80, sm_90a and sm_100: no spills, known size.

Registers, stack and shared memory are read from the cubin by the cuobjdump that Triton brings.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tuneloom.kernels import linear_cross_entropy, rms_norm, rope, swiglu
from tuneloom.kernels.jit import INTERPRETING, Kernel

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")

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


TURN = {"WIDTH": 128, "HALF": 64, "Q_HEADS": 32, "K_HEADS": 8, "HALF_BLOCK": 64, "REST_BLOCK": 1}
CASES = {
    "cross entropy, V 128256": Case(
        linear_cross_entropy._cross_entropy_kernel,
        {"CAPPED": False, "GRADIENT": True, "BLOCK": 4096}, 8, 128,
        ("logits", "labels", "losses"), ("softcap",), (("labels", "i64"), ("losses", "fp32")),
    ),
    "cross entropy, capped": Case(
        linear_cross_entropy._cross_entropy_kernel,
        {"CAPPED": True, "GRADIENT": True, "BLOCK": 4096}, 8, 128,
        ("logits", "labels", "losses"), ("softcap",), (("labels", "i64"), ("losses", "fp32")),
    ),
    "RMSNorm with residual, D 4096": Case(
        rms_norm._forward_kernel, {"ROWS": 1, "BLOCK": 4096, "RESIDUAL": True}, 8, 128,
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
    "SwiGLU": Case(
        swiglu._forward_kernel, {"ACTIVATION": 0, "BLOCK": 2048}, 8, 64, ("gate", "up", "h"),
    ),
    "SwiGLU backward": Case(
        swiglu._backward_kernel, {"ACTIVATION": 0, "BLOCK": 2048}, 8, 64,
        ("dh", "gate", "up", "dgate", "dup"),
    ),
    "GeGLU by erf, backward": Case(
        swiglu._backward_kernel, {"ACTIVATION": 1, "BLOCK": 2048}, 8, 64,
        ("dh", "gate", "up", "dgate", "dup"),
    ),
    "GeGLU by tanh, backward": Case(
        swiglu._backward_kernel, {"ACTIVATION": 2, "BLOCK": 2048}, 8, 64,
        ("dh", "gate", "up", "dgate", "dup"),
    ),
}  # fmt: skip


def compiled(case: Case, capability: int) -> Any:
    """As a launch compiles it whose pointers, sizes and strides are multiples of 16."""
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


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL of a cubin."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_fits_the_registers_without_spilling(
    name: str, target: str, tmp_path: Path
) -> None:
    case = CASES[name]
    binary = compiled(case, TARGETS[target])
    assert f".target {target}" in binary.asm["ptx"]
    used = resources(binary.asm["cubin"], tmp_path)
    assert used["REG"] <= case.registers, used
    assert used["STACK"] <= case.spilled and used["LOCAL"] == 0, used
    # Of 227 KiB (sm_90): reductions across warps, and dw turned into the layout of its store.
    assert binary.metadata.shared <= 16 * 1024
    assert "ld.global" in binary.asm["ptx"]


@pytest.mark.parametrize("name", ["SwiGLU", "RMSNorm with residual, D 4096"])
def test_loads_are_vectorised_to_16_bytes(name: str) -> None:
    assert "ld.global.v4.b32" in compiled(CASES[name], 90).asm["ptx"]
