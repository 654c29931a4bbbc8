"""`python -m benchmarks.first_step`: CPU-seconds from a process's start to its first step (B3).

Ours, inline and under Ray, beside TRL's SFTTrainer at its defaults, packed like ours, and
streaming (benchmarks/peers/trl_first_step.py), on the same raw texts, tokenizer and tiny base, by
LoRA. CPU-seconds of the process and all its children, read when the file that says `step 1`
appears; contenders take turns, so that a busy machine weighs on all alike. No token cache is there
beforehand. Ray alone, with an actor that does nothing, is what no code of ours can save under Ray.
Writes benchmarks/results/first_step.json.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.record import RESULTS, commit, write

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "examples" / "tiny-base"
OURS = ("tuneloom inline", "tuneloom with Ray")
RAY = "Ray alone"
PEERS = ("defaults", "packed", "streaming")
LAUNCH = dict(zip(OURS, ("inline", "local"), strict=True))
TARGETS = {20_000: 0.35, 200_000: 0.06}
"""Of TRL's CPU-seconds, packed like ours."""
AN_EMPTY_ACTOR = """
import pathlib, ray, sys, time

@ray.remote
class Empty:
    def answer(self):
        return None

ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20)
empty = Empty.remote()
ray.get(empty.answer.remote())
pathlib.Path(sys.argv[1], "step").touch()
time.sleep(60)
"""
"""As `launch.supervise` starts Ray for one rank."""


def write_rows(path: Path, count: int, seed: int) -> Path:
    """Texts of 20 to 400 words that the tiny tokenizer knows whole, so about as many tokens."""
    vocabulary = json.loads((BASE / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    words = sorted(t[1:] for t in vocabulary if t[0] == "Ġ" and t[1:].isalpha())
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            text = " ".join(rng.choices(words, k=rng.randint(20, 400)))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def command(who: str, rows: Path, folder: Path) -> tuple[list[str], Path]:
    """What to run, and the file that is there once step 1 is done."""
    if who in OURS:
        keys = [
            f"launch={LAUNCH[who]}", "model=tiny_base", f"model.path={BASE}", "objective=pretrain",
            f"data.path={rows}", "data.validation=null", "batch.max_length=512",
            "batch.tokens=1024", "batch.over_length=truncate", "steps=1000", "tracker=off",
            f"run.root={folder}", "run.id=first",
        ]  # fmt: skip
        told = folder / "first" / "metrics.jsonl"
        return [sys.executable, "-m", "tuneloom", "train", *keys], told
    if who == RAY:
        return [sys.executable, "-c", AN_EMPTY_ACTOR, str(folder)], folder / "step"
    script = ROOT / "benchmarks" / "peers" / "trl_first_step.py"
    return [sys.executable, str(script), who, str(BASE), str(rows), str(folder)], folder / "step"


def to_first_step(who: str, rows: Path) -> dict[str, float]:
    """CPU and wall seconds to step 1; everything that was started is ended again."""
    folder = Path(tempfile.mkdtemp(prefix="first-step-"))
    words, told = command(who, rows, folder)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (folder / "log").open("wb") as log:
        started = time.monotonic()
        process = psutil.Popen(
            words, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        while not (told.exists() and (told.name == "step" or told.stat().st_size)):
            if process.poll() is not None:
                raise RuntimeError(f"{who} ended: {(folder / 'log').read_text('utf-8')[-2000:]}")
            time.sleep(0.02)
        return {"cpu": cpu_of(process), "wall": time.monotonic() - started}
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


def cpu_of(process: psutil.Process) -> float:
    """User and system seconds of a process, of its living children, and of those that ended."""
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += sum(one.cpu_times()[:4])  # own and ended children's, user and system
        except psutil.NoSuchProcess:
            continue  # ended between the list and the look: its parent's children_* have it
    return total


def end(process: psutil.Process) -> None:
    """Kill the process and its children, and wait for them."""
    try:
        every = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for one in every:
        try:
            one.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(every, timeout=10)


def contenders(count: int) -> tuple[str, ...]:
    """All, but at 200,000 rows TRL's defaults, which tokenise as `packed` does."""
    return (*OURS, RAY, *PEERS) if count <= 20_000 else (*OURS, RAY, "packed", "streaming")


def compare(count: int, trials: int, seed: int, who: tuple[str, ...]) -> dict[str, Any]:
    """All contenders in turn on `count` rows: medians, spreads, and ours over each peer's."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in who}
    with tempfile.TemporaryDirectory(prefix="first-step-rows-") as folder:
        rows = write_rows(Path(folder) / "rows.jsonl", count, seed)
        for _ in range(trials):
            for name in who:
                found[name].append(to_first_step(name, rows))
                print(count, name, found[name][-1], flush=True)
    cpu = {name: statistics.median(t["cpu"] for t in each) for name, each in found.items()}
    return {
        "rows": count, "trials": trials,
        "cpu_seconds": {name: round(value, 2) for name, value in cpu.items()},
        "cpu_range": {n: _range([t["cpu"] for t in each]) for n, each in found.items()},
        "wall_seconds": {n: round(statistics.median(t["wall"] for t in each), 2)
                         for n, each in found.items()},
        "ours_over_trl": {o: {p: round(cpu[o] / cpu[p], 3) for p in who if p in PEERS}
                          for o in who if o in OURS},
        "target": TARGETS.get(count),
    }  # fmt: skip


def _range(values: list[float]) -> list[float]:
    return [round(min(values), 2), round(max(values), 2)]


def main() -> None:
    """1,000, 20,000 and 200,000 rows; the last size once, as TRL takes minutes there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_step")
    parser.add_argument("--rows", type=int, nargs="*", default=[1_000, 20_000, 200_000])
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sizes = [size for size in measured() if size["rows"] not in given.rows]
    for count in given.rows:
        trials = given.trials if count <= 20_000 else 1
        size = compare(count, trials, given.seed, contenders(count))
        sizes.append({**size, "commit": commit(), "load": round(os.getloadavg()[0], 1)})
        print(count, json.dumps(size["ours_over_trl"]), "target", size["target"])
        sizes.sort(key=lambda each: each["rows"])
        print(write("first_step", {"sizes": sizes}, seed=given.seed), flush=True)


def measured() -> list[dict[str, Any]]:
    """Sizes of an earlier call; those not asked for now are kept, each with its own commit."""
    path = RESULTS / "first_step.json"
    return json.loads(path.read_text("utf-8"))["sizes"] if path.exists() else []


if __name__ == "__main__":
    main()
