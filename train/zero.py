"""ZeRO: from our few keys to DeepSpeed's dict, the optimizer, and the engine."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tuneloom import imports
from tuneloom.errors import RefusedError
from tuneloom.train import pace
from tuneloom.train.config import ADAPTER_BUCKET, OptimConfig, TrainConfig, ZeroConfig
from tuneloom.train.distributed import World
from tuneloom.train.ops import build_ops


def deepspeed_config(
    config: TrainConfig,
    world: World,
    *,
    accumulation: int,
    universal: bool = False,
    largest: int | None = None,
) -> dict[str, Any]:
    """DeepSpeed's configuration for this run; `universal` resumes from a converted checkpoint.

    `largest` counts the elements of the largest parameter, for NVMe's buffers in host memory; None
    leaves DeepSpeed's: five of 1e8 elements, 1 to 2 GB a rank whatever the model.
    """
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": accumulation * world.size,
        "gradient_clipping": 0.0 if _plain(config) else config.optim.clip,
        "zero_optimization": _zero(config, largest),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "checkpoint": {"load_universal": universal},
    }
    if config.model.dtype == "bf16":
        settings["bf16"] = {"enabled": True}
    if config.model.dtype == "fp16":
        settings["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    if config.model.dtype != "fp32" and config.zero.stage > 0:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if config.optim.name == "muon":
        settings["optimizer"] = {"type": "Muon", "params": _muon(config.optim)}
    return settings


def _plain(config: TrainConfig) -> bool:
    """No ZeRO and fp32: DeepSpeed hands the gradients through, and the loop clips them itself."""
    return config.zero.stage == 0 and config.model.dtype == "fp32"


def _zero(config: TrainConfig, largest: int | None) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": config.zero.stage,
        # Overlap has cost users correct losses (DeepSpeed#5545); off until a GPU run proves it
        # here.
        "overlap_comm": False,
        "contiguous_gradients": True,
        # Gradients stay all-reduced, and launch/traffic.py counts that: a reduce to each owner
        # (use_multi_rank_bucket_allreduce off) sends half, in a message a rank, and no network of
        # GPUs has timed it.
    }
    if config.method.kind != "full":
        zero["reduce_bucket_size"] = ADAPTER_BUCKET
    if config.zero.offload != "none":
        zero["offload_optimizer"] = {
            "device": config.zero.offload,
            "pin_memory": torch.cuda.is_available(),
        }
    if config.zero.offload_parameters != "none":
        zero["offload_param"] = {
            "device": config.zero.offload_parameters,
            "pin_memory": torch.cuda.is_available(),
        }
    for part in ("offload_optimizer", "offload_param"):
        if part in zero and zero[part]["device"] == "nvme":
            zero[part]["nvme_path"] = str(swap_folder(config))
    if config.zero.offload_parameters == "nvme":
        zero["offload_param"]["max_in_cpu"] = 0  # by default the first 1e9 elements stay in RAM
        if largest is not None:
            zero["offload_param"]["buffer_size"] = largest
    if config.zero.stage == 3 and config.optim.name == "muon":
        zero["reduce_scatter"] = False  # "Muon and reduce scatter cannot be used together"
    return zero


def swap_folder(config: TrainConfig) -> Path | None:
    """Where this run's swap files lie: DeepSpeed names them by rank alone, so two runs under one
    path would write into each other's. None without NVMe offload.
    """
    if config.zero.nvme_path is None:
        return None
    return Path(config.zero.nvme_path) / str(config.run.id)


def _muon(optim: OptimConfig) -> dict[str, Any]:
    return {
        "lr": optim.lr,
        "muon_lr": optim.muon_lr,
        "adam_lr": optim.lr,
        "betas": [optim.beta1, optim.beta2],
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
        "torch_adam": True,  # for the rest; FusedAdam would be compiled at first use
    }


@contextmanager
def partitioned_init(settings: dict[str, Any]) -> Iterator[None]:
    """Under ZeRO-3, transformers builds each parameter already sharded, so no rank holds the model
    whole.
    """
    if settings["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    start_deepspeed()
    alive = HfDeepSpeedConfig(settings)
    try:
        yield
    finally:
        del alive
        unset_hf_deepspeed_config()


def parameter_groups(network: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices, which decay, and the rest, which never do."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            matrix = (
                len(getattr(parameter, "ds_shape", parameter.shape)) >= 2 and "embed" not in name
            )
            (decayed if matrix else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer | None:
    """The optimizer DeepSpeed wraps; None where DeepSpeed builds its own (Muon)."""
    optim = config.optim
    groups = parameter_groups(network, optim)
    shared: dict[str, Any] = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    if optim.name == "muon":
        return None
    if optim.name == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, **shared)
    if config.zero.offload != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **shared)
    return torch.optim.AdamW(groups, fused=torch.cuda.is_available(), **shared)


def build_engine(network: nn.Module, config: TrainConfig, settings: dict[str, Any]) -> Any:
    """The DeepSpeed engine around `network`, learning rates left to the loop.

    Raises RefusedError when an op (CPU Adam, async I/O) cannot be built on this machine.
    """
    import deepspeed

    from tuneloom.train.model import moe_blocks

    start_deepspeed()
    _build_ops(config.zero)
    # A shard's tensors get no CRC-32, which took half of a save and which torch.load does not
    # compare (2.13): manifests have digests.
    torch.serialization.set_crc32_options(False)
    if config.zero.stage == 3:
        blocks = moe_blocks(network)
        if blocks:
            deepspeed.utils.set_z3_leaf_modules(network, blocks)
    optimizer = build_optimizer(network, config)
    groups = [p for p in network.parameters() if p.requires_grad] if optimizer is None else None
    engine, *_ = deepspeed.initialize(
        model=network, optimizer=optimizer, model_parameters=groups, config=settings
    )
    if type(engine.optimizer).__name__ == "FP16_UnfusedOptimizer":
        # Its constructor takes one optimizer step on zeros, so that Adam's first real update would
        # be
        # its second: 0.744 lr, another curve than ZeRO 1 to 3 (measured, 0.19.8).
        engine.optimizer.optimizer.state.clear()
    if config.zero.stage == 3:
        _tell_waits(engine.optimizer.parameter_offload.get_param_coordinator())
    return engine


def _tell_waits(coordinator: Any) -> None:
    """Fetching a module's shards waits for the ranks that have them: not this rank's own pace."""
    fetch = coordinator.fetch_sub_module

    def told(*arguments: Any, **options: Any) -> None:
        with pace.waiting():
            fetch(*arguments, **options)

    coordinator.fetch_sub_module = told


def _build_ops(zero: ZeroConfig) -> None:
    try:
        build_ops(zero)
    except (RuntimeError, OSError, ImportError) as error:
        said = str(error).strip() or type(error).__name__
        first = said.splitlines()[0].split(": [")[0]  # and not ninja's command
        if "async_io" in first:
            way = "install libaio-dev (Debian: apt-get install libaio-dev), or set zero.offload=cpu"
        elif isinstance(error, OSError):
            way = "set TORCH_EXTENSIONS_DIR to a folder that can be written, or zero.offload=none"
        else:
            way = "install a C++ compiler and ninja, or set zero.offload=none"
        raise RefusedError(
            f"zero.offload: DeepSpeed's ops cannot be built here ({first}); {way}"
        ) from error


def start_deepspeed() -> None:
    """Let DeepSpeed use the process group that exists, without its INFO lines and its compiler.

    Its shared-memory all-reduce for CPUs takes 25 s and a C++ compiler at first use, and sums in
    another order than gloo; gloo it is.
    """
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    imports.muon()
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(verbose=False)
