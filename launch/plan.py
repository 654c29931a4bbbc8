"""Memory, steps, disk, time of a run before it starts: `tuneloom plan experiment=llama3_8b_lora`.

Composes what `tuneloom train` composes. A run that cannot fit is refused (exit 4) with the changes
that would make it fit, each of them planned anew. Nothing is written.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from tuneloom.config import Config
from tuneloom.errors import ConfigError, RefusedError
from tuneloom.launch import machine
from tuneloom.launch.anatomy import (
    Anatomy,
    anatomy,
    micro_batch,
    saved_activations,
    shape_of,
)
from tuneloom.launch.config import JobConfig, training_of
from tuneloom.launch.memory import (
    GPU_CONTEXT,
    PROCESS,
    USABLE,
    Memory,
    best_bytes,
    checkpoint_bytes,
    forecast,
)
from tuneloom.launch.traffic import Traffic, traffic
from tuneloom.launch.workload import Speed, Workload, speed, workload
from tuneloom.train.config import FULL_LR, TrainConfig
from tuneloom.train.rules import refuse_unread
from tuneloom.train.runs import folder_of

Positive = Annotated[float, Field(gt=0)]
TILE = 4096
"""Tokens of a tile that a refusal proposes."""
SHOWN = 3
"""Alternatives that a refusal names."""


class PlanConfig(Config):
    gpu: Literal[
        "auto", "cpu", "b200-180", "h200-141", "h100-80", "a100-80", "a100-40", "l40s-48",
        "v100-32", "rtx4090-24", "rtx3090-24", "l4-24",
    ] = "auto"  # fmt: skip
    """Device of each rank; auto: this machine's GPUs, or its processors and memory."""
    host_memory_gib: Positive | None = None
    """Of each node, for offload; None: this machine's under auto and cpu, else not checked."""
    tokens_per_second: Positive | None = None
    """Real tokens a second of all ranks; None: of the newest run with this config on as many ranks
    of this kind, if any.
    """
    storage_gb_s: Positive | None = None
    """GB a second that all nodes together write; with it the plan says what failures cost."""
    restart_seconds: Positive = 120.0
    """From a failure to the next new step, detection, rendezvous and loading in it."""


class PlanJobConfig(JobConfig):
    """A job and the machine it is planned for."""

    plan: PlanConfig = PlanConfig()
    as_json: Annotated[bool, Field(alias="json")] = False
    """One JSON object on standard output in place of the table."""


CONFIG = PlanJobConfig


@dataclass(frozen=True)
class Device:
    """What one rank has; `host` is what all ranks of a node share, None where it is not known."""

    name: str
    bytes: int
    cuda: bool
    host: int | None
    here: bool
    """It is this machine's, so its disk is the run's, too."""


ELSEWHERE = Device("a rank of the cluster", 2**63, cuda=True, host=None, here=True)
"""Of a rank under launch=ray before anyone looked at its machine: everything fits there, so that
only the disk of `run.root`, which is shared, and what the config alone decides can be too little.
"""


@dataclass(frozen=True)
class Failures:
    """What they cost at the rate of Llama 3 405B, with saves that training waits for."""

    every_hours: float
    save_seconds: float
    interval_seconds: float
    """Between saves that lose the least."""
    restart_seconds: float
    goodput: float
    """Share of the time that makes new steps."""


@dataclass(frozen=True)
class Plan:
    """A forecast; `fits` when devices, hosts and the disk hold it."""

    device: Device
    ranks: int
    parameters: int
    trainable: int
    memory: Memory
    traffic: Traffic
    workload: Workload
    speed: Speed | None
    checkpoint: int
    checkpoints: int
    """Bytes on disk when most are there: those kept, the one being written, and `best`."""
    best: int
    """Bytes of the best validation's weights (`train.patience`), twice while better ones come."""
    free_disk: int
    held_disk: int
    """Bytes of both of this run that are there already."""
    failures: Failures | None
    """None where `plan.storage_gb_s` is not given."""
    problems: list[str]
    advice: list[str]

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def seconds(self) -> float | None:
        if self.speed is None or self.workload.tokens is None:
            return None
        return self.workload.tokens / self.speed.tokens_per_second


