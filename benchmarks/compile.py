"""What torch.compile costs before the first step and gives after it, on a CPU.

    python -m benchmarks.compile

The tiny base with LoRA r=16 in fp32, packs of 2,048 tokens, each of other documents, trained plain
and with `model.compile=true` (train/compiled.py). Every trial is a process of its own with an empty
Inductor cache; steps are CPU-seconds of forward, backward and optimizer, plain and compiled in
turns, after two of warm-up.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 2


def trial(steps: int, tokens: int) -> dict[str, Any]:
    """Cold start, and CPU-seconds a step of both ways, in this process."""
    import torch

    from tuneloom.train import compiled

    torch.set_num_threads(1)
    device = torch.device("cpu")
    networks = {way: _network(way == "compiled", device) for way in ("plain", "compiled")}
    generator = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {way: [] for way in networks}
    losses: dict[str, list[float]] = {way: [] for way in networks}
    first = 0.0
    for index in range(WARM_UP + steps):
        micro = _pack(generator, tokens)
        for way, (network, optimizer) in networks.items():
            began, cpu = time.perf_counter(), time.process_time()
            losses[way].append(_step(network, optimizer, micro))
            if index == 0 and way == "compiled":
                first = time.perf_counter() - began
            if index >= WARM_UP:
                seconds[way].append(time.process_time() - cpu)
    gap = max(abs(a - b) / a for a, b in zip(losses["plain"], losses["compiled"], strict=True))
    medians = {way: round(statistics.median(values), 4) for way, values in seconds.items()}
    return {
        "first_step_seconds": round(first, 2), "graphs": compiled.cost().graphs,
        "compile_seconds": compiled.cost().seconds, "largest_loss_gap": gap,
        "cpu_seconds_a_step": medians,
        "plain / compiled": round(medians["plain"] / medians["compiled"], 3),
    }  # fmt: skip


def _network(compile_layers: bool, device: Any) -> tuple[Any, Any]:
    import torch

    from tuneloom.train import compiled, method, model
    from tuneloom.train.config import MethodConfig, ModelConfig

    base = ROOT / "examples" / "tiny-base"
    config = ModelConfig(path=str(base), dtype="fp32", compile=compile_layers)
    network: Any = model.load(base, config, MethodConfig(kind="lora"), device, seed=0)
    network = method.apply(network, MethodConfig(kind="lora")).train()
    compiled.install(network, config, device)
    trained = [p for p in network.parameters() if p.requires_grad]
    return network, torch.optim.AdamW(trained, lr=1e-3)


def _pack(generator: np.random.Generator, tokens: int) -> Any:
    """Documents of 20 to 400 random tokens, as many as fit."""
    from tuneloom.train.batches import collate

    examples = []
    left = tokens
    while left >= 20:
        length = min(left, int(generator.integers(20, 400)))
        examples.append(
            (generator.integers(6, 300, length).astype(np.int32), np.ones(length, bool))
        )
        left -= length
    return collate(range(len(examples)), examples, packing=True)


def _step(network: Any, optimizer: Any, micro: Any) -> float:
    from tuneloom.train.loss import loss_sum

    loss = loss_sum(network, micro) / micro.target_tokens
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def main() -> int:
    """Run the trials and write benchmarks/results/compile.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--print", action="store_true", help="print, write nothing")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(trial(arguments.steps, arguments.tokens)))
        return 0
    trials = [_fresh(arguments.steps, arguments.tokens) for _ in range(arguments.trials)]
    result = {
        "shape": "examples/tiny-base, LoRA r=16, fp32, 1 thread",
        "tokens": arguments.tokens, "trials": trials,
        "median": {
            key: statistics.median(t[key] for t in trials)
            for key in ("first_step_seconds", "compile_seconds", "plain / compiled")
        },
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if not arguments.print:
        print(record.write("compile", result, seed=0))
    return 0


def _fresh(steps: int, tokens: int) -> dict[str, Any]:
    """A trial in a process of its own, whose compiler has compiled nothing yet."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "benchmarks.compile", "--inside"]
        command += ["--steps", str(steps), "--tokens", str(tokens)]
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True
        )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())
