"""CUDA graphs on a CPU: torch.cuda.make_graphed_callables as its callers see it, and an attention
whose shapes are as fixed as varlen's.

What the stand-in keeps of the real one: every replay copies its inputs into the same static
tensors, gives its outputs and gradients in the same memory each time, and reads parameters where
they lay at capture. What it cannot show: that an op may be captured.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tuneloom.kernels import attention
from tuneloom.kernels.patch import patch
from tuneloom.train import graphed
from tuneloom.train.batches import Frame, MicroBatch, collate
from tuneloom.train.config import MethodConfig
from tuneloom.train.method import apply

CAPTURES: list[int] = []
"""Callables of each call of `make_graphed_callables`."""
FRAME = Frame(tokens=64, max_length=32, documents=6)
PACKS = ((20, 9, 3), (32, 32), (7, 7, 7, 7, 7, 7), ())
"""Lengths of their documents; the last has none."""
WAYS = [("lora", False), ("full", False), ("dora", False), ("lora", True), ("full", True)]
"""Method, and whether with model.kernels."""


def install(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let this process capture on its CPU."""
    put(torch.cuda, "make_graphed_callables", make_graphed_callables)
    put(attention, "_by_document", dense)
    put(graphed, "STATIC", (*graphed.STATIC, "sdpa"))
    refuse, anywhere = graphed.refuse, torch.device("cuda")
    put(graphed, "refuse", lambda network, model, _: refuse(network, model, anywhere))


def make_graphed_callables(functions: tuple[Any, ...], samples: tuple[Any, ...]) -> tuple[Any, ...]:
    """Each function by its recording, as torch.cuda's; runs it once, for its output's shape."""
    CAPTURES.append(len(functions))
    return tuple(_graphed(f, s) for f, s in zip(functions, samples, strict=True))


def _graphed(function: Callable[..., Tensor], static: tuple[Tensor, ...]) -> Any:
    assert all(isinstance(t, Tensor) for t in static)
    wanted = [t for t in static if t.requires_grad]
    with torch.enable_grad():
        sample = function(*static)
    output = torch.empty_like(sample)
    gradients = [torch.empty_like(t) for t in wanted]
    running: list[Tensor] = []

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Tensor:
            for mine, theirs in zip(static, inputs, strict=True):
                if mine.data_ptr() != theirs.data_ptr():
                    mine.detach().copy_(theirs)
            with torch.enable_grad():
                running[:] = [function(*static)]
            return output.copy_(running[0].detach()).detach()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
            found = torch.autograd.grad(running.pop(), wanted, gradient)
            for mine, new in zip(gradients, found, strict=True):
                mine.copy_(new)
            left = iter(gradients)
            return tuple(next(left).detach() if t.requires_grad else None for t in static)

    return lambda *arguments: Replay.apply(*pytree.tree_leaves(arguments))


def dense(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float | None,
    window: int | None, softcap: float | None, plain: Any,
) -> Tensor:  # fmt: skip
    """Attention under a (T, T) mask made from cu_seqlens on the device, of one shape always."""
    assert window is None and softcap is None
    at = torch.arange(query.shape[2], device=query.device)
    document = torch.searchsorted(cu_seqlens, at, right=True)
    seen = (document[:, None] == document) & (at[:, None] >= at)  # (T, T)
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scale
    )
    return out.transpose(1, 2)


def pack(lengths: tuple[int, ...], frame: Frame | None = FRAME) -> MicroBatch:
    rng = np.random.default_rng(sum(lengths))
    examples = [(rng.integers(6, 60, n).astype(np.int32), np.ones(n, bool)) for n in lengths]
    return collate(range(len(lengths)), examples, packing=True, frame=frame)


def build(
    method: str = "lora", *, kernels: bool = False, backend: str = "sdpa", device: str = "cpu",
    **config: Any,
) -> Any:  # fmt: skip
    """A Llama of three layers in training mode; B of LoRA is not zero."""
    import transformers

    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=61, use_cache=False, **config,
    )  # fmt: skip
    dtype = torch.bfloat16 if backend == "varlen" else torch.float32
    with torch.device(device):
        network: Any = transformers.AutoModelForCausalLM.from_config(shape, dtype=dtype)
        attention.install(network, attention.Choice(backend, "asked for"))
        if kernels:
            patch(network)
        if method != "full":
            network = apply(network, MethodConfig(kind="lora", rank=4, dora=method == "dora"))
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return network.train()