@dataclass(frozen=True)
class Way:
    """Changes of dotted keys with which a refused job fits, and what a rank then holds."""

    changes: dict[str, Any]
    memory: Memory


def plan(
    job: JobConfig, target: PlanConfig | None = None, *, device: Device | None = None
) -> Plan:  # fmt: skip
    """The forecast of `job` on this machine, on the machine that `target` names, or on `device`."""
    target = target or PlanConfig()
    config, ranks = training_of(job), ranks_of(job)
    device = device or device_of(job, target)
    parts, memory = _memory(job, device)
    checkpoint, best = checkpoint_bytes(config, parts), best_bytes(config, parts)
    result = Plan(
        device=device,
        ranks=ranks,
        parameters=parts.base,
        trainable=parts.trainable,
        memory=memory,
        traffic=traffic(config, parts, ranks=ranks),
        workload=workload(config, ranks=ranks),
        speed=speed(config, given=target.tokens_per_second, ranks=ranks, device=device.name),
        checkpoint=checkpoint,
        checkpoints=checkpoint * (config.checkpoint.keep + 1) + best,
        best=best,
        free_disk=machine.free_disk(config.run.root),
        held_disk=held_disk(config),
        failures=failures(checkpoint, ranks, target),
        problems=[],
        advice=advice(job, device),
    )
    result.problems.extend(problems(job, result))
    return result


def failures(checkpoint: int, ranks: int, target: PlanConfig) -> Failures | None:
    """By launch/simulate.py, for checkpoints of so many bytes."""
    if target.storage_gb_s is None:
        return None
    from tuneloom.launch.simulate import LLAMA3_MTBF_HOURS, Faults, best_interval, goodput

    save = checkpoint / (target.storage_gb_s * 1e9)
    faults = Faults(LLAMA3_MTBF_HOURS, save, target.restart_seconds)
    interval = best_interval(faults, ranks=ranks)
    return Failures(
        LLAMA3_MTBF_HOURS / ranks, save, interval, target.restart_seconds,
        goodput(faults, ranks=ranks, interval_seconds=interval),
    )  # fmt: skip


def held_disk(config: TrainConfig) -> int:
    """Bytes of the checkpoints and best weights that earlier starts of this run left, which new
    ones take the place of.
    """
    if config.run.id is None:
        return 0
    folder = folder_of(config)
    files = [*folder.glob("checkpoints/step-*/**/*"), *folder.glob("best-step-*/**/*")]
    return sum(file.stat().st_size for file in files if file.is_file())


def check(job: JobConfig) -> Plan | None:
    """The plan of a job that is about to start; raises RefusedError when it cannot fit.

    None where a bound from file sizes says that it fits: counting takes 6 s of imports, this none.
    """
    # A job of Slurm's starts on a node of its own, and those are alike.
    if job.launch.kind == "ray" and "SLURM_JOB_ID" not in os.environ:
        device = ELSEWHERE
        print(
            "plan: what the ranks' machines hold is not checked here, they are the cluster's, and "
            "preflight compares them; `tuneloom plan plan.gpu=...` counts for one kind of GPU",
            flush=True,
        )
    else:
        device = device_of(job, PlanConfig())
    if surely_fits(job, device):
        return None
    result = plan(job, device=device)
    if not result.fits:
        raise RefusedError(refusal(job, result))
    return result


