"""`python -m benchmarks.recovery [--victims worker host shrunk driver]`: seconds from a kill -9 to
the next new step (B3).

Ours, bare Ray Train V2 and torchrun, in turn, on one tiny model, loop and checkpoints: two gloo
ranks, a checkpoint every 10 steps, struck between two saves. What differs is who notices, and how
long it takes to start again. Wall time, as that is what is lost; read the ratio, which was taken in
one run.

    worker  one rank; ours in a run's first minute and later, when a second gang waits
            (`launch.standby`)
    host    all processes of one of two hosts (network namespaces, a Ray cluster over both); one in
            its place joins 3 s later. Until that host's Ray has a process for a rank nobody can do
            anything, so those seconds are told apart. torchrun has no part in this: its hosts are
            started by hand
    shrunk  the same host, and none in its place: both go on with the rank that is left (ours by
            `launch.min_workers=1`, Ray Train by `ScalingConfig(num_workers=(1, 2))`)
    driver  the command alone (torchrun's agent); the same command again once all that the first
            one started is gone, at the latest after 20 s; seconds from the second start

Victims that are not named keep their figures in results/recovery.json.
"""

import argparse
import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.launchers import Started
from benchmarks.record import RESULTS, made, write
from tuneloom.launch.drill_lab import EVERY, Lab
from tuneloom.launch.hosts import Hosts

REPLACED_SECONDS = 3.0
"""After the death of a host, as in drill F3."""
Trial = dict[str, Any]


def worker_struck(lab: Lab, launcher: str, run_id: str, rng: random.Random) -> Trial:
    """Kill one rank; seconds to the next new step, and how many steps were done again."""
    run = Started(lab, launcher, run_id)
    run.wait_for_step(2 * EVERY)
    if launcher == "tuneloom":
        run.wait_for(lambda: b"wait beside the run" in run.log.read_bytes(), "a standby gang")
    run.wait_for_step(between_saves(run, rng))
    ranks = run.ranks()
    assert len(ranks) == 2, f"{launcher}: {len(ranks)} ranks found"
    inode = run.inode()
    os.kill(rng.choice(ranks), signal.SIGKILL)
    trial = until_new_step(run, time.monotonic(), run.step, inode)
    run.sweep()
    return trial


def host_struck(lab: Lab, launcher: str, run_id: str, rng: random.Random) -> Trial:
    """Kill all of host b, have one in its place; on a cluster of its own."""
    with Hosts() as hosts:
        run = Started(lab, launcher, run_id, hosts)
        run.wait_for_step(2 * EVERY)
        run.wait_for_step(between_saves(run, rng))
        inode = run.inode()
        hosts.kill("b")
        struck, at, last = time.monotonic(), time.time(), run.step
        time.sleep(REPLACED_SECONDS)
        hosts.start("b")
        trial = until_new_step(run, struck, last, inode)
        begun = min(psutil.Process(pid).create_time() for pid in run.ranks_among(hosts.pids("b")))
        trial["seconds_until_a_rank"] = round(begun - at, 2)
        run.sweep()
    return trial


def host_lost(lab: Lab, launcher: str, run_id: str, rng: random.Random) -> Trial:
    """Kill all of host b for good; both have joined before the run starts, or it would be small."""
    with Hosts() as hosts:
        joined = hosts.folder / "b.log"
        while not (joined.exists() and b"Ray runtime started" in joined.read_bytes()):
            time.sleep(0.1)
        run = Started(lab, launcher, run_id, hosts, shrinks=True)
        run.wait_for_step(2 * EVERY)
        run.wait_for_step(between_saves(run, rng))
        inode = run.inode()
        hosts.kill("b")
        trial = until_new_step(run, time.monotonic(), run.step, inode)
        run.sweep()
    return trial


def driver_struck(lab: Lab, launcher: str, run_id: str, rng: random.Random) -> Trial:
    """Kill the command, start it again; what lived on goes on training until it is gone."""
    run = Started(lab, launcher, run_id)
    run.wait_for_step(2 * EVERY)
    run.wait_for_step(between_saves(run, rng))
    gone, orphans = run.kill_driver()
    last, inode = run.step, run.inode()
    again = Started(lab, launcher, run_id)
    trial = until_new_step(again, again.started, last, inode)
    again.sweep()
    return trial | {"seconds_until_gone": round(gone, 2), "orphans": orphans}


def between_saves(run: Started, rng: random.Random) -> int:
    """A step after the next save and well before the one that follows."""
    return run.step // EVERY * EVERY + EVERY + rng.randrange(3, EVERY - 2)


def until_new_step(run: Started, since: float, last: int, inode: int) -> Trial:
    """Seconds from `since`, and steps up to `last` that were done again."""
    run.wait_for_new_step(inode)
    seconds = time.monotonic() - since
    return {"seconds": round(seconds, 2), "steps_lost": last - run.resumed_from()}


Strike = Callable[[Lab, str, str, random.Random], Trial]
VICTIMS: dict[str, tuple[Strike, list[str]]] = {
    "worker": (worker_struck, ["tuneloom", "tuneloom_first_minute", "ray_train", "torchrun"]),
    "host": (host_struck, ["tuneloom", "ray_train"]),
    "shrunk": (host_lost, ["tuneloom", "ray_train"]),
    "driver": (driver_struck, ["tuneloom", "ray_train", "torchrun"]),
}


def measured(lab: Lab, victim: str, count: int, seed: int) -> dict[str, Any]:
    """All launchers in turn, `count` times, so that a busy moment weighs on all alike."""
    strike, launchers = VICTIMS[victim]
    rng = random.Random(f"{seed} {victim}")
    trials: dict[str, list[Trial]] = {launcher: [] for launcher in launchers}
    for number in range(count):
        for launcher in launchers:
            trials[launcher].append(strike(lab, launcher, f"{victim}-{launcher}-{number}", rng))
            print(victim, launcher, trials[launcher][-1], flush=True)
    median = {k: statistics.median(t["seconds"] for t in v) for k, v in trials.items()}
    found = {"trials": trials, "median_seconds": median, "ratios": ratios_of(median), "seed": seed}
    if victim == "host":
        own = {
            k: statistics.median(t["seconds"] - t["seconds_until_a_rank"] for t in v)
            for k, v in trials.items()
        }
        found["ratios_from_a_rank_on"] = ratios_of(own)
    return found | {"made": made()}


def ratios_of(median: dict[str, float]) -> dict[str, float]:
    """Ours over each peer's."""
    return {
        f"{ours}_over_{peer}": round(median[ours] / median[peer], 3)
        for ours in median if ours.startswith("tuneloom")
        for peer in median if not peer.startswith("tuneloom")
    }  # fmt: skip


def main() -> None:
    """Strike the victims that are named, all without names, and keep the figures of the others."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery")
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=list(VICTIMS))
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of recovery.json")
    given = parser.parse_args()
    for victim in given.victims:
        with tempfile.TemporaryDirectory(prefix="recovery-") as folder:
            found = measured(Lab(Path(folder)), victim, given.trials, given.seed)
        path = given.out / "recovery.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        victims = before.get("victims", {}) | {victim: found}
        write("recovery", {"victims": victims}, seed=given.seed, folder=given.out)
        print(victim, json.dumps(found["ratios"]), path, flush=True)


if __name__ == "__main__":
    main()
