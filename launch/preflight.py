"""Before weights load, every rank says what it sees, and the launcher compares: exit 4 with
reasons.

`examine` and `links` run on the ranks, `verdict` on the launcher, as a pure function of what they
said. All of it takes at most `PATIENCE_SECONDS`: who has not answered by then is named, and the
launch refused, since a node whose file system stalls would hold it up without a word.
"""

import os
import shutil
import statistics
import subprocess
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tuneloom.errors import RefusedError, TuneloomError
from tuneloom.launch.machine import GIB
from tuneloom.train.config import TrainConfig
from tuneloom.train.runs import code_version, digest, environment, folder_of

SKEW_SECONDS = 2.0
"""Lock files, run ids and metrics of hosts further apart tell a wrong order."""
SHARED_MEMORY = GIB // 4
"""Docker's default of 64 MiB is what breaks NCCL and data workers."""
LINK_RATIO = 8.0
"""A link this much slower than the median holds all others up at every step."""
LINK_FLOOR_SECONDS = 0.005
"""Faster than this for one message, differences are the scheduler's."""
PATIENCE_SECONDS = 60.0
"""For everything that all ranks are asked, together."""
CLEARING_SECONDS = 2.0
MESSAGES = 5
GPU_QUERY = ("name", "ecc.errors.uncorrected.volatile.total")


@dataclass(frozen=True)
class Facts:
    """What one rank sees, before it read a weight."""

    rank: int
    host: str
    code: str
    config: str
    packages: dict[str, str | None]
    free_bytes: int
    shared_memory_bytes: int
    gpus: list[str]
    ecc_errors: int | None
    """None where nvidia-smi could not be asked, as in an image without it."""
    gpu_processes: list[str]
    base: list[tuple[str, int]]
    """Names and sizes of the base's files: nodes may hold copies of their own."""
    incomplete: dict[str, str] | None
    """Class and sentence of the error that opening model or data gave."""
    clock_skew: float = 0.0
    unseen: tuple[int, ...] = ()
    """Ranks whose file in the run folder this rank cannot read."""


def examine(config: TrainConfig, rank: int, host: str) -> Facts:
    """This rank's facts; leaves a file in the run folder for `unseen_by` of the others."""
    folder = probe_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / str(rank)).open("w", encoding="utf-8") as file:
        file.write(f"rank {rank}")
        file.flush()
        os.fsync(file.fileno())
    gpus, ecc = gpu_facts()
    base, incomplete = inputs(config)
    packages = environment()
    return Facts(
        rank=rank,
        host=host,
        code=str(code_version()["digest"]),
        config=digest(config),
        packages=packages["packages"] | {"python": packages["python"]},
        free_bytes=shutil.disk_usage(folder).free,
        shared_memory_bytes=shutil.disk_usage("/dev/shm").free,
        gpus=gpus,
        ecc_errors=ecc,
        gpu_processes=gpu_processes(),
        base=base,
        incomplete=incomplete,
    )


def probe_folder(config: TrainConfig) -> Path:
    return folder_of(config) / ".preflight"


def unseen_by(config: TrainConfig, ranks: int) -> tuple[int, ...]:
    """Ranks whose file cannot be read here, although all have written theirs."""
    folder = probe_folder(config)

    def reads(rank: int) -> bool:
        path = folder / str(rank)
        return path.is_file() and path.read_text(encoding="utf-8") == f"rank {rank}"

    return tuple(rank for rank in range(ranks) if not reads(rank))


def inputs(config: TrainConfig) -> tuple[list[tuple[str, int]], dict[str, str] | None]:
    """The base's files, and why model or data cannot be opened here without a network."""
    from huggingface_hub import constants

    from tuneloom.data.rows import open_rows
    from tuneloom.train.model import locate

    base: list[tuple[str, int]] = []
    try:
        if Path(config.model.path).is_dir() or constants.HF_HUB_OFFLINE:
            folder = locate(config.model)
            base = sorted((p.name, p.stat().st_size) for p in folder.iterdir() if p.is_file())
        open_rows(config.data.path, config.data.split, config.data.format, verify=False)
    except TuneloomError as error:
        return base, {"class": type(error).__name__, "message": str(error)}
    return base, None


def gpu_facts() -> tuple[list[str], int | None]:
    """Names of this rank's GPUs, and the uncorrected memory errors they counted since boot, which
    only nvidia-smi knows.
    """
    lines = nvidia_smi(f"--query-gpu={','.join(GPU_QUERY)}")
    if lines is None:
        import torch

        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())], None
    rows = [line.rsplit(",", 1) for line in lines]
    errors = [row[1].strip() for row in rows]
    return [row[0].strip() for row in rows], sum(int(e) for e in errors if e.isdigit())


