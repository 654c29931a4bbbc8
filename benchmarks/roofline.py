"""Where each op of an 8B LoRA step stands under an H200's roof: arithmetic, not a measurement.

    python -m benchmarks.roofline      # writes results/roofline.json and docs/roofline.svg

FLOPs and bytes of forward and backward of T = 8192 tokens through one layer (and the head), counted
from shapes; the roof is 790 TFLOP/s bf16 (best achievable matmul, stas00/ml-engineering) and 4.3
TB/s (copy). The least milliseconds of a step are what `python -m benchmarks.gpu` must approach.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks import record

TFLOPS, TB_S = 790.0, 4.3
TOKENS, LENGTH = 8192, 4096
WIDTH, INNER, KV, CLASSES, LAYERS, RANK = 4096, 14336, 1024, 128256, 32, 16
BF16 = 2


def ops() -> dict[str, tuple[float, float, int]]:
    """Op -> FLOPs, bytes moved, times a step; LoRA on a frozen base, head frozen."""
    linear = WIDTH * (2 * WIDTH + 2 * KV) + 3 * WIDTH * INNER
    adapters = RANK * (2 * (WIDTH + WIDTH) + 2 * (WIDTH + KV) + 3 * (WIDTH + INNER))
    inputs = 2 * WIDTH + WIDTH + INNER  # read once a group: qkv, o, gate and up, down
    outputs = 2 * WIDTH + 2 * KV + 2 * INNER + WIDTH
    heads = WIDTH + KV
    return {
        "linears with adapters": (
            TOKENS * (4 * linear + 6 * adapters),
            BF16 * (2 * linear + 2 * TOKENS * (inputs + outputs)),
            LAYERS,
        ),
        "attention": (
            TOKENS * 6 * LENGTH * WIDTH,
            BF16 * TOKENS * 3 * (2 * WIDTH + 2 * KV),
            LAYERS,
        ),
        "add + RMSNorm": (TOKENS * 12 * WIDTH, BF16 * TOKENS * 8 * WIDTH, 2 * LAYERS),
        "RoPE": (TOKENS * 6 * heads, BF16 * TOKENS * 4 * heads, LAYERS),
        "SwiGLU": (TOKENS * 15 * INNER, BF16 * TOKENS * 8 * INNER, LAYERS),
        "recomputed by the diet": (
            TOKENS * (4 * 2 * WIDTH + 6 * INNER),
            BF16 * TOKENS * (2 * 2 * WIDTH + 3 * INNER),
            LAYERS,
        ),
        "head products": (
            TOKENS * 4 * WIDTH * CLASSES,
            BF16 * (2 * WIDTH * CLASSES + 2 * TOKENS * (WIDTH + CLASSES)),
            1,
        ),
        "cross-entropy pass": (TOKENS * 8 * CLASSES, BF16 * TOKENS * 2 * CLASSES, 1),
    }


def run() -> dict[str, Any]:
    """Intensity and least time of each op, and of the step."""
    rows = {}
    for name, (flops, moved, times) in ops().items():
        least = max(flops / TFLOPS / 1e12, moved / TB_S / 1e12) * times
        rows[name] = {
            "flops_per_byte": round(flops / moved, 2),
            "bound": "matmul" if flops / moved > TFLOPS / TB_S else "memory",
            "least_ms_a_step": round(least * 1e3, 2),
        }
    total = sum(row["least_ms_a_step"] for row in rows.values())
    return {
        "roof": {"tflops": TFLOPS, "tb_s": TB_S},
        "tokens": TOKENS,
        "length": LENGTH,
        "ops": rows,
        "step_ms": round(total, 1),
        "tokens_per_second": round(TOKENS / total * 1e3),
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """The roof, and each op at its intensity on it."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "roofline"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    intensities = [0.25 * 2**i for i in range(15)]
    axes.plot(intensities, [min(TFLOPS, TB_S * x) for x in intensities], color="black")
    for name, row in result["ops"].items():
        x = row["flops_per_byte"]
        y = min(TFLOPS, TB_S * x)
        axes.plot([x], [y], "o", color="tab:red" if row["bound"] == "memory" else "tab:blue")
        label = f"{name}: {row['least_ms_a_step']:.1f} ms"
        axes.annotate(label, (x, y), (6, -12), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="TFLOP/s under the roof")
    axes.set_title("8B LoRA step of 8,192 tokens on an H200: limits, not measurements", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    """Write the figures and the picture."""
    argparse.ArgumentParser(description=__doc__.split("\n", 1)[0]).parse_args()
    result = run()
    path = record.write("roofline", result, seed=0)
    draw(result, Path(__file__).parents[1] / "docs" / "roofline.svg")
    print(path, result["step_ms"], "ms", result["tokens_per_second"], "tokens/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
