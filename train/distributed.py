"""The process group: who this rank is, what all ranks agree on, one place for every collective."""

import logging
import os
import random
import socket
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from tuneloom.errors import ConfigError, DiskError, RefusedError, TuneloomError
from tuneloom.imports import unswept

LOOPBACK = "127.0.0.1"
ONE_MACHINE = dict.fromkeys(
    ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo" if sys.platform == "linux" else "lo0"
)
"""Groups ask nobody for a password, so ranks that share a machine listen on its loopback only."""
_replaced: dict[str, str | None] = {}
"""What the environment said of these before `start`."""

FLIGHT = "flight_rank_"
"""How the files of NCCL's flight recorder begin, before the rank."""
FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
"""Read when a group is made; torch has these names since 2.9."""


@dataclass(frozen=True)
class World:
    """This rank's place; `device` is where its tensors live."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    sequence: int = 1
    """Neighbouring ranks that share each micro-batch (`train/sequence.py`)."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which of the `data_size` shares of a step's micro-batches this rank works on."""
        return self.rank // self.sequence

    @property
    def data_size(self) -> int:
        return self.size // self.sequence

    @property
    def sequence_rank(self) -> int:
        """Which part of each micro-batch this rank holds."""
        return self.rank % self.sequence

    def sharing(self, sequence: int) -> "World":
        """This place when `sequence` neighbours share each micro-batch; ConfigError if they
        cannot.
        """
        if self.size % sequence:
            raise ConfigError(
                f"batch.sequence_parallel: {self.size} ranks cannot form groups of {sequence}; set "
                f"launch.workers to a multiple of {sequence}"
            )
        return replace(self, sequence=sequence)


ALONE = World(0, 1, 0, torch.device("cpu"))
"""A process that is in no group."""


def start(*, timeout_seconds: int = 3600) -> World:
    """Join the process group named by RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; alone if unset.

    NCCL on CUDA devices, gloo on CPU. DeepSpeed picks its accelerator at import, so this sets
    DS_ACCELERATOR first.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    for name, value in (("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", local_rank)):
        os.environ[name] = str(value)
    os.environ.setdefault("MASTER_ADDR", LOOPBACK)
    if os.environ["MASTER_ADDR"] == LOOPBACK:
        _replaced.update({n: os.environ.get(n) for n in ONE_MACHINE.keys() - _replaced.keys()})
        os.environ |= ONE_MACHINE
    if "MASTER_PORT" not in os.environ:
        assert size == 1, "MASTER_PORT is unset with several ranks"
        os.environ["MASTER_PORT"] = "0"
    quiet_libraries()
    cuda = choose_accelerator()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        for name, setting in FLIGHT_RECORDER.items():
            os.environ.setdefault(name, setting)
    if not dist.is_initialized():
        _join("cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(seconds=timeout_seconds))
    return World(rank, size, local_rank, device)


def record_flights(folder: Path, world: World) -> None:
    """Have torch leave NCCL's flight recorder in `folder` after a time-out; it asks where to when
    it first writes one, so this is in time once the run's folder is known.
    """
    if world.device.type == "cuda":
        os.environ["TORCH_FR_DUMP_TEMP_FILE"] = str(folder.resolve() / FLIGHT)


def choose_accelerator() -> bool:
    """True for CUDA; DeepSpeed is told, which reads it when it is imported."""
    cuda = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    if not cuda:
        # Muon's Newton-Schulz is torch.compiled at first use: 53 to 89 s on a CPU, 1 s without
        # (measured).
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    return cuda


def quiet_libraries() -> None:
    """Progress bars and advice of libraries are noise in a log that several ranks write."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="transformers|torch.distributed"
    )
    with unswept():
        from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def restore_interfaces() -> None:
    """Give the environment back what `start` replaced, once all groups are made: jobs that this
    process starts later may be of several machines.
    """
    for name, value in _replaced.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _replaced.clear()


def stop() -> None:
    """Leave the process group, with DeepSpeed's references to it where it was loaded."""
    restore_interfaces()
    if not dist.is_initialized():
        return
    comm = sys.modules.get("deepspeed.comm")
    if comm is not None and comm.is_initialized():
        comm.destroy_process_group()
    else:
        dist.destroy_process_group()


def _join(backend: str, timeout: timedelta) -> None:
    try:
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            _rejoin(backend, timeout)
        elif os.environ["MASTER_ADDR"] == LOOPBACK and "TORCHELASTIC_RUN_ID" not in os.environ:
            _join_at_home(backend, timeout)
        else:
            dist.init_process_group(backend, timeout=timeout)
    except dist.DistNetworkError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(error):
            raise RefusedError(
                f"MASTER_PORT: {where} is in use by another process; choose another port "
                "(torchrun --master-port)"
            ) from None
        first = str(error).splitlines()[0]
        raise RefusedError(f"MASTER_ADDR: rank 0 cannot be reached at {where} ({first})") from None


def _join_at_home(backend: str, timeout: timedelta) -> None:
    """Meet at a store that listens on loopback alone: one that torch opens, on every interface."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    port, listener = int(os.environ["MASTER_PORT"]), None
    if rank == 0:
        try:
            ours = socket.create_server((LOOPBACK, port))
        except OSError as error:
            raise dist.DistNetworkError(f"EADDRINUSE: {error}") from error
        port, listener = ours.getsockname()[1], ours.detach()  # the store closes it
    store = dist.TCPStore(LOOPBACK, port, size, rank == 0, timeout, master_listen_fd=listener)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _rejoin(backend: str, timeout: timedelta) -> None:
    """Meet under a name of this attempt: torchrun's store still holds the addresses of the last,
    where gloo would wait for ranks that are dead (torch 2.13, in a dozen lines without us too).
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    mine = dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=mine, rank=rank, world_size=size, timeout=timeout)


def is_joined() -> bool:
    """True when this process is in a group already, which its owner will leave."""
    return dist.is_initialized()


def seed_everything(seed: int) -> None:
    """The same seed on every rank: adapters are initialised alike, dropout differs by rank
    later.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def sum_over_ranks(values: Tensor) -> Tensor:
    """In-place sum; same on all ranks after."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def max_over_ranks(values: Tensor) -> Tensor:
    """In-place maximum; same on all ranks after."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def neighbours(count: int, *, timeout_seconds: int) -> Any:
    """The process group of this rank and the `count` - 1 beside it; collective over all ranks."""
    timeout = timedelta(seconds=timeout_seconds)
    group, _ = dist.new_subgroups(count, timeout=timeout)
    return group


def barrier() -> None:
    """All ranks reach here before any goes on."""
    if dist.get_world_size() > 1:
        dist.barrier()


def gather_objects(value: object) -> list[object]:
    """One small picklable value a rank, in rank order, on all ranks; of a process without a group,
    its own.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on all ranks; of a process without a group, its own."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def on_first(work: Callable[[], Any], *, where: Path) -> Any:
    """What `work` returns on rank 0, on all ranks; its error is every rank's error. `where` names
    the place in one of the disk.
    """
    outcome: Any = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            outcome = work()
        except TuneloomError as error:
            outcome = error
        except (OSError, SafetensorError) as error:  # a full disk: said on all, not waited for
            outcome = DiskError(f"{where}: {error}")
    outcome = broadcast_object(outcome)
    if isinstance(outcome, TuneloomError):
        raise outcome
    return outcome
