"""How a run is launched, and the whole job: a training config plus its launch."""

from typing import Annotated, Literal

from pydantic import Field

from tuneloom.config import Config
from tuneloom.train.config import TrainConfig


class LaunchConfig(Config):
    kind: Literal["local", "ray", "slurm", "inline"]
    nodes: Annotated[int, Field(gt=0)] = 1
    workers: Annotated[int, Field(gt=0)] = 1
    """Ranks in all: one a GPU, or one a CPU process on machines without."""
    gpus_per_worker: Literal["auto"] | Annotated[int, Field(ge=0, le=1)] = "auto"
    """auto: 1 where the machine has GPUs, else 0."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """Restarts from the newest good checkpoint after a worker is lost."""


class JobConfig(TrainConfig):
    """What `tuneloom train` composes and validates."""

    launch: LaunchConfig


def training_of(job: TrainConfig) -> TrainConfig:
    """The job without its launch: what every rank gets, the same whoever starts it."""
    fields = {name: getattr(job, name) for name in TrainConfig.model_fields}
    return TrainConfig.model_construct(**fields)
