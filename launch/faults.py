"""The faults that `tuneloom.launch.drill` strikes real runs with, and what each did to one."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tuneloom.errors import DONE, STOPPED, TRAINING
from tuneloom.launch.drill_lab import EVERY, HANG_SECONDS, Figures, Lab, Run, figures
from tuneloom.launch.hosts import REPLACED_SECONDS, Hosts
from tuneloom.train import checkpoint

Fault = Callable[[Lab, random.Random], Iterable[Figures]]


COPIED = ", with copies of every step in memory"


def worker_killed(lab: Lab, rng: random.Random) -> Iterator[Figures]:
    for more, most in (("", EVERY - 1), (COPIED, 1)):
        run = Run(lab, f"f1-{most}", f"checkpoint.memory_every={1 if more else 0}")
        run.wait_for_step(rng.randrange(EVERY + 2, 3 * EVERY))
        what = "kill -9 of a rank between saves" + more
        yield _after_a_lost_worker(lab, run, rng, "F1", what, most)


def killed_inside_a_save(lab: Lab, rng: random.Random) -> list[Figures]:
    run = Run(lab, "f2")
    run.wait_for_step(EVERY + 1)
    run.wait_for_save()
    return [_after_a_lost_worker(lab, run, rng, "F2", "kill -9 of a rank inside a save", EVERY)]


def _after_a_lost_worker(
    lab: Lab, run: Run, rng: random.Random, fault: str, what: str, most: int
) -> Figures:
    inode, rank = run.inode(), rng.choice(run.ranks())
    os.kill(rank, signal.SIGKILL)
    struck, last = time.monotonic(), run.step
    run.wait_for_new_step(inode)
    seconds = time.monotonic() - struck
    lost = last - run.resumed_from()
    return figures(
        lab, run, fault, what, [run.end()], [DONE], lost=lost, seconds=seconds, held=lost <= most
    )


def host_killed(lab: Lab, rng: random.Random) -> Iterator[Figures]:
    """All of a host dies; another takes its place 3 s later."""
    yield _host_killed(lab, rng, "", EVERY - 1)
    yield _host_killed(lab, rng, COPIED, 1)


def _host_killed(lab: Lab, rng: random.Random, more: str, most: int) -> Figures:
    with Hosts() as hosts:
        run = Run(
            lab, f"f3-{most}", "launch.kind=ray", "launch.nodes=2",
            f"checkpoint.memory_every={1 if more else 0}", prefix=hosts.inside("a"),
            environment=hosts.command,
        )  # fmt: skip
        # Early between two saves: the kill itself takes a few steps, and a death inside a save (F2)
        # may cost one whole interval.
        run.wait_for_step(rng.choice((EVERY, 2 * EVERY)) + rng.randrange(1, 4))
        inode = run.inode()
        hosts.kill("b")
        struck, last = time.monotonic(), run.step
        time.sleep(REPLACED_SECONDS)
        hosts.start("b")
        run.wait_for_new_step(inode)
        seconds = time.monotonic() - struck
        lost, code = last - run.resumed_from(), run.end()
        left = hosts.orphans()
        what = "kill -9 of a whole host between saves, replaced 3 s later" + more
        return figures(
            lab, run, "F3", what, [code], [DONE], lost=lost, seconds=seconds, orphans=left,
            held=lost <= most,
        )  # fmt: skip


def driver_killed(lab: Lab, rng: random.Random) -> list[Figures]:
    run = Run(lab, "f4")
    run.wait_for_step(rng.randrange(EVERY + 2, 2 * EVERY))
    run.process.kill()
    code, orphans = run.end(), lab.orphans()
    last = run.step  # ranks go on until Ray misses their driver
    again, inode = Run(lab, "f4"), run.inode()
    again.wait_for_new_step(inode)
    seconds = time.monotonic() - again.started
    lost = last - again.resumed_from()
    return [figures(lab, again, "F4", "kill -9 of the driver, same command again",
                     [code, again.end()], [-signal.SIGKILL, DONE], lost=lost, seconds=seconds,
                     orphans=orphans)]  # fmt: skip


def terminated(lab: Lab, rng: random.Random) -> Iterator[Figures]:
    """SIGTERM in five ways; after each the same command runs to the end."""

    def driver(run: Run) -> None:
        run.process.terminate()

    def one_rank(run: Run) -> None:
        os.kill(rng.choice(run.ranks()), signal.SIGTERM)

    def all_ranks(run: Run) -> None:
        for rank in run.ranks():
            os.kill(rank, signal.SIGTERM)
            time.sleep(rng.random() / 10)

    def twice_in_a_save(run: Run) -> None:
        run.wait_for_save()
        run.process.terminate()
        time.sleep(0.3)
        run.process.terminate()

    ways: list[tuple[str, Callable[[Run], None], int]] = [
        ("to one rank", one_rank, EVERY + 2), ("to all ranks", all_ranks, EVERY + 2),
        ("to the driver, twice, in a save", twice_in_a_save, EVERY + 1),
        ("to the driver while ranks start", driver, 0), ("to the driver", driver, EVERY + 2),
    ]  # fmt: skip
    for number, way in enumerate(ways):
        yield _terminated(lab, f"f5-{number}", *way)


def _terminated(
    lab: Lab, run_id: str, way: str, strike: Callable[[Run], None], step: int
) -> Figures:
    run = Run(lab, run_id)
    if step:
        run.wait_for_step(step)
    else:
        run.wait_for(run.ranks, "ranks")
    struck = time.monotonic()
    strike(run)
    code = run.end()
    seconds, last = time.monotonic() - struck, run.step
    again = Run(lab, run_id)
    end = again.end()
    lost = last - again.resumed_from()
    return figures(lab, again, "F5", f"SIGTERM {way}; seconds to exit", [code, end],
                    [STOPPED, DONE], lost=lost, seconds=seconds)  # fmt: skip


def disk_full(lab: Lab, rng: random.Random) -> list[Figures]:
    """On a tmpfs that something else fills but for 100 kB; then it goes, and the same command."""
    with tmpfs(lab.folder / "small", 16 << 20) as root:
        run = Run(lab, "f6", root=root)
        run.wait_for_step(EVERY + 2)
        ballast = root / "ballast"
        ballast.write_bytes(bytes(max(0, shutil.disk_usage(root).free - 100_000)))
        code, last = run.end(), run.step
        said = run.log.read_text(errors="replace")
        intact = checkpoint.newest(root / "f6" / "checkpoints")
        no_torn = not list(root.glob("f6/checkpoints/.torn*"))
        ballast.unlink()
        again = Run(lab, "f6", root=root)
        end = again.end()
        lost = last - again.resumed_from()
        clear = "disk full" in said and "bytes free" in said and intact is not None and no_torn
        return [figures(lab, again, "F6", "disk full in a save, then room again", [code, end],
                         [TRAINING, DONE], lost=lost, held=clear)]  # fmt: skip


@contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[Path]:
    """A small disk of its own; needs root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def bit_flipped(lab: Lab, rng: random.Random) -> list[Figures]:
    """The newest checkpoint of a stopped run loses one bit; the same command goes on."""
    run = Run(lab, "f7")
    run.wait_for_step(2 * EVERY + 1)
    run.process.terminate()
    code, last = run.end(), run.step
    newest = checkpoint.ordered(run.folder / "checkpoints")[-1]
    shard = rng.choice(sorted((newest / checkpoint.ENGINE).glob("*.pt")))
    content = bytearray(shard.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    shard.write_bytes(content)
    again = Run(lab, "f7")
    end = again.end()
    lost = last - again.resumed_from()
    shutil.rmtree(run.folder / "checkpoints" / f"damaged-{newest.name}")
    return [figures(lab, again, "F7", "one bit of a shard flipped", [code, end],
                     [STOPPED, DONE], lost=lost)]  # fmt: skip


def other_world(lab: Lab, rng: random.Random) -> list[Figures]:
    """Stopped on two ranks, resumed on one with the same global batch: close, not equal."""
    run = Run(lab, "f18")
    run.wait_for_step(EVERY + 2)
    run.process.terminate()
    code, last = run.end(), run.step
    again = Run(lab, "f18", "launch.workers=1")
    end = again.end()
    lost = last - again.resumed_from()
    ours, wanted = ({r["step"]: r["train/loss"] for r in x.rows()} for x in (again, lab.reference))
    near = all(abs(ours[s] - loss) <= 1e-3 * abs(loss) for s, loss in wanted.items())
    found = figures(lab, again, "F18", "two ranks, then one; losses within 1e-3", [code, end],
                       [STOPPED, DONE], lost=lost, exact=False, held=near)  # fmt: skip
    return [found]


def killed_in_epochs(lab: Lab, rng: random.Random) -> list[Figures]:
    """F19: all of a run dies three times in the middle of an epoch, on 2, 1 and 2 ranks; the fourth
    command, on 1, ends it.
    """
    lost = last = inode = 0
    for number, workers in enumerate((2, 1, 2, 1)):
        run = Run(lab, "f19", f"launch.workers={workers}")
        if number:
            run.wait_for_new_step(inode)
            lost += last - run.resumed_from()
        if number == 3:
            break
        run.wait_for_step(2 * EVERY * number + rng.randrange(EVERY + 2, 2 * EVERY))
        for pid in (*run.ranks(), run.process.pid):
            os.kill(pid, signal.SIGKILL)
        run.end()
        lab.orphans()
        last, inode = run.step, run.inode()
    end = run.end()
    ours, wanted = ({r["step"]: r["train/loss"] for r in x.rows()} for x in (run, lab.reference))
    near = all(abs(ours[s] - loss) <= 1e-3 * abs(loss) for s, loss in wanted.items())
    what = "all of a run killed 3 times in an epoch, on 2, 1, 2 ranks, then 1; losses within 1e-3"
    return [figures(lab, run, "F19", what, [end], [DONE], lost=lost, exact=False, held=near)]


def hung(lab: Lab, rng: random.Random) -> list[Figures]:
    """A rank is stopped, not killed: found by the watchdog, by name, and replaced."""
    run = Run(lab, "f12", f"train.hang_seconds={HANG_SECONDS}")
    run.wait_for_step(rng.randrange(EVERY + 2, 3 * EVERY))
    ranks = run.ranks()
    inode, victim = run.inode(), rng.choice(ranks)
    os.kill(victim, signal.SIGSTOP)
    struck, last = time.monotonic(), run.step
    report = run.folder / "hang" / "report.json"
    run.wait_for(report.exists, "a report")
    found = time.monotonic() - struck
    run.wait_for_new_step(inode)
    seconds = time.monotonic() - struck
    said = json.loads(report.read_text(encoding="utf-8"))
    named = said["kind"] == "missing rank" and len(said["ranks"]) == 1
    lost = last - run.resumed_from()
    what = (f"a rank stopped (SIGSTOP), train.hang_seconds={HANG_SECONDS}: a new step after "
            f"{seconds:.1f} s; seconds to the report")  # fmt: skip
    return [figures(lab, run, "F12", what, [run.end()], [DONE], lost=lost, seconds=found,
                     held=named)]  # fmt: skip


FAULTS: dict[str, Fault] = {
    "F1": worker_killed, "F3": host_killed, "F4": driver_killed, "F6": disk_full,
    "F2": killed_inside_a_save, "F7": bit_flipped, "F18": other_world,
    "F19": killed_in_epochs, "F5": terminated,
    "F12": hung,
}  # fmt: skip
