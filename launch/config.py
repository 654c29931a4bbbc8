"""How a run is launched, and the whole job: a training config plus its launch."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from tuneloom.config import Config
from tuneloom.train.config import TrainConfig

HEADER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
TIME = re.compile(r"\d{1,6}|\d{1,2}:\d{2}:\d{2}|\d{1,3}-\d{1,2}:\d{2}(:\d{2})?")
MOST_MINUTES = 3599
"""Of launch.time: YAML reads an unquoted 1:00:00 as 3600, and any longer time as more."""
SIGNAL_SLACK = 60
"""Seconds by which Slurm may send a signal sooner than asked (sbatch --signal)."""

# Words of a shell variable that is split at blanks, so nothing that a shell would read otherwise.
ContainerWord = Annotated[str, Field(pattern=r"^[A-Za-z0-9_./:=,@+%-]{1,256}$")]


class LaunchConfig(Config):
    kind: Literal["local", "ray", "slurm", "inline"]
    nodes: Annotated[int, Field(gt=0)] = 1
    """Hosts that the ranks stand on; under ray the launch waits until the cluster has that many."""
    workers: Annotated[int, Field(gt=0)] = 1
    """Ranks in all: one a GPU, or one a CPU process on machines without."""
    gpus_per_worker: Literal["auto"] | Annotated[int, Field(ge=0, le=1)] = "auto"
    """0: ranks see no GPU and train on processors; auto: 1 where the machine has GPUs, else 0."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """Restarts from the newest good checkpoint after a worker is lost."""
    standby: Annotated[float, Field(ge=0)] | None = 60.0
    """Seconds of training after which a second set of workers waits beside the first, all imported,
    so that a restart takes one second (benchmarks/recovery.py); it holds about 0.6 GiB of host
    memory a rank, and is left out where little is to spare. true: at once; null or false: never.
    """
    min_workers: Annotated[int, Field(gt=0)] | None = None
    """Ray: ranks to go on with when nodes are gone, until they return; None waits for all."""
    wait_seconds: Annotated[float, Field(gt=0)] = 300.0
    """How long all ranks may wait for room before the run shrinks, or is refused."""
    account: str | None = None
    """Slurm: whom the job is charged to."""
    partition: str | None = None
    """Slurm: where it queues; None is the cluster's default."""
    time: Annotated[int, Field(gt=0)] | str | None = None
    """Slurm: the limit, as D-HH:MM, HH:MM:SS (in quotes in a file), or up to 3599 minutes; None is
    the partition's.
    """
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    """Slurm: GPUs of each node; None asks for one a rank, or none under gpus_per_worker=0."""
    cpus_per_worker: Annotated[int, Field(gt=0)] | None = None
    """Slurm: processors a rank; None asks for 8 where it has a GPU, else 1."""
    memory: str | None = None
    """Slurm: of each node, such as 64G; None is the partition's."""
    signal_seconds: Annotated[int, Field(gt=0)] = 180
    """Slurm: seconds before the time limit at which the run saves and goes back into the queue."""
    python: str | None = None
    """Slurm: interpreter of the virtual environment that the nodes see; None is the one in use, or
    the container's `python`.
    """
    container: tuple[ContainerWord, ...] = ()
    """Slurm: the command that enters a container, image last, such as [apptainer, exec, --nv,
    tuneloom.sif]; Ray and the ranks of every node run in it. Empty: none.
    """
    follow: bool = True
    """Slurm: show the job's output until it ends, and end with its exit code."""
    dry_run: bool = False
    """Slurm: print the batch script, submit nothing."""

    @field_validator("standby", mode="before")
    @classmethod
    def at_once_or_never(cls, value: object) -> object:
        return {True: 0.0, False: None}[value] if isinstance(value, bool) else value

    @field_validator("account", "partition", "memory")
    @classmethod
    def header(cls, value: str | None) -> str | None:
        # They stand in #SBATCH lines: a newline would be a line of the script.
        if value is not None and not HEADER.fullmatch(value):
            raise ValueError("expected 1 to 64 of [A-Za-z0-9._-]")
        return value

    @field_validator("time")
    @classmethod
    def duration(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, str) and not TIME.fullmatch(value):
            raise ValueError("expected minutes, HH:MM:SS or D-HH:MM")
        if isinstance(value, int) and value > MOST_MINUTES:
            raise ValueError(
                f"expected up to {MOST_MINUTES} minutes; write more as D-HH:MM, and HH:MM:SS in "
                "quotes, since YAML reads 4:00:00 as 14400"
            )
        return value

    @model_validator(mode="after")
    def time_is_left_to_train(self) -> "LaunchConfig":
        if self.time is not None and seconds_of(self.time) <= self.signal_seconds + SIGNAL_SLACK:
            raise ValueError(
                f"launch.time: {self.time} leaves no time to train, since the job is asked to save "
                f"{self.signal_seconds} s before its end (launch.signal_seconds), or up to "
                f"{SIGNAL_SLACK} s sooner, and would go back into the queue for ever; raise it, or "
                "lower launch.signal_seconds"
            )
        return self

    @model_validator(mode="after")
    def read_by_its_kind(self) -> "LaunchConfig":
        given = self.model_fields_set & SLURM_ONLY
        changed = sorted(n for n in given if getattr(self, n) != type(self).model_fields[n].default)
        if changed and self.kind != "slurm":
            raise ValueError(f"launch.{changed[0]}: only launch=slurm reads it; leave it out")
        if (
            self.kind == "inline"
            and "standby" in self.model_fields_set
            and self.standby is not None
        ):
            raise ValueError("launch.standby: launch=inline restarts nothing; leave it out")
        if self.min_workers is not None and self.kind != "ray":
            raise ValueError("launch.min_workers: only launch=ray reads it; leave it out")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(
                f"launch.min_workers: {self.min_workers} is more than launch.workers "
                f"({self.workers}); lower it"
            )
        if self.workers % self.nodes:
            raise ValueError(
                f"launch.workers: {self.workers} ranks cannot stand evenly on launch.nodes "
                f"({self.nodes}); use a multiple of it"
            )
        return self


