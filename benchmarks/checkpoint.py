"""`python -m benchmarks.checkpoint`: how long a step waits for its checkpoint (B4).

Two gloo ranks hold the bf16 weights and the sharded fp32 masters and Adam moments of one Llama
under ZeRO-2. Each way saves the same bytes in turn, round after round, and the unit is a copy of as
many bytes between two buffers that exist already, taken in the same round by both ranks at once.
A round's figure is its slowest rank's; ratios are of medians. Blocked is what the training loop
waits for, commit included; `whole` is until the files are there. Ours are fsynced and hashed by
then, the peers' are not. `copies` are those of `checkpoint.memory_every`: hashed, in /dev/shm, and
sent to a rank of another host, here one with another folder there. CPU seconds are the loop
thread's own: on a shared machine wall time has others' work in it.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from benchmarks.record import write
from tuneloom.testing import free_port

RANKS, SEED, VOCABULARY, HIDDEN = 2, 0, 512, 1024
PARAMETERS_OF_A_LAYER = 10 * HIDDEN * HIDDEN
BYTES_OF_A_PARAMETER = 14
"""bf16 weight, fp32 master and two moments."""
COPY = "memory copy"


Spent = tuple[float, float]
"""Seconds and CPU seconds of the loop's thread."""


class Way:
    """One way to save: `blocked` is what the loop waits for, `rest` what happens beside it; it
    returns what the loop waited there once more.
    """

    def __init__(self, blocked: Callable[[Path], None], rest: Callable[[Path], Spent]) -> None:
        self.blocked, self.rest = blocked, rest


def nothing(folder: Path) -> Spent:
    """A way that leaves nothing to do beside the loop."""
    return 0.0, 0.0


def ways(engine: Any, world: Any, root: Path) -> dict[str, Way]:
    """All ways over one engine; built on each rank."""
    import torch
    from torch.distributed.checkpoint import async_save, staging

    from tuneloom.train import background, checkpoint, copies, distributed, shm

    files = shards_of(engine, root / "probe")
    values = [t for state in files.values() for t in tensors(state)]
    source = torch.ones(sum(t.nbytes for t in values), dtype=torch.uint8)
    target = source.clone()
    flat = {f"{world.rank}.{i}": tensor for i, tensor in enumerate(values)}
    group = torch.distributed.new_group()
    pending: list[Future[Any]] = []
    options = staging.StagingOptions(False, False, False, False)  # all others need a GPU
    stager = staging.DefaultStager(options)
    content = {"zero_stage": 2, "trainer": {}, "adapters_only": False, "digests": {}, "step": 1}
    beside = background.Background(root / "beside" / "checkpoints", world, keep=1)

    def torch_save(folder: Path) -> None:
        for name, state in files.items():
            torch.save(state, folder / name)

    def dcp(folder: Path, own: Any = None) -> None:
        future = async_save(flat, checkpoint_id=folder, process_group=group, async_stager=own)
        pending.append(future)

    def dcp_rest(folder: Path) -> Spent:
        pending.pop().result()
        return 0.0, 0.0

    def ours(folder: Path) -> None:
        beside.save(engine, **content)

    def ours_rest(folder: Path) -> Spent:
        """Steps pass, each with the sum that carries who is done."""
        wall = cpu = 0.0
        over = False
        while not over:
            over = distributed.broadcast_object((beside.root / checkpoint.name(1)).exists())
            time.sleep(0.02)
            summed = torch.tensor(beside.slots(), dtype=torch.float64)
            done = distributed.sum_over_ranks(summed).tolist()
            started, cpu_started = time.perf_counter(), time.thread_time()
            beside.note(done)
            wall += time.perf_counter() - started
            cpu += time.thread_time() - cpu_started
        return wall, cpu

    memory = shm.ROOT / distributed.broadcast_object(shm.name_of(root) if world.first else None)
    here = copies.Copies(memory, root, world)
    across = copies.Copies(memory / f"host-{world.rank}", root, world)
    steps = itertools.count(1)

    def copy_with(kept: copies.Copies) -> Callable[[Path], None]:
        return lambda _: kept.save(engine, **content | {"step": next(steps)}, exposure=None)

    def synchronous(folder: Path) -> None:
        checkpoint.save(engine, folder / "checkpoints", world, keep=1, **content)

    return {
        COPY: Way(lambda _: copied(target, source), nothing),
        "tuneloom, asynchronous": Way(ours, ours_rest),
        "tuneloom, synchronous": Way(synchronous, nothing),
        "tuneloom, copies": Way(copy_with(here), nothing),
        "tuneloom, copies and a neighbour's": Way(copy_with(across), nothing),
        "torch.save": Way(torch_save, nothing),
        "DCP async_save": Way(dcp, dcp_rest),
        "DCP async_save, stager kept": Way(lambda f: dcp(f, stager), dcp_rest),
        "DeepSpeed save_checkpoint": Way(lambda f: engine.save_checkpoint(str(f)), nothing),
    }


def copied(target: Any, source: Any) -> None:
    """The unit: as many bytes as this rank saves."""
    target.copy_(source)