def gpu_processes() -> list[str]:
    """Other people's processes on this rank's GPUs: nothing of ours is there yet."""
    return nvidia_smi("--query-compute-apps=pid,used_memory") or []


def nvidia_smi(query: str) -> list[str] | None:
    """Lines of an nvidia-smi query about the visible GPUs; None where it cannot be asked."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return []
    if shutil.which("nvidia-smi") is None:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    command += ["-i", visible] if visible else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        return None
    return [line for line in done.stdout.splitlines() if line.strip()]


def links(*, timeout_seconds: int) -> dict[str, float]:
    """Join the group that the environment names; seconds for a message from the rank before this
    one, and for an all-reduce, best of MESSAGES. Collective; raises RefusedError on a rank where
    the sum is wrong, and gives up on a rank that does not come after `timeout_seconds`.
    """
    import torch
    import torch.distributed as dist

    from tuneloom.train import distributed

    world = distributed.start(timeout_seconds=timeout_seconds)
    try:
        floats = (64 if world.device.type == "cuda" else 4) * 2**20
        ours = torch.full((floats,), world.rank + 1.0, device=world.device)
        theirs = torch.empty_like(ours)
        after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size

        def turn_of(sender: int) -> int:
            """So that no rank sends while it receives: it would wait for the other link, too."""
            return 2 if world.size % 2 and sender == world.size - 1 else sender % 2

        def message(turn: int) -> None:
            if turn == turn_of(world.rank):
                dist.send(ours, after)
            elif turn == turn_of(before):
                dist.recv(theirs, before)

        summed = ours.clone()
        dist.all_reduce(summed)
        expected = world.size * (world.size + 1) / 2
        if float(summed[0]) != expected or float(summed[-1]) != expected:
            raise RefusedError(
                f"all-reduce: rank {world.rank} got {float(summed[-1])} where {expected} is due"
            )
        turns = range(2 + world.size % 2 if world.size > 1 else 0)
        took = [_best(partial(message, turn), MESSAGES, world.device) for turn in turns]
        return {
            "bytes": float(floats * 4),
            "link": took[turn_of(before)] if took else 0.0,
            "all_reduce": _best(lambda: dist.all_reduce(summed), MESSAGES, world.device),
        }
    finally:
        distributed.stop()


def _best(work: Any, times: int, device: Any) -> float:
    """Seconds of the fastest of `times` calls, each started together on all ranks."""
    import torch
    import torch.distributed as dist

    seconds = []
    for _ in range(times):
        dist.barrier()
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def verdict(all_facts: list[Facts], *, gpus_per_rank: int, need_bytes: int) -> list[str]:
    """Every reason not to start, each naming its check, host and value; empty when all agree."""
    first, alike = all_facts[0], all(facts.incomplete for facts in all_facts)
    reasons = []
    for facts in all_facts:
        here = f"rank {facts.rank} on {facts.host}"
        if facts.code != first.code:
            reasons.append(f"code: {here} runs {facts.code[:12]}, rank 0 runs {first.code[:12]}; "
                           "use one checkout on a shared file system")  # fmt: skip
        if facts.config != first.config:
            reasons.append(f"config: {here} was given another config than rank 0")
        reasons += [
            f"environment: {name} is {version} for {here}, {first.packages.get(name)} for rank 0"
            for name, version in facts.packages.items() if version != first.packages.get(name)
        ]  # fmt: skip
        if facts.unseen:
            reasons.append(f"shared file system: {here} cannot read what rank(s) "
                           f"{', '.join(map(str, facts.unseen))} wrote into the run folder; set "
                           "run.root to a folder that all nodes share")  # fmt: skip
        if facts.free_bytes < need_bytes:
            reasons.append(f"free space: {facts.free_bytes / GIB:.2f} GiB for {here}, "
                           f"{need_bytes / GIB:.2f} GiB needed under run.root")  # fmt: skip
        if facts.shared_memory_bytes < SHARED_MEMORY:
            reasons.append(f"/dev/shm: {facts.shared_memory_bytes / 2**20:.0f} MiB free for "
                           f"{here}, 256 needed; containers take --shm-size=8g")  # fmt: skip
        if len(facts.gpus) < gpus_per_rank:
            reasons.append(f"GPU count: {here} sees {len(facts.gpus)}, {gpus_per_rank} expected")
        elif facts.gpus != first.gpus:
            reasons.append(f"GPU kind: {here} has {facts.gpus}, rank 0 has {first.gpus}; use "
                           "one kind, the slowest would set the pace")  # fmt: skip
        if facts.ecc_errors:
            reasons.append(f"ECC: {facts.ecc_errors} uncorrected memory errors for {here}; take "
                           "the node out, or reset the GPU")  # fmt: skip
        if facts.gpu_processes:
            reasons.append(f"GPU in use: {here} shares it with process "
                           f"{'; '.join(facts.gpu_processes)} (pid, MiB)")  # fmt: skip
        if abs(facts.clock_skew) > SKEW_SECONDS:
            reasons.append(f"clock: {here} is {facts.clock_skew:+.1f} s off; start chrony or ntpd")
        if facts.incomplete and not alike:
            reasons.append(f"inputs: {here}: {facts.incomplete['message']}")
        elif facts.base != first.base and (alike or not first.incomplete):
            differ = sorted({name for name, _ in set(facts.base) ^ set(first.base)})
            reasons.append(f"inputs: {here} has another base than rank 0: {', '.join(differ)}")
    return reasons


def slow_links(all_facts: list[Facts], seconds: list[float], size: float) -> tuple[str, list[str]]:
    """The slowest link in words, and a reason for each that is far slower than the median."""
    if len(seconds) < 2:
        return "one rank, no links", []
    typical = statistics.median_low(seconds)
    limit = LINK_RATIO * max(typical, LINK_FLOOR_SECONDS)

    def name(rank: int) -> str:
        before = all_facts[rank - 1]
        return f"{before.rank} ({before.host}) -> {rank} ({all_facts[rank].host})"

    def speed(value: float) -> str:
        return f"{size / value / 1e9:.2f} GB/s"

    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    words = f"slowest link {name(slowest)} {speed(seconds[slowest])}, median {speed(typical)}"
    return words, [
        f"link: {name(rank)} runs at {speed(value)}, the median is {speed(typical)}"
        for rank, value in enumerate(seconds) if value > limit
    ]  # fmt: skip


def all_reduce_words(all_facts: list[Facts], seconds: list[float], size: float) -> str:
    """The slowest and the fastest rank of an all-reduce of `size` bytes."""

    def place(rank: int) -> str:
        facts = all_facts[rank]
        return f"rank {facts.rank} on {facts.host} {size / seconds[rank] / 1e6:.0f} MB/s"

    ranks = range(len(seconds))
    slowest, fastest = (choose(ranks, key=seconds.__getitem__) for choose in (max, min))
    return (
        f"all-reduce of {size / 2**20:.0f} MiB: slowest {place(slowest)}, fastest {place(fastest)}"
    )


def unasked(all_facts: list[Facts]) -> str | None:
    """What is not known of the GPUs of ranks that could not ask nvidia-smi, in words."""
    mute = [facts for facts in all_facts if facts.gpus and facts.ecc_errors is None]
    if not mute:
        return None
    ranks = ", ".join(f"rank {facts.rank} on {facts.host}" for facts in mute[:4])
    return (
        f"nvidia-smi could not be asked by {ranks}{', ...' if len(mute) > 4 else ''}: memory "
        "errors and other people's processes on the GPUs are not known"
    )


class Interview:
    """Questions to all ranks, which are Ray actors at `hosts`; every answer is due within
    `PATIENCE_SECONDS` of the first question.
    """

    def __init__(self, actors: list[Any], hosts: list[str]) -> None:
        self.actors, self.hosts = actors, hosts
        self.started = time.monotonic()
        self.deadline = self.started + PATIENCE_SECONDS

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def answers(self, question: str, asked: list[Any]) -> list[Any]:
        """What each rank said; raises RefusedError with the ranks that said nothing or refused,
        else with those that failed: where one is missing, the others' collectives fail.
        """
        import ray
        from ray.exceptions import RayTaskError

        late = set(ray.wait(asked, num_returns=len(asked), timeout=self.seconds_left)[1])
        said, refused, failed = [], [], []
        for rank, answer in enumerate(asked):
            if answer in late:
                continue
            try:
                said.append(ray.get(answer))
            except RayTaskError as error:
                if isinstance(error.cause, TuneloomError):
                    refused.append(f"{error.cause} ({self.hosts[rank]})")
                else:
                    why = f"{type(error.cause).__name__}: {str(error.cause).strip()}"
                    failed.append(f"{question}: rank {rank} on {self.hosts[rank]} failed: {why}")
        silent = [self._silence(question, rank) for rank, ref in enumerate(asked) if ref in late]
        refuse(silent + refused or failed)
        return said

    def skews(self) -> list[float]:
        """`skew` of each rank."""
        from ray.exceptions import GetTimeoutError

        found: list[float] = []
        for rank, actor in enumerate(self.actors):
            try:
                found.append(skew(actor, deadline=self.deadline))
            except GetTimeoutError:
                refuse([self._silence("the time of day", rank)])
        return found

    def _silence(self, question: str, rank: int) -> str:
        return (
            f"no answer: rank {rank} on {self.hosts[rank]}, asked for {question}, said nothing "
            f"within the {PATIENCE_SECONDS:.0f} s of preflight; look at its disks and network"
        )


def refuse(reasons: list[str]) -> None:
    """Raise RefusedError with every reason; nothing where there is none."""
    if reasons:
        raise RefusedError(f"preflight: {len(reasons)} reason(s) not to start\n  "
                           + "\n  ".join(reasons))  # fmt: skip


def conduct(actors: list[Any], places: list[dict[str, Any]], config: TrainConfig, *,
            gpus_per_rank: int, group: list[dict[str, str]]) -> Facts:  # fmt: skip
    """Ask all ranks, compare, print what was found, return rank 0's facts; raises RefusedError with
    every reason.

    `group` is each rank's environment for a process group of its own. An error that all ranks give
    alike is the run's own (exit 2 or 3), not one of this cluster.
    """
    interview = Interview(actors, [place["host"] for place in places])
    all_facts = gathered(interview, config)
    refuse(verdict(
        all_facts, gpus_per_rank=gpus_per_rank, need_bytes=needed_bytes(config, all_facts[0])
    ))  # fmt: skip
    words, sums = "links not measured", None
    if not all_facts[0].incomplete:
        patience = max(1, int(interview.seconds_left / 2))  # then who waited still says so in time
        measured = interview.answers("the speed of its links", [
            actor.links.remote(env, patience) for actor, env in zip(actors, group, strict=True)
        ])  # fmt: skip
        size = measured[0]["bytes"]
        words, reasons = slow_links(all_facts, [row["link"] for row in measured], size)
        refuse(reasons)
        if len(actors) > 1:
            sums = all_reduce_words(all_facts, [row["all_reduce"] for row in measured], size)
    print(
        f"preflight: {len(actors)} rank(s) on {len(set(interview.hosts))} node(s) agree; {words}; "
        f"{time.monotonic() - interview.started:.0f} s",
        flush=True,
    )
    for line in filter(None, (sums, unasked(all_facts))):
        print(f"preflight: {line}", flush=True)
    return all_facts[0]


def gathered(interview: Interview, config: TrainConfig) -> list[Facts]:
    """Every rank's facts, with what it sees of the others' files and how its clock stands."""
    content = config.model_dump(mode="json")
    actors = interview.actors
    try:
        answers = interview.answers("what it sees of its host", [
            actor.examine.remote(content, rank, interview.hosts[rank])
            for rank, actor in enumerate(actors)
        ])  # fmt: skip
        unseen = interview.answers("the other ranks' files in the run folder", [
            actor.unseen_by.remote(content, len(actors)) for actor in actors
        ])  # fmt: skip
    finally:
        clear(config)
    return [
        Facts(**answer | {"unseen": ranks, "clock_skew": skew})
        for answer, ranks, skew in zip(answers, unseen, interview.skews(), strict=True)
    ]


def clear(config: TrainConfig) -> None:
    """Remove what ranks wrote; where the disk stalls, the launch does not wait for it."""
    remover = threading.Thread(
        target=shutil.rmtree, args=(probe_folder(config), True), daemon=True, name="clear"
    )
    remover.start()
    remover.join(CLEARING_SECONDS)


def skew(actor: Any, *, deadline: float) -> float:
    """Seconds by which an actor's clock is ahead of ours, from the fastest of three questions;
    raises Ray's GetTimeoutError where it does not answer before `deadline`, by the monotonic clock.
    """
    import ray

    rounds = []
    for _ in range(3):
        asked = time.time()
        left = max(0.0, deadline - time.monotonic())
        theirs = ray.get(actor.now.remote(), timeout=left)
        answered = time.time()
        rounds.append((answered - asked, theirs - (asked + answered) / 2))
    return min(rounds)[1]


def needed_bytes(config: TrainConfig, facts: Facts) -> int:
    """Room for one checkpoint: fp32 masters and moments of all weights, or little for adapters, of
    which the plan counted what they take.
    """
    base = sum(size for _, size in facts.base)
    return GIB // 2 + (7 * base if config.method.kind == "full" else 0)
