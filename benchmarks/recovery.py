"""`python -m benchmarks.recovery`: seconds from a killed rank to the next new step (B3).

Ours, in a run's first minute and later, when a second gang waits (`launch.standby`), bare Ray
Train V2 and torchrun, in turn, on one tiny model, loop and checkpoints: two gloo ranks, a
checkpoint every 10 steps, `kill -9` of one rank between two saves. What differs is who notices,
and how long it takes to start again. Wall time, as that is what is lost; read the ratio, which was
taken in one run.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.record import write
from tuneloom.launch.drill_lab import EVERY, Lab, Run, command_of
from tuneloom.testing import small_config

ROOT = Path(__file__).resolve().parents[1]
STEPS = 10_000
VICTIMS = {
    "tuneloom": b"Worker.run", "tuneloom_first_minute": b"Worker.run", "ray_train": b"TrainWorker",
    "torchrun": b"-m\0tuneloom.train\0run.root",
}  # fmt: skip
"""Words in the command line of a rank."""


class Started(Run):
    """One run under one launcher."""

    def __init__(self, lab: Lab, launcher: str, run_id: str) -> None:
        self.lab, self.folder = lab, lab.folder / "runs" / run_id
        self.launcher = launcher
        self.log = lab.folder / f"{run_id}.log"
        path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(run_id), stdout=log, stderr=log, cwd=lab.folder, env=environment
            )

    def command(self, run_id: str) -> list[str]:
        endless = (f"steps={STEPS}", f"epochs={STEPS}")
        keys = [
            k for k in self.lab.overrides(self.folder) if not k.startswith(("steps=", "epochs="))
        ]
        keys.extend(endless)
        if self.launcher.startswith("tuneloom"):
            return [sys.executable, "-m", "tuneloom", "train", *keys]
        if self.launcher == "torchrun":
            keys = [k for k in keys if not k.startswith("launch")]
            return [
                sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                "--max-restarts=3", "-m", "tuneloom.train", *keys,
            ]  # fmt: skip
        config = small_config(
            self.lab.folder,
            run_id,
            steps=STEPS,
            epochs=STEPS,
            zero__stage=2,
            checkpoint__every=EVERY,
        )
        return [sys.executable, "-m", "benchmarks.peers.ray_train_run", json.dumps(config)]

    def ranks(self) -> list[int]:
        """What the launcher started and Ray named a rank."""
        word = VICTIMS[self.launcher]
        found = [p.pid for p in psutil.Process(self.process.pid).children(recursive=True)]
        return [pid for pid in found if word in command_of(pid)]

    def sweep(self) -> None:
        """End the launcher and all that it started."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            process.kill()
        self.process.kill()
        self.process.wait()


def struck(lab: Lab, launcher: str, run_id: str, rng: random.Random) -> dict[str, Any]:
    """Kill one rank; seconds to the next new step, and how many steps were done again."""
    run = Started(lab, launcher, run_id)
    run.wait_for_step(2 * EVERY)
    if launcher == "tuneloom":
        run.wait_for(lambda: b"wait beside the run" in run.log.read_bytes(), "a standby gang")
    run.wait_for_step(run.step // EVERY * EVERY + EVERY + rng.randrange(3, EVERY - 2))
    ranks = run.ranks()
    assert len(ranks) == 2, f"{launcher}: {len(ranks)} ranks found"
    inode = run.inode()
    os.kill(rng.choice(ranks), signal.SIGKILL)
    started, last = time.monotonic(), run.step
    run.wait_for_new_step(inode)
    seconds = time.monotonic() - started
    lost = last - run.resumed_from()
    run.sweep()
    return {"seconds": round(seconds, 2), "steps_lost": lost}


def main() -> None:
    """All launchers in turn, `--trials` times, so that a busy moment weighs on all alike."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    trials: dict[str, list[dict[str, Any]]] = {launcher: [] for launcher in VICTIMS}
    with tempfile.TemporaryDirectory(prefix="recovery-") as folder:
        lab = Lab(Path(folder))
        for trial in range(given.trials):
            for launcher in VICTIMS:
                trials[launcher].append(struck(lab, launcher, f"{launcher}-{trial}", rng))
                print(launcher, trials[launcher][-1], flush=True)
    median = {k: statistics.median(t["seconds"] for t in v) for k, v in trials.items()}
    ratios = {
        f"{ours}_over_{peer}": round(median[ours] / median[peer], 3)
        for ours in median if ours.startswith("tuneloom")
        for peer in median if not peer.startswith("tuneloom")
    }  # fmt: skip
    result = {"trials": trials, "median_seconds": median, "ratios": ratios}
    print(json.dumps(ratios), write("recovery", result, seed=given.seed))


if __name__ == "__main__":
    main()