def seconds_of(time: int | str) -> int:
    """A limit as `launch.time` writes it."""
    if isinstance(time, int) or time.isdecimal():
        return 60 * int(time)
    days, _, clock = time.rpartition("-")
    hours, minutes, seconds = [*map(int, clock.split(":")), 0][:3]
    return 60 * (60 * (24 * int(days or 0) + hours) + minutes) + seconds


SLURM_ONLY = frozenset({
    "account", "partition", "time", "gpus_per_node", "cpus_per_worker", "memory", "signal_seconds",
    "python", "container", "follow", "dry_run",
})  # fmt: skip


class JobConfig(TrainConfig):
    """What `tuneloom train` composes and validates."""

    launch: LaunchConfig

    @model_validator(mode="after")
    def ranks_share_sequences(self) -> "JobConfig":
        ranks = 1 if self.launch.kind == "inline" else self.launch.workers
        shared = self.batch.sequence_parallel
        if ranks % shared:
            raise ValueError(
                f"batch.sequence_parallel: {ranks} ranks cannot form groups of {shared}; set "
                f"launch.workers to a multiple of {shared}"
            )
        return self

    @model_validator(mode="after")
    def state_moves_to_fewer_ranks(self) -> "JobConfig":
        shrinks = (self.launch.min_workers or self.launch.workers) < self.launch.workers
        if shrinks and self.optim.name != "adamw" and self.zero.stage:
            raise ValueError(
                f"launch.min_workers: the state of optim.name={self.optim.name} cannot move to "
                "fewer ranks; set optim.name=adamw or zero.stage=0, or leave launch.min_workers out"
            )
        return self


def training_of(job: TrainConfig) -> TrainConfig:
    """The job without its launch: what every rank gets, the same whoever starts it."""
    fields = {name: getattr(job, name) for name in TrainConfig.model_fields}
    return TrainConfig.model_construct(**fields)
