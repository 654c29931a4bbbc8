"""`python -m tuneloom.launch.drill [F1 F2 ...] [--seed N] [--out FILE]`: real faults on real runs.

A tiny model is trained by `tuneloom train` on two ranks, uninterrupted once and then once a fault;
docs/faults.md says what each fault cost. Exit 0 when every bar held, 5 when one did not.
"""

import argparse
import json
import os
import platform
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tuneloom.errors import DONE, TRAINING, ConfigError, TuneloomError
from tuneloom.launch import (
    faults,
    faults_around,
    faults_files,
    faults_hangs,
    faults_inside,
    faults_signals,
    faults_tracker,
)
from tuneloom.launch.drill_lab import EVERY, MOST_SECONDS, STEPS, Figures, Lab, in_time

FAULTS = (
    faults.FAULTS | faults_signals.FAULTS | faults_files.FAULTS | faults_inside.FAULTS
    | faults_hangs.FAULTS | faults_tracker.FAULTS | faults_around.FAULTS
)  # fmt: skip
REPORT = Path(__file__).resolve().parent.parent / "docs" / "faults.md"
HEADER = """\
# What a fault costs

Measured by `python -m tuneloom.launch.drill` on {machine}
where a row names no other, shared with other
work: a tiny Llama, LoRA, ZeRO-2, two gloo ranks, {steps} steps, a checkpoint every {every}, where
the row says nothing else (F8: 30 steps; F16: 3,000). They run under `launch=local`; as bare
processes, as torchrun starts them, under F8, F10, F11, F13, F14, the clock of F20 and the rows of
F5 and F12 that count, but for F5's of the driver; on two network namespaces as hosts (launch=ray,
both share the files) under F3, F17, the second row of F16 and a soak that says so. Signals, a full
disk, a cut cable, a killed store, a control group without memory are real; F10, F11, F13, F14, the
twenty hangs of F12 and the clock of F20 are put into a rank by `tuneloom.launch.injected`.
Lost are steps that were done again. Seconds run from the fault to the first new step, where the row
says nothing else (F4: from the second start of the command). Bits are those of all losses as
float64 against the uninterrupted run; samples are those that were missing or came twice.
Each fault was struck once where no count is given, so these are existence proofs, not rates.

| fault | what | exit codes | lost | seconds | bits off | samples off | orphans | bar | seed | UTC |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | --- |
"""
FOOTER = """
Bars: at most {most} steps lost (F5, F18: none; F2, F6: {every}; F7, F8: {twice}; F19: {every} a
kill; with copies of every step: 1), no differing bit (F18, F19: losses within 1e-3; F10: a run that
skipped a step goes on otherwise), no sample missing or twice, no process left after 10 s, exit
codes of the contract; seconds: {bars}.
F8: a right resume in every shape. F9: counts, lines and reasons exact. F11: all named, no false
alarm. F12, F13: the right ranks are named. F14: the slow rank is named, no other. F15: no row
missing. F17: one holder of the run folder. F22: to the last step, bit-equal; its lost steps and
seconds are of the whole soak (`python -m tuneloom.launch.soak`).

F16: once the store has been silent for 10 s the ranks, which train on without it, are asked to
save and stop; then the command ends with 75, or with 5 where a rank went with the head's host.
Until they did they hold the lock of the run folder, so a second command is refused. Ray's client
alone would end it with exit 1 (after 60 s; measured).

F7, F8 and F9 are struck by tests besides, which count: tests/train/test_damage.py and
test_checkpoint.py; tests/data/test_bad_data.py, test_hostile_rows.py and test_dirty.py.

Not struck here: a Ray whose store is kept in Redis (F16); a slow NFS (F20: no kernel of this
machine delays writes to a mount); NCCL, GPUs out of memory, ECC.
"""