def surely_fits(job: JobConfig, device: Device) -> bool:
    """A bound on everything, several times too high, is under half of the device and the disk.

    48 bytes a parameter (weights, gradients, masters, moments, casts; DoRA's weight-sized tensors),
    and twice what a Llama layer with PEFT saves in fp32. Only for weights that lie here.
    """
    weights = sum(file.stat().st_size for file in Path(job.model.path).glob("*.safetensors"))
    if not weights or (job.model.dtype == "fp16" and not device.cuda):
        return False
    shape = shape_of(job.model.path)
    text = shape.get("text_config", shape)
    read = {"hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"}
    if read - set(text) or "num_experts" in text or "num_local_experts" in text:
        return False  # a nested config may leave out what is its architecture's default
    parameters = weights / 2
    rows, length = micro_batch(job.batch)
    layer = 32 * text["hidden_size"] + 8 * text.get("intermediate_size", 0)
    if job.model.attention == "eager":
        layer += 6 * text["num_attention_heads"] * length
    batch = 4 * rows * length * (text["num_hidden_layers"] * layer + 3 * text["vocab_size"])
    context = GPU_CONTEXT if device.cuda else PROCESS
    checkpoints = 16 * parameters * (job.checkpoint.keep + (2 if job.train.patience else 1))
    fits = 48 * parameters + batch + context < device.bytes / 2
    return fits and checkpoints < machine.free_disk(job.run.root) / 2


def main(config: PlanJobConfig) -> int:
    """Print the plan; returns 0, raises RefusedError when the run cannot fit."""
    from tuneloom.launch.plan_table import show

    refuse_unread(training_of(config))
    result = plan(config, config.plan)
    if config.as_json:
        print(json.dumps(as_dict(result), indent=2))
    else:
        show(result)
    if not result.fits:
        raise RefusedError(refusal(config, result))
    return 0


def as_dict(result: Plan) -> dict[str, Any]:
    """The plan as plain JSON, its derived figures included."""
    plain = asdict(result)
    plain["memory"]["device"] = result.memory.device
    return plain | {"fits": result.fits, "seconds": result.seconds}


def ranks_of(job: JobConfig) -> int:
    return 1 if job.launch.kind == "inline" else job.launch.workers


