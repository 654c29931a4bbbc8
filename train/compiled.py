"""Decoder layers through torch.compile, one by one: all layers share the graphs of the first.

Inductor fuses what lies between the matrix products. Attention stays outside (it picks a backend
and counts its calls), so a layer is two graphs, made once for tokens of any number. Only training
runs them: the probe, validation and samples would each need graphs of their own. Whole models are
not compiled, which costs minutes at first start (axolotl's docs: 5 to 15 for 8B).
"""

import os
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tuneloom.errors import ConfigError, RefusedError
from tuneloom.kernels.attention import NAME
from tuneloom.private import own_folder
from tuneloom.train.config import ModelConfig
from tuneloom.train.model import moe_blocks
from tuneloom.train.text import decoder_layers

SEEN: Counter[str] = Counter()
"""Compiled layer forwards since `SEEN.clear()`; effects.json is written from it."""
TIMERS = ("_compile.compile_inner", "backward._backward_impl")
"""Dynamo's (torch 2.13): of a graph with its forward, and of its backward."""


@dataclass(frozen=True)
class Cost:
    """What compiling has taken in this run, on this rank."""

    graphs: int
    seconds: float


def install(network: nn.Module, model: ModelConfig, device: torch.device) -> int:
    """Compile every decoder layer; returns how many, 0 where it is off. Nothing is compiled before
    the first step.

    Raises ConfigError for a model without known layers, RefusedError without a compiler.
    """
    if not model.compile:
        return 0
    from torch._dynamo import utils
    from transformers import AttentionInterface

    layers = decoder_layers(network)
    if not layers or moe_blocks(network):
        raise ConfigError(
            f"model.compile: {type(network).__name__} has no decoder layers of one kind, or routes "
            "tokens to experts; set model.compile=false"
        )
    _keep_to_ourselves()
    _refuse_without_compiler(device)
    # An earlier run in this process left graphs and counts of its own.
    torch.compiler.reset()
    utils.counters.clear()
    interface = AttentionInterface()
    AttentionInterface.register(NAME, torch.compiler.disable(interface[NAME]))
    for kind in {type(layer) for layer in layers}:
        forward = torch.compile(kind.forward, dynamic=True)
        for layer in (m for m in layers if type(m) is kind):
            layer.__dict__["forward"] = partial(_forward, layer, kind.forward, forward)
    return len(layers)


def _forward(layer: nn.Module, plain: Any, forward: Any, *args: Any, **kwargs: Any) -> Tensor:
    if not (layer.training and torch.is_grad_enabled()):
        out: Tensor = plain(layer, *args, **kwargs)
        return out
    SEEN["forwards"] += 1
    # train/distributed.py disables Dynamo on CPUs, for Muon's sake; and past its limit of graphs
    # Dynamo would go on uncompiled without a word.
    with torch._dynamo.config.patch(disable=False, fail_on_recompile_limit_hit=True):
        out = forward(layer, *args, **kwargs)
    return out


def cost() -> Cost:
    """Graphs and seconds since `install`."""
    from torch._dynamo import utils

    names, seconds = utils.compile_times(repr="csv", aggregate=True)
    of: dict[str, Any] = dict(zip(names, seconds, strict=True))
    # A backward that keeps no sizes is compiled at its first pass, outside the first timer.
    whole = sum(float(of.get(timer, 0.0)) for timer in TIMERS)
    return Cost(utils.counters["stats"]["unique_graphs"], round(whole, 2))


def _keep_to_ourselves() -> None:
    """Inductor runs what its cache holds, by default /tmp/torchinductor_USER, which another user
    may have made first.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(own_folder() / "inductor"))


def _refuse_without_compiler(device: torch.device) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise RefusedError(
            "model.compile: no C++ compiler here, which torch.compile needs (Debian: apt-get "
            "install g++); set model.compile=false"
        ) from None
    if device.type == "cuda" and not has_triton():
        raise RefusedError(
            "model.compile: no Triton here, which torch.compile needs on a GPU (pip install "
            "triton); set model.compile=false"
        )
