"""Every Triton kernel, compiled without a GPU for sm_80, sm_90a and sm_100: no spills."""

from __future__ import annotations

import pytest

from benchmarks.kernels import CASES, TARGETS, compiled, resources
from tuneloom.kernels.jit import INTERPRETING

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")


@pytest.mark.parametrize(
    ("name", "target"), [(name, target) for name, case in CASES.items() for target in case.targets]
)
def test_a_kernel_fits_the_registers_without_spilling(name: str, target: str) -> None:
    case = CASES[name]
    binary = compiled(case, TARGETS[target])
    assert f".target {target}" in binary.asm["ptx"]
    used = resources(binary.asm["cubin"])
    assert used["REG"] <= case.registers, used
    assert used["STACK"] <= case.spilled and used["LOCAL"] == 0, used
    # Of 227 KiB (sm_90): reductions across warps, and dw turned into the layout of its store.
    assert binary.metadata.shared <= 16 * 1024


@pytest.mark.parametrize(
    "name", ["SwiGLU", "RMSNorm with residual, D 4096", "FP8 of a row, D 4096"]
)
def test_loads_are_vectorised_to_16_bytes(name: str) -> None:
    assert "ld.global.v4.b32" in compiled(CASES[name], 90).asm["ptx"]