def ranks_per_node(job: JobConfig) -> int:
    return max(1, -(-ranks_of(job) // job.launch.nodes))


def device_of(job: JobConfig, target: PlanConfig) -> Device:
    """The device of one rank; on processors, its share of the node's memory."""
    here = target.host_memory_gib is None and target.gpu in ("auto", "cpu")
    host = machine.host_bytes() if here else None
    if target.host_memory_gib is not None:
        host = round(target.host_memory_gib * machine.GIB)
    found = machine.gpus() if target.gpu == "auto" and job.launch.gpus_per_worker != 0 else []
    if found:
        smallest = min(found, key=lambda gpu: gpu.bytes)
        return Device(smallest.name, smallest.bytes, cuda=True, host=host, here=True)
    if target.gpu in ("auto", "cpu"):
        assert host is not None
        return Device("CPU", host // ranks_per_node(job), cuda=False, host=host, here=True)
    size = machine.GPU_MIB[target.gpu] * 2**20
    return Device(target.gpu, size, cuda=True, host=host, here=False)


def _memory(job: JobConfig, device: Device) -> tuple[Anatomy, Memory]:
    config = training_of(job)
    parts = anatomy(config)
    saved = saved_activations(config)
    return parts, forecast(
        config, parts, saved, ranks=ranks_of(job), cuda=device.cuda,
        several_hosts=job.launch.nodes > 1,
    )  # fmt: skip


def problems(job: JobConfig, result: Plan) -> list[str]:
    """What does not fit, as sentences; the disk counts where the plan is for this machine."""
    found = memory_problems(job, result.device, result.memory)
    shared = job.batch.sequence_parallel
    if job.launch.kind == "local" and result.device.cuda and result.device.here:
        have = len(machine.gpus())
        if have < job.launch.workers:
            found.append(
                f"launch.workers: {job.launch.workers} ranks need as many GPUs, this machine has "
                f"{have}; lower launch.workers, or set launch=ray or launch=slurm"
            )
    heads = anatomy(training_of(job)).heads
    if heads % shared:
        found.append(
            f"batch.sequence_parallel: {shared} ranks cannot share {heads} attention heads evenly; "
            f"use a divisor of {heads}"
        )
    if job.model.dtype == "fp16" and not result.device.cuda:
        found.append("model.dtype: fp16 needs a GPU; set model.dtype=bf16 or fp32")
    held = min(result.held_disk, result.checkpoint * job.checkpoint.keep + result.best // 2)
    if result.device.here and result.checkpoints - held > result.free_disk:
        there = f" beside the {gib(held)} of this run's own" if held else ""
        best = ", with the best validation's weights," if result.best else ""
        found.append(
            f"run.root: {job.checkpoint.keep} checkpoints and the one being written{best} take "
            f"{gib(result.checkpoints)}, the disk has {gib(result.free_disk)} free{there}; lower "
            "checkpoint.keep, free some, or point run.root elsewhere"
        )
    return found


def memory_problems(job: JobConfig, device: Device, memory: Memory) -> list[str]:
    """Device and host, each rank's and each node's."""
    found = []
    if memory.device > USABLE * device.bytes:
        found.append(
            f"a rank needs {gib(memory.device)}, {device.name} has {gib(device.bytes)} for it "
            f"({USABLE:.0%} usable)"
        )
    if device.host is not None and memory.host:
        needed = memory.host * ranks_per_node(job)
        if not device.cuda:
            needed += memory.device * ranks_per_node(job)
        if needed > USABLE * device.host:
            found.append(
                f"{_on_host(job)} {gib(needed)} of host memory, the node has {gib(device.host)}"
            )
    return found


def _on_host(job: JobConfig) -> str:
    """Subject and verb of what does not fit there."""
    wanted = {
        "offload": job.zero.offload != "none" or job.zero.offload_parameters != "none",
        "checkpoint.asynchronous": job.checkpoint.asynchronous,
        "checkpoint.memory_every": job.checkpoint.memory_every > 0,
    }
    named = [name for name, is_wanted in wanted.items() if is_wanted]
    return f"{' and '.join(named)} need{'s' * (len(named) == 1)}"


def advice(job: JobConfig, device: Device) -> list[str]:
    """Cheaper ways to run: a frozen base belongs on every rank as long as it fits there."""
    if job.zero.stage != 3 or job.method.kind == "full" or ranks_of(job) == 1:
        return []
    changes = {"zero.stage": 2, "zero.offload_parameters": "none"}
    replicated = changed(job, changes)
    if replicated is None or memory_problems(replicated, device, _memory(replicated, device)[1]):
        return []
    config = training_of(job)
    moved = traffic(config, anatomy(config), ranks=ranks_of(job))
    return [
        f"set zero=stage2: the frozen base fits on every rank, and a step then moves "
        f"{moved.replicated / 1e9:.2f} GB a rank in place of {moved.this / 1e9:.1f} GB"
    ]


def refusal(job: JobConfig, result: Plan) -> str:
    """Why it cannot run and what would make it, each alternative planned anew."""
    why = "; ".join(result.problems)
    if not memory_problems(job, result.device, result.memory):
        return why
    ways = [_way(job, change) for change in fitting(job, result.device)]
    if not ways:
        return (
            f"{why}; no method, ZeRO stage, recomputation, batch or sharing fits: use more or "
            "larger GPUs"
        )
    return f"{why}; what would fit: " + ", or ".join(ways)


def _way(job: JobConfig, way: Way) -> str:
    """`zero.offload=cpu (212.0 GiB of host memory a node)`."""
    keys = " ".join(f"{key}={value}" for key, value in way.changes.items())
    host = way.memory.host * ranks_per_node(job)
    return f"{keys} ({gib(host)} of host memory a node)" if host else keys


def fitting(job: JobConfig, device: Device) -> list[Way]:
    """The first few ways, fewest and cheapest changes first, in which every rank fits."""
    found: list[Way] = []
    for changes in alternatives(job):
        if any(earlier.changes.items() <= changes.items() for earlier in found):
            continue
        other = changed(job, changes)
        if other is None:
            continue
        memory = _memory(other, device)[1]
        if not memory_problems(other, device, memory):
            found.append(Way(changes, memory))
        if len(found) == SHOWN:
            break
    return found


def alternatives(job: JobConfig) -> Iterator[dict[str, Any]]:
    """Single changes in order of what they cost a run, then pairs and triples of them."""
    single = list(_changes(job))
    for count in (1, 2, 3):
        for chosen in combinations(single, count):
            merged = {key: value for change in chosen for key, value in change.items()}
            if len(merged) == sum(len(change) for change in chosen):
                yield merged


def _changes(job: JobConfig) -> Iterator[dict[str, Any]]:
    """Each alone, cheapest first: no copies, sharding, recomputation, batch, offload, fewer
    weights.
    """
    if job.checkpoint.asynchronous:
        yield {"checkpoint.asynchronous": "false"}
    if job.checkpoint.memory_every:
        yield {"checkpoint.memory_every": 0}
    if ranks_of(job) > 1:
        for stage in (2, 3):
            if stage > job.zero.stage and not (stage == 2 and job.method.kind == "qlora"):
                yield {"zero.stage": stage}
    if job.model.checkpointing != "on":
        yield {"model.checkpointing": "on"}
    yield from _smaller(job)
    yield from _shared(job)
    if job.zero.offload == "none":
        yield {"zero.offload": "cpu"}
    # A rate chosen for all weights is no adapter's.
    rate = {"optim.lr": "null"} if job.method.kind == "full" and job.optim.lr != FULL_LR else {}
    if job.method.kind == "full":
        yield {"method": "lora"} | rate
    if job.method.kind != "qlora":
        yield {"method": "qlora"} | rate
    if job.zero.stage == 3 and job.zero.offload_parameters == "none":
        yield {"zero.offload_parameters": "cpu"}


def _shared(job: JobConfig) -> Iterator[dict[str, Any]]:
    """Tiles, and packs shared by two ranks and more, the tokens of a step held by accumulation."""
    batch, ranks = job.batch, ranks_of(job)
    if job.model.tile_tokens is None and not job.model.kernels and batch.rank_tokens > TILE:
        yield {"model.tile_tokens": TILE}
    heads = anatomy(training_of(job)).heads
    for times in (2, 4, 8):
        shared = batch.sequence_parallel * times
        if ranks % shared == 0 and heads % shared == 0:
            accumulation = batch.accumulation * times
            yield {"batch.sequence_parallel": shared, "batch.accumulation": accumulation}


def _smaller(job: JobConfig) -> Iterator[dict[str, Any]]:
    """The smallest micro-batch, the tokens of a step held by accumulation."""
    batch = job.batch
    if batch.packing and batch.tokens >= 2 * batch.max_length:
        times = batch.tokens // batch.max_length
        yield {"batch.tokens": batch.max_length, "batch.accumulation": batch.accumulation * times}
    if not batch.packing and batch.sequences > 1:
        yield {"batch.sequences": 1, "batch.accumulation": batch.accumulation * batch.sequences}


def changed(job: JobConfig, changes: dict[str, Any]) -> JobConfig | None:
    """The job with dotted keys set; None where the rules refuse the combination."""
    mapping = {
        name: value for name, value in job.model_dump().items() if name in JobConfig.model_fields
    }
    for key, value in changes.items():
        path = ["method", "kind"] if key == "method" else key.split(".")
        at = mapping
        for part in path[:-1]:
            at = at[part]
        at[path[-1]] = None if value == "null" else value
    try:
        found = JobConfig.model_validate(mapping)
        refuse_unread(training_of(found))
    except (ValidationError, ConfigError):
        return None
    return found


def gib(size: float) -> str:
    return (
        f"{size / machine.GIB:.1f} GiB" if size >= machine.GIB / 10 else f"{size / 2**20:.0f} MiB"
    )
