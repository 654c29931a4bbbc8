"""`python -m benchmarks.checkpoint`: what a checkpoint costs a step, and a restore a start (B4).

Two gloo ranks hold the bf16 weights and the sharded fp32 masters and Adam moments of one Llama
under ZeRO-2. Each way saves the same bytes in turn, round after round, and the unit is a copy of
those bytes into memory that exists already, taken in the same round by both ranks at once. A
round's figure is its slowest rank's; ratios are of medians. Blocked is what the training loop waits
for, commit included; `whole` is until the files are there. Ours are fsynced and hashed by then, the
peers' are not. `copies` are those of `checkpoint.memory_every`: hashed, in /dev/shm, and sent to a
rank of another host, here one with another folder there. CPU seconds are the loop thread's own: on
a shared machine wall time has others' work in it.

Restores are of files in the page cache, in units of reading them into memory that exists already;
ours verifies them first, the peers do not. The bytes of a LoRA checkpoint are all of its files'.

`--only NAME ...` takes these ways alone: with 4 GiB not all have room beside each other.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.checkpoint_ways import COPY, READ, Way, restores, saves
from benchmarks.record import write
from tuneloom.testing import free_port

RANKS, SEED, VOCABULARY, HIDDEN = 2, 0, 512, 1024
PARAMETERS_OF_A_LAYER = 10 * HIDDEN * HIDDEN
BYTES_OF_A_PARAMETER = 14
"""bf16 weight, fp32 master and two moments."""
LORA_RANK = 16


def engine_of(world: Any, folder: Path, layers: int, *, kind: str = "full") -> Any:
    """A Llama under ZeRO-2 after one step, so that its moments exist."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tuneloom.config import build
    from tuneloom.testing import small_config
    from tuneloom.train import method, zero
    from tuneloom.train.config import TrainConfig

    config = build(
        TrainConfig,
        small_config(
            folder,
            "b4",
            zero__stage=2,
            method__kind=kind,
            method__rank=LORA_RANK,
            model__dtype="bf16",
        ),
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
    engine = zero.build_engine(method.apply(network, config.method), config, settings)
    ids = torch.arange(16).reshape(1, 16)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    return engine


def lora_bytes(world: Any, folder: Path, layers: int) -> dict[str, Any]:
    """What a checkpoint of adapters takes on the disk, over what training holds of them."""
    from tuneloom.train import checkpoint

    engine = engine_of(world, folder, layers, kind="lora")
    trained = sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
    content = {"zero_stage": 2, "trainer": {}, "adapters_only": True, "digests": {}, "step": 1}
    saved = checkpoint.save(engine, folder / "lora" / "checkpoints", world, keep=1, **content)
    size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    shutil.rmtree(folder / "lora", ignore_errors=True)
    return {
        "trained_parameters": trained, "bytes": size,
        "over_weights_masters_and_moments": round(size / (trained * BYTES_OF_A_PARAMETER), 4),
        "over_masters_and_moments": round(size / (trained * (BYTES_OF_A_PARAMETER - 2)), 4),
    }  # fmt: skip


def rank_main(
    rank: int, port: int, folder: Path, layers: int, rounds: int, only: list[str], answers: Any
) -> None:
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
    lora = lora_bytes(world, folder, layers)
    engine = engine_of(world, folder, layers)
    taken = {
        name: rounds_of(chosen(ways(engine, world, folder), only, unit), world, folder, rounds)
        for name, ways, unit in (("saves", saves, COPY), ("restores", restores, READ))
    }
    if world.first:
        shm.forget_run(folder)
        answers.send((taken, lora))
    distributed.barrier()
    distributed.stop()


def chosen(ways: dict[str, Callable[[], Way]], only: list[str], unit: str) -> dict[str, Way]:
    """Those of `only`, all by default, and the unit, set up."""
    names = [name for name in ways if name == unit or not only or name in only]
    return {name: ways[name]() for name in names}


def rounds_of(
    ways: dict[str, Way], world: Any, folder: Path, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """What each way took in each round; none where there is but the unit."""
    import torch

    from tuneloom.train import distributed

    taken: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number in range(rounds + 1 if len(ways) > 1 else 0):
        for name, way in ways.items():
            into = folder / f"{number}-{name}"
            if world.first:
                into.mkdir()
            distributed.barrier()
            torch.serialization.set_crc32_options(not name.startswith("tuneloom"))  # the default
            taken[name].append(slowest(timed(way, into)))
            distributed.barrier()
            if world.first:
                taken[name][-1]["bytes"] = bytes_in(into) + bytes_in(folder / "beside")
                shutil.rmtree(into)
                shutil.rmtree(folder / "beside", ignore_errors=True)
                os.sync()  # what a peer left to the page cache is not written in another's turn
    return taken


def bytes_in(folder: Path) -> int:
    """Of all files, 0 where there are none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def timed(way: Way, into: Path) -> dict[str, float]:
    """Seconds of one save or restore on this rank."""
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


def summary(taken: dict[str, list[dict[str, float]]], unit: str) -> dict[str, Any]:
    """Medians and spreads of the warm rounds, and each way's blocked time in units."""
    return {
        name: _facts(rows[1:], taken[unit][1:], cold=rows[0])
        for name, rows in taken.items()
        if rows
    }


def _facts(
    warm: list[dict[str, float]], units: list[dict[str, float]], *, cold: dict[str, float]
) -> dict[str, Any]:
    cpu = [row["blocked_cpu"] for row in warm]
    blocked, unit = ([row["blocked"] for row in rows] for rows in (warm, units))
    ratios = [a / b for a, b in zip(blocked, unit, strict=True)]
    unit_cpu = statistics.median(row["blocked_cpu"] for row in units)
    return {
        "cpu_over_unit": round(statistics.median(cpu) / unit_cpu, 3),
        "cpu_spread": [round(min(cpu) / unit_cpu, 3), round(max(cpu) / unit_cpu, 3)],
        "wall_over_unit": round(statistics.median(blocked) / statistics.median(unit), 3),
        "least_wall_over_unit": round(min(blocked) / min(unit), 3),
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
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these ways alone")
    parser.add_argument("--name", default="checkpoint", help="of the file under results/")
    given = parser.parse_args()
    layers = max(1, round(given.gib * 2**30 / BYTES_OF_A_PARAMETER / PARAMETERS_OF_A_LAYER))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        arguments = (free_port(), Path(folder), layers, given.rounds, given.only, theirs)
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
        taken, lora = ours.recv()
        for process in ranks:
            process.join()
    ways = summary(taken["saves"], COPY)
    restored = summary(taken["restores"], READ)
    result = {
        "ranks": RANKS, "zero_stage": 2, "rounds": given.rounds, "gib": given.gib, "ways": ways,
        "restores": restored, "lora": lora,
    }  # fmt: skip
    for name, facts in (ways | restored | {"a LoRA checkpoint": lora}).items():
        print(f"{name:35}", json.dumps(facts))
    print(write(given.name, result, seed=SEED))


if __name__ == "__main__":
    main()