def main(argv: list[str] | None = None) -> int:
    """Drill the faults that are named, all without names, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m tuneloom.launch.drill")
    parser.add_argument("faults", nargs="*", help=f"of {', '.join(FAULTS)}; all when none is named")
    parser.add_argument("--seed", type=int, default=0, help="decides steps, ranks and bits struck")
    parser.add_argument("--out", type=Path, default=REPORT, help="the table (docs/faults.md)")
    given = parser.parse_args(argv)
    held = True
    try:
        for figure in drill(given.faults or list(FAULTS), given.seed):
            print(figure, flush=True)
            held = held and figure.held
            # After each, so that a drill that cannot go on leaves what it measured.
            book(given.out, figure, given.seed)
    except TuneloomError as error:
        print(f"drill: {error}", file=sys.stderr)
        return error.exit_code
    return DONE if held else TRAINING


def drill(names: list[str], seed: int) -> Iterator[Figures]:
    """Strike each fault in a temporary folder; raises ConfigError for a fault without a drill."""
    if "F22" in names:
        raise ConfigError("faults: F22 takes half an hour; it is python -m tuneloom.launch.soak")
    unknown = [name for name in names if name not in FAULTS]
    if unknown:
        raise ConfigError(f"faults: no drill for {unknown[0]}; there are {', '.join(FAULTS)}")
    with tempfile.TemporaryDirectory(prefix="drill-") as folder:
        lab = Lab(Path(folder))
        try:
            for name in names:
                for figure in FAULTS[name](lab, random.Random(f"{seed} {name}")):
                    held = figure.held and in_time(figure.fault, figure.seconds)
                    yield replace(figure, held=held)
        finally:
            lab.sweep()


def book(out: Path, figure: Figures, seed: int) -> None:
    """Put a figure in place of the last one of its kind and seed, beside the table and in it."""
    store = out.with_suffix(".json")
    kept: list[dict[str, Any]] = json.loads(store.read_text("utf-8")) if store.exists() else []
    new = {**asdict(figure), "seed": seed, "machine": this_machine(),
           "date": time.strftime("%d %b %Y %H:%M", time.gmtime())}  # fmt: skip
    kept = [k for k in kept if identity(k) != identity(new)] + [new]
    kept.sort(key=lambda k: (int(k["fault"][1:]), kind(k["what"]), k["seed"]))
    store.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    out.write_text(table(kept), encoding="utf-8")


def this_machine() -> str:
    """As a row names it."""
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"


def identity(k: dict[str, Any]) -> tuple[str, str, int]:
    """Rows that share it are of the same fault, struck alike."""
    return k["fault"], kind(k["what"]), k["seed"]


def kind(what: str) -> str:
    """What was struck, without the numbers that were measured of it."""
    return re.sub(r"[+-]?\d[\d.]*", "#", what.split(":")[0])


def table(kept: list[dict[str, Any]]) -> str:
    """docs/faults.md."""
    machine = Counter(k["machine"] for k in kept).most_common(1)[0][0]
    head = HEADER.format(machine=machine, steps=STEPS, every=EVERY)
    bars = ", ".join(f"{fault} {seconds:.0f}" for fault, seconds in MOST_SECONDS.items())
    foot = FOOTER.format(most=EVERY - 1, every=EVERY, twice=2 * EVERY - 1, bars=bars)
    struck = {k["fault"] + counted for k in kept for counted in ("", _times(k["what"]))}
    absent = ", ".join(name for name in FAULTS if re.sub(r"x\d+", "x", name) not in struck)
    rows = "".join(row(k, machine) for k in kept)
    return head + rows + foot + (f"\nNo row yet: {absent}.\n" if absent else "")


def _times(what: str) -> str:
    """`x` for a row that counts its trials, as the name of its drill has one: F12x20."""
    return "x" if re.search(r"\d of \d", what) else ""


def row(k: dict[str, Any], most: str) -> str:
    """One line of the table, which names a machine that is not that of most."""
    what = k["what"] + ("" if k["machine"] == most else f" (on {k['machine']})")
    lost = "" if k["steps_lost"] is None else k["steps_lost"]
    seconds = "" if k["seconds"] is None else f"{k['seconds']:.1f}"
    held = k["held"] and in_time(k["fault"], k["seconds"])
    cells = [k["fault"], what, k["exit_codes"], lost, seconds, k["differing_bits"],
             k["samples_off"], k["orphans"], "held" if held else "**missed**", k["seed"],
             k["date"]]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |\n"


if __name__ == "__main__":
    sys.exit(main())
