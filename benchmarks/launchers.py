"""One run under one launcher, for `benchmarks.recovery`: ours, bare Ray Train V2 or torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tuneloom.launch.drill_lab import EVERY, Lab, Run, command_of
from tuneloom.launch.hosts import Hosts
from tuneloom.testing import small_config

ROOT = Path(__file__).resolve().parents[1]
STEPS = 10_000
GONE_SECONDS = 20.0
"""How long what a dead driver left may live until it is killed here."""
RANK = {
    "tuneloom": b"Worker.run", "tuneloom_first_minute": b"Worker.run", "ray_train": b"TrainWorker",
    "torchrun": b"-m\0tuneloom.train\0run.root",
}  # fmt: skip
"""Words in the command line of a rank."""


class Started(Run):
    """One run; on `hosts` where they are given, which may shrink to one, else on this machine."""

    def __init__(
        self, lab: Lab, launcher: str, run_id: str, hosts: Hosts | None = None, *,
        shrinks: bool = False,
    ) -> None:  # fmt: skip
        self.lab, self.folder = lab, lab.folder / "runs" / run_id
        self.launcher, self.log = launcher, lab.folder / f"{run_id}.log"
        self.shrinks = shrinks
        path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
        environment = dict(hosts.command if hosts else os.environ)
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        prefix = hosts.inside("a") if hosts else []
        self.started = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, *self.command(run_id, on_hosts=hosts is not None)],
                stdout=log, stderr=log, cwd=lab.folder, env=environment,
            )  # fmt: skip

    def command(self, run_id: str, *, on_hosts: bool) -> list[str]:
        """Words that start it; the same words go on with it."""
        endless = (f"steps={STEPS}", f"epochs={STEPS}")
        keys = [
            k for k in self.lab.overrides(self.folder) if not k.startswith(("steps=", "epochs="))
        ]
        keys.extend(endless)
        if self.launcher.startswith("tuneloom"):
            spread = ["launch.kind=ray", "launch.nodes=2"] if on_hosts else []
            if self.shrinks:
                spread += ["launch.min_workers=1", "launch.wait_seconds=0.1"]
            return [sys.executable, "-m", "tuneloom", "train", *keys, *spread]
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
        least = ["1"] if self.shrinks else []
        return [sys.executable, "-m", "benchmarks.peers.ray_train_run", json.dumps(config), *least]

    def below(self) -> list[psutil.Process]:
        """All that the launcher started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def ranks(self) -> list[int]:
        """What the launcher started and Ray named a rank."""
        return self.ranks_among([p.pid for p in self.below()])

    def ranks_among(self, pids: list[int]) -> list[int]:
        """Those of these processes."""
        return [pid for pid in pids if RANK[self.launcher] in command_of(pid)]

    def kill_driver(self) -> tuple[float, int]:
        """kill -9 of the command alone; seconds until all it started is gone, and how many had to
        be killed after 20 s.
        """
        left = self.below()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        killed = time.monotonic()
        _, alive = psutil.wait_procs(left, timeout=GONE_SECONDS)
        seconds = time.monotonic() - killed
        for process in alive:
            process.kill()
        psutil.wait_procs(alive)
        return seconds, len(alive)

    def sweep(self) -> None:
        """End the launcher and all that it started."""
        for process in self.below():
            process.kill()
        self.process.kill()
        self.process.wait()