def tensors(value: Any) -> Iterator[Any]:
    """All of a nested state."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value.detach()
    elif isinstance(value, dict | list | tuple):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from tensors(entry)


def shards_of(engine: Any, folder: Path) -> dict[str, Any]:
    """What DeepSpeed would write on this rank, by file name."""
    from tuneloom.train import checkpoint

    held: dict[str, Any] = {}
    with checkpoint.writing_with(
        engine, lambda state_dict, path: held.update({Path(path).name: state_dict}), nothing
    ):
        checkpoint.save_engine(engine, folder, adapters_only=False)
    return held


def engine_of(world: Any, folder: Path, layers: int) -> Any:
    """A Llama under ZeRO-2 after one step, so that its moments exist."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tuneloom.config import build
    from tuneloom.testing import small_config
    from tuneloom.train import zero
    from tuneloom.train.config import TrainConfig

    config = build(
        TrainConfig,
        small_config(folder, "b4", zero__stage=2, method__kind="full", model__dtype="bf16"),
    )
    settings = zero.deepspeed_config(config, world, accumulation=1, universal=None, largest=None)
    torch.manual_seed(SEED)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=layers,
            num_attention_heads=8,
        )
    ).to(torch.bfloat16)
    engine = zero.build_engine(network, config, settings)
    ids = torch.arange(16).reshape(1, 16)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    return engine


def rank_main(rank: int, port: int, folder: Path, layers: int, rounds: int, answers: Any) -> None:
    """One rank: every way in turn, `rounds` times after a first, cold one."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    import torch

    torch.set_num_threads(1)
    from tuneloom.train import distributed, shm

    world = distributed.start()
    engine = engine_of(world, folder, layers)
    all_ways = ways(engine, world, folder)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in all_ways}
    for number in range(rounds + 1):
        for name, way in all_ways.items():
            into = folder / f"{number}-{name}"
            if world.first:
                into.mkdir()
            distributed.barrier()
            taken[name].append(slowest(timed(way, into)))
            distributed.barrier()
            if world.first:
                size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
                taken[name][-1]["bytes"] = size
                shutil.rmtree(into)
                shutil.rmtree(folder / "beside", ignore_errors=True)
                os.sync()  # what a peer left to the page cache is not written in another's turn
    if world.first:
        shm.forget_run(folder)
        answers.send(taken)
    distributed.barrier()
    distributed.stop()


def timed(way: Way, into: Path) -> dict[str, float]:
    """Seconds of one save on this rank."""
    started, cpu = time.perf_counter(), time.thread_time()
    way.blocked(into)
    blocked, blocked_cpu = time.perf_counter() - started, time.thread_time() - cpu
    later, later_cpu = way.rest(into)
    return {
        "blocked": blocked + later, "blocked_cpu": blocked_cpu + later_cpu,
        "whole": time.perf_counter() - started,
    }  # fmt: skip


def slowest(seconds: dict[str, float]) -> dict[str, float]:
    """The largest of all ranks."""
    import torch

    from tuneloom.train import distributed

    values = torch.tensor(list(seconds.values()), dtype=torch.float64)
    return dict(zip(seconds, distributed.max_over_ranks(values).tolist(), strict=True))


def summary(taken: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians and spreads of the warm rounds, and each way's blocked time in memory copies."""
    return {name: _facts(rows[1:], taken[COPY][1:], cold=rows[0]) for name, rows in taken.items()}


def _facts(
    warm: list[dict[str, float]], copies: list[dict[str, float]], *, cold: dict[str, float]
) -> dict[str, Any]:
    cpu = [row["blocked_cpu"] for row in warm]
    blocked, unit = ([row["blocked"] for row in rows] for rows in (warm, copies))
    ratios = [a / b for a, b in zip(blocked, unit, strict=True)]
    unit_cpu = statistics.median(row["blocked_cpu"] for row in copies)
    return {
        "cpu_over_copy": round(statistics.median(cpu) / unit_cpu, 3),
        "cpu_spread": [round(min(cpu) / unit_cpu, 3), round(max(cpu) / unit_cpu, 3)],
        "wall_over_copy": round(statistics.median(blocked) / statistics.median(unit), 3),
        "least_wall_over_copy": round(min(blocked) / min(unit), 3),
        "wall_spread_of_rounds": [round(min(ratios), 3), round(max(ratios), 3)],
        "blocked_seconds": round(statistics.median(blocked), 4),
        "first_blocked_seconds": round(cold["blocked"], 4),
        "whole_seconds": round(statistics.median(row["whole"] for row in warm), 3),
        "bytes": int(warm[-1]["bytes"]),
    }


def main() -> None:
    """Both ranks, all ways; prints the table and writes results/checkpoint.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint")
    parser.add_argument("--gib", type=float, default=1.0, help="of weights and optimizer state")
    parser.add_argument("--rounds", type=int, default=11)
    given = parser.parse_args()
    layers = max(1, round(given.gib * 2**30 / BYTES_OF_A_PARAMETER / PARAMETERS_OF_A_LAYER))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        arguments = (free_port(), Path(folder), layers, given.rounds, theirs)
        ranks = [
            context.Process(target=rank_main, args=(rank, *arguments)) for rank in range(RANKS)
        ]
        for process in ranks:
            process.start()
        theirs.close()
        while not ours.poll(1.0):
            if lost := [process.exitcode for process in ranks if process.exitcode]:
                for process in ranks:
                    process.kill()
                raise SystemExit(f"a rank ended with {lost[0]}; is there memory for --gib?")
        taken = ours.recv()
        for process in ranks:
            process.join()
    ratios = summary(taken)
    result = {"ranks": RANKS, "zero_stage": 2, "rounds": given.rounds, "ways": ratios}
    for name, facts in ratios.items():
        print(f"{name:30}", json.dumps(facts))
    print(write("checkpoint", result, seed=SEED))


if __name__ == "__main__":
    main()
