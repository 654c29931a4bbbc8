"""B6 to B10 on one GPU, without Ray, W&B or a network: `python -m benchmarks.gpu [NAME ...]`.

    python -m benchmarks.gpu                # what has no result for this code yet
    python -m benchmarks.gpu loss_head --again
    python -m benchmarks.gpu --dry-run      # the same code, tiny sizes, on a CPU; writes nothing

Each name is one process of its own with a limit of 9 minutes, so that a crash, a fragmented
allocator or a peer's monkey patch reaches no other. Results: benchmarks/results/gpu_NAME.json.
Needs torch >= 2.11, triton >= 3.6, transformers >= 5.17, peft and pydantic; peers are taken if
installed (liger-kernel, cut-cross-entropy, bitsandbytes, trl, unsloth), and named under `not_run`
if not; `trainers` needs this project's other packages, too, but for ray and wandb. Where there is
no package index all of them come as files: pydantic-core and phonenumbers are easily forgotten.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import record

LIMIT_SECONDS = 540
"""Ten minutes may be the limit of the whole command; what ends that one leaves a child behind."""
GRACE_SECONDS = 5
BENCHMARKS = {
    "lora_step": ("B6", "benchmarks.gpu.lora_step:run_step"),
    "trainers": ("B6", "benchmarks.gpu.trainers:run"),
    "loss_head": ("B7", "benchmarks.gpu.loss_head:run"),
    "lora_block": ("B8", "benchmarks.gpu.lora_block:run"),
    "small_06b": ("B9", "benchmarks.gpu.lora_step:run_small"),
    "small_1b": ("B9", "benchmarks.gpu.lora_step:run_1b"),
    "reach": ("B9", "benchmarks.gpu.lora_step:run_reach"),
    "low_precision": ("B10", "benchmarks.gpu.lora_step:run_low_precision"),
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(BENCHMARKS)}; all if none")
    parser.add_argument("--again", action="store_true", help="even if this code has a result")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, print, write nothing")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}; one of {list(BENCHMARKS)}")
    return arguments


def main() -> int:
    """Run each benchmark in a child; exit code 1 if one failed."""
    arguments = parse()
    if arguments.inside:
        return inside(arguments.inside, arguments.dry_run)
    import torch

    if not (arguments.dry_run or torch.cuda.is_available()):
        print("no GPU here: nothing is measured; --dry-run checks the code on the CPU")
        return 1
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    failed = 0
    for name in arguments.names or BENCHMARKS:
        if done(name) and not (arguments.again or arguments.dry_run):
            print(f"{name}: has a result for this code; --again runs it once more")
            continue
        failed += child(name, arguments.dry_run) != 0
    return 1 if failed else 0


def done(name: str) -> bool:
    """Whether results/ holds this benchmark of the code that is here."""
    path = record.RESULTS / f"gpu_{name}.json"
    if not path.exists():
        return False
    return bool(json.loads(path.read_text(encoding="utf-8"))["made"].get("code") == record.code())


def child(name: str, dry: bool) -> int:
    """One benchmark in its own process; past its limit it is ended with all that it started.

    Its temporary files, a model among them, are removed here, since it may not live to do it.
    """
    command = [sys.executable, "-m", "benchmarks.gpu", "--inside", name]
    command += ["--dry-run"] if dry else []
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as temporary:
        process = subprocess.Popen(
            command, cwd=Path(__file__).parents[2], env={**os.environ, "TMPDIR": temporary},
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"{name}: stopped after {LIMIT_SECONDS} s, no result")
            return 1
        finally:
            if process.returncode is None:  # Ctrl-C, too, does not reach a session of its own
                _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End its whole group, by force what does not end when asked."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)


def inside(name: str, dry: bool) -> int:
    """Measure, and write unless it was a dry run."""
    from benchmarks.gpu.timing import Plan

    identifier, place = BENCHMARKS[name]
    module, function = place.split(":")
    plan = Plan(blocks=1, warm_up=1, timed=1) if dry else Plan()
    result: dict[str, Any] = getattr(importlib.import_module(module), function)(plan, dry)
    if dry:
        print(f"{name} ({identifier}): dry run, numbers mean nothing")
        print(json.dumps(result)[:400])
    else:
        print(record.write(f"gpu_{name}", {"id": identifier, **result}, seed=0))
    if failed := faults(result):
        print(f"{name}: {', '.join(failed)} failed; the others have their figures")
    return 1 if failed else 0


OPS = ("rms_norm", "add_rms_norm", "rope", "swiglu")
"""Ours, beside those of peers, whose names say so."""
PARTS = ("shapes", "linears", "elementwise")
"""Lists of a result whose members were gated each by itself."""


def faults(result: dict[str, Any]) -> list[str]:
    """Ways of ours that raised or missed their gate."""
    return sorted({
        name
        for part in (result, *(each for key in PARTS for each in result.get(key, ())))
        for name, why in part.get("not_run", {}).items()
        if (name.startswith("ours") or name in OPS) and why.startswith("failed")
    })  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
