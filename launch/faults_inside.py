"""Faults that come from within a rank, struck by `tuneloom.launch.injected`: F10, F11, F13, F14."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from tuneloom.errors import DONE, TRAINING
from tuneloom.launch.drill_lab import EVERY, HANG_SECONDS, Figures, Lab, Run, figures
from tuneloom.launch.injected import SPIKE_STEPS
from tuneloom.testing import Gang, chat_rows, free_port, metrics, small_config

WINDOW = 20
CLEAN_RUNS, CLEAN_STEPS = 5, 2000


class Pair(Run):
    """Two ranks as torchrun starts them, one of them with a fault in it."""

    def __init__(
        self, lab: Lab, run_id: str, fault: str, rank: int, step: int, *more: str
    ) -> None:  # fmt: skip
        self.lab, self.folder = lab, lab.folder / "runs" / run_id
        self.started = time.monotonic()
        self.log = lab.folder / f"{run_id}.log"
        command = [sys.executable, "-m", "tuneloom.launch.injected", fault, str(rank), str(step),
                   *lab.overrides(self.folder), *more]  # fmt: skip
        meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        with self.log.open("ab") as log:
            self.process, self.peer = (
                subprocess.Popen(
                    command, stdout=log, stderr=log, cwd=lab.folder,
                    env=os.environ | meeting
                    | {"RANK": str(r), "LOCAL_RANK": str(r), "OMP_NUM_THREADS": "1"},
                )
                for r in range(2)
            )  # fmt: skip

    def ends(self) -> list[int]:
        """Exit codes of both."""
        return [self.end(), self.peer.wait(60)]

    def said(self) -> str:
        return self.log.read_text(errors="replace")


def not_a_number(lab: Lab, rng: random.Random) -> Iterator[Figures]:
    """F10: one bad step on one rank, then bad steps without end."""
    at = rng.randrange(EVERY + 2, 3 * EVERY)
    run = Pair(lab, "f10", "nan", 1, at)
    codes = run.ends()
    skipped = [row["step"] for row in run.rows() if row["train/skipped"]]
    later = [row["train/loss"] for row in run.rows() if row["step"] > at]
    finite = (
        all(loss == loss and abs(loss) < 100 for loss in later) and len(later) == lab.steps - at
    )
    yield figures(lab, run, "F10", "NaN loss on one rank in one step: skipped on both, logged",
                  codes, [DONE, DONE], lost=0, exact=False,
                  held=skipped == [at] and finite)  # fmt: skip
    run = Pair(lab, "f10-on", "nans", 1, at)
    codes, last = run.ends(), run.step
    named = "train.max_bad_steps" in run.said()
    again = Run(lab, "f10-on")
    end = again.end()
    lost = last - again.resumed_from()
    yield figures(lab, again, "F10", "NaN loss on one rank in every step, then the cause is gone",
                  [*codes, end], [TRAINING, TRAINING, DONE], lost=lost, held=named)  # fmt: skip


def spiking(lab: Lab, rng: random.Random) -> list[Figures]:
    """F11: the learning rate is too large for three steps, three times; five clean runs."""
    caught = early = 0
    for number in range(3):
        at = rng.randrange(70, 100)
        run = Pair(lab, f"f11-{number}", "spike", 0, at)
        codes = run.ends()
        named = [row["step"] for row in run.rows() if "train/spike" in row]
        caught += any(at <= step <= at + SPIKE_STEPS + 1 for step in named)
        early += sum(step < at for step in named)
    gang = Gang(1)
    chat_rows(lab.folder / "many.jsonl", 480)
    for seed in range(CLEAN_RUNS):
        settings = {"steps": CLEAN_STEPS, "seed": seed, "epochs": 1e6, "batch__tokens": 256,
                    "data__path": str(lab.folder / "many.jsonl"), "optim__lr": 2e-3}  # fmt: skip
        config = small_config(lab.folder, f"f11-clean-{seed}", **settings)
        gang.fit(config, timeout_seconds=900)
        rows = metrics(lab.folder, f"f11-clean-{seed}", "train/spike")
        early += len(rows)
    gang.close()
    what = (f"learning rate x 100 for {SPIKE_STEPS} steps: {caught} of 3 named, {early} false "
            f"alarms in {CLEAN_RUNS} clean runs of {CLEAN_STEPS} steps")  # fmt: skip
    return [Figures("F11", what, ", ".join(map(str, codes)), 0, None, 0, 0, lab.orphans(),
                    codes == [DONE, DONE] and caught == 3 and not early)]  # fmt: skip


def desynchronised(lab: Lab, rng: random.Random) -> list[Figures]:
    """F13: a rank calls another collective; both call sites are in the report."""
    at = rng.randrange(EVERY + 2, 2 * EVERY)
    run = Pair(lab, "f13", "crossed", rng.randrange(2), at, f"train.hang_seconds={HANG_SECONDS}")
    codes, last = run.ends(), at - 1
    steps, report_file = run.folder / "metrics.jsonl", run.folder / "hang/report.json"
    found = report_file.stat().st_mtime - json.loads(steps.read_text().splitlines()[-1])["at"]
    report = json.loads(report_file.read_text(encoding="utf-8"))
    sites = all(f"rank {r} on" in report["sentence"] for r in range(2))
    named = report["kind"] == "mismatched collective" and report["ranks"] == [0, 1] and sites
    again = Run(lab, "f13")
    end = again.end()
    lost = last - again.resumed_from()
    what = f"a rank in another collective, train.hang_seconds={HANG_SECONDS}; seconds to the report"
    return [figures(lab, again, "F13", what, [*codes, end], [TRAINING, TRAINING, DONE], lost=lost,
                    seconds=found, held=named)]  # fmt: skip


def straggler(lab: Lab, rng: random.Random) -> list[Figures]:
    """F14: 40 ms more in every forward pass of a rank from a step on."""
    at, rank = rng.randrange(WINDOW + 1, 3 * WINDOW), rng.randrange(2)
    run = Pair(lab, "f14", "slow", rank, at)
    codes = run.ends()
    lines = [line for line in run.said().splitlines() if line.startswith("straggler: ")]
    named = [line for line in lines if f"rank {rank} on" in line]
    clean = Run(lab, "f14-clean", f"steps={CLEAN_STEPS}", "checkpoint.every=500")
    ended = clean.end()
    innocent = sum("straggler: " in line for line in _said(clean)) + len(lines) - len(named)
    what = (f"40 ms more a forward pass on a rank: named {len(named)} time, "
            f"{innocent} false alarms, these steps and {clean.step} clean ones")  # fmt: skip
    held = len(named) == 1 and not innocent and clean.step == CLEAN_STEPS
    return [figures(lab, run, "F14", what, [*codes, ended], [DONE] * 3, lost=0, held=held)]


def clock_set_back(lab: Lab, rng: random.Random) -> list[Figures]:
    """F20: the time of day jumps; no second of the ledger does."""
    run = Pair(lab, "f20-clock", "clock", 1, rng.randrange(EVERY, 2 * EVERY))
    codes = run.ends()
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    seconds = [v for row in rows for k, v in row.items() if k.startswith("time/")]
    booked = min(seconds) >= 0 and sum(seconds) < 600
    speeds = all(row["speed/tokens_per_second"] > 0 for row in run.rows())
    return [figures(lab, run, "F20", "the clock put back by an hour", codes, [DONE, DONE], lost=0,
                    held=booked and speeds)]  # fmt: skip


def _said(run: Run) -> list[str]:
    return run.log.read_text(errors="replace").splitlines()


FAULTS: dict[str, Callable[[Lab, random.Random], Iterable[Figures]]] = {
    "F10": not_a_number, "F11": spiking, "F13": desynchronised, "F14": straggler,
}  # fmt: skip
