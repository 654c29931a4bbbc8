"""Decoder layers as CUDA graphs: a layer's forward is one launch, and so is its backward.

A LoRA layer is 80 ops forward and up to 125 backward (views not counted), and where it is small a
GPU waits for their launches. Layers are captured in order into one pool of memory
(torch.cuda.make_graphed_callables, as Megatron does) before the first step, from packs of one shape
(batches.Frame). Embedding, RoPE's tables, the loss, DeepSpeed's gradient hooks and the optimizer
stay outside. What the layers share (cos, sin, cu_seqlens, positions) is copied once a micro-batch;
the hidden state once a layer. Only training replays: the probe, validation and samples run the
layers as they are. A call that a graph does not fit is an error, never an uncaptured layer.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from tuneloom.errors import ConfigError, RefusedError
from tuneloom.kernels import attention, jit
from tuneloom.train.config import ModelConfig
from tuneloom.train.model import choose_attention, moe_blocks
from tuneloom.train.text import decoder_layers

SEEN: Counter[str] = Counter()
"""Replays of a layer's forward since `SEEN.clear()`; effects.json is written from it."""
STATIC = ("flash", "varlen")
"""Backends whose shapes follow the pack's, not its documents'."""
COUNTERS = (attention.CALLS, jit.CALLS)
Forward = Callable[..., Tensor]


def refuse(network: nn.Module, model: ModelConfig, device: torch.device) -> None:
    """Raise RefusedError without CUDA, ConfigError for a model whose layers cannot be captured."""
    if device.type != "cuda":
        raise RefusedError(
            f"model.cuda_graphs: CUDA graphs need an NVIDIA GPU, this is {device.type}; set "
            "model.cuda_graphs=false"
        )
    backend = choose_attention(network, model).backend
    if backend not in STATIC:
        raise ConfigError(
            f"model.cuda_graphs: model.attention={model.attention} is {backend} here, whose shapes "
            "follow the documents of a pack; set model.dtype=bf16 and model.attention=varlen, or "
            "model.cuda_graphs=false"
        )
    layers = decoder_layers(network)
    if not layers or moe_blocks(network):
        raise ConfigError(
            f"model.cuda_graphs: {type(network).__name__} has no decoder layers that are known, or "
            "routes tokens to experts, as many each as a batch brings; set model.cuda_graphs=false"
        )
    if any(isinstance(m, nn.Dropout) and m.p > 0 for layer in layers for m in layer.modules()):
        raise ConfigError(
            f"model.cuda_graphs: the layers of {type(network).__name__} drop activations out, and "
            "the masks of a resumed run would be others; set model.cuda_graphs=false"
        )


@dataclass(frozen=True)
class Place:
    """Of an argument that every micro-batch brings anew: which shared buffer it is copied to."""

    index: int


class Call:
    """One layer's arguments behind the hidden state: tensors by place, all else as it stays."""

    def __init__(self, arguments: Any, buffers: dict[int, Tensor]) -> None:
        """`buffers`: copies of all tensors seen, by identity; those of this call are added."""
        leaves, self.spec = pytree.tree_flatten(arguments)
        self.leaves: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                buffers.setdefault(id(leaf), leaf.detach().clone())
                self.leaves.append(Place(list(buffers).index(id(leaf))))
            else:
                self.leaves.append(leaf)
        self.places = list(dict.fromkeys(at.index for at in self.leaves if isinstance(at, Place)))

    def filled(self, tensors: tuple[Tensor, ...]) -> Any:
        """The arguments again, with these tensors, one for each of `places`."""
        by_place = dict(zip(self.places, tensors, strict=True))
        leaves = [by_place[at.index] if isinstance(at, Place) else at for at in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)


class Captured(nn.Module):
    """One layer as a function of tensors alone: all that a capture can take."""

    def __init__(self, layer: nn.Module, plain: Forward, hidden: Tensor, call: Call) -> None:
        super().__init__()
        self.layer, self.plain, self.call = layer, plain, call
        self.hidden = [hidden]  # (1, T, D), the static input; in a list, as it is no parameter
        self.names = [name for name, _ in self.named_parameters()]
        self.held = list(layer.parameters())
        self.counts: tuple[Counter[str], ...] = ()
        """What one forward adds to COUNTERS, which a replay must add in its place."""

    def forward(self, hidden: Tensor, *tensors: Tensor) -> Tensor:
        before = [counter.copy() for counter in COUNTERS]
        args, kwargs = self.call.filled(tensors)
        out = self.plain(hidden, *args, **kwargs)
        self.counts = tuple(now - then for now, then in zip(COUNTERS, before, strict=True))
        for counter, then in zip(COUNTERS, before, strict=True):
            counter.clear()
            counter.update(then)
        return out

    def of_tensors(self, hidden: Tensor, *rest: Tensor) -> Tensor:
        """`forward` with the parameters as arguments, behind the shared tensors."""
        shared = len(self.call.places)
        parameters = dict(zip(self.names, rest[shared:], strict=True))
        out: Tensor = functional_call(self, parameters, (hidden, *rest[:shared]))
        return out

    def sample(self, buffers: list[Tensor]) -> tuple[Tensor, ...]:
        """The static inputs of a capture.

        Parameters are aliases, leaves of their own: DeepSpeed holds the AccumulateGrad nodes of the
        parameters, made on the default stream, and a capture that reaches one breaks (torch's
        docs, set_warn_on_accumulate_grad_stream_mismatch).
        """
        aliases = [p.detach().requires_grad_(p.requires_grad) for p in self.held]
        return (*self.hidden, *(buffers[place] for place in self.call.places), *aliases)


class Graphs:
    """The captured layers of one rank, replayed in their order, micro-batch after micro-batch."""

    def __init__(
        self, captured: list[Captured], buffers: list[Tensor], replays: tuple[Forward, ...]
    ) -> None:
        self.captured, self.buffers, self.replays = captured, buffers, replays
        self.seconds, self.gib = 0.0, 0.0
        """What capturing took, and what the graphs hold until the run ends."""
        self._sources: dict[int, Tensor] = {}  # what each buffer holds now
        self._next = 0

    def run(self, index: int, *args: Any, **kwargs: Any) -> Tensor:
        """Layer `index`: its graph in training, its own code otherwise."""
        layer = self.captured[index]
        if not (layer.layer.training and torch.is_grad_enabled()):
            return layer.plain(*args, **kwargs)
        if index == 0:
            self._sources, self._next = {}, 0
        assert index == self._next, f"layer {index} runs where {self._next} was captured"
        self._next += 1
        hidden, *rest = args
        expected = layer.hidden[0]
        assert _alike(hidden, expected), f"{hidden.shape} where {expected.shape} was captured"
        tensors = self._fill(layer.call, (tuple(rest), kwargs))
        out = self.replays[index](hidden, *tensors, *layer.held)
        SEEN["replays"] += 1
        for counter, counts in zip(COUNTERS, layer.counts, strict=True):
            counter.update(counts)
        return out

    def _fill(self, call: Call, arguments: Any) -> list[Tensor]:
        """The call's shared buffers, each written by the first layer that asks for it."""
        leaves, spec = pytree.tree_flatten(arguments)
        assert spec == call.spec, f"{spec} where {call.spec} was captured"
        for leaf, known in zip(leaves, call.leaves, strict=True):
            if isinstance(known, Place):
                self._copy(known.index, leaf)
            else:
                assert leaf == known, f"{leaf} where {known} was captured"
        return [self.buffers[place] for place in call.places]

    def _copy(self, place: int, tensor: Tensor) -> None:
        source, buffer = self._sources.get(place), self.buffers[place]
        if source is not None:
            assert source is tensor, "layers that were captured with one tensor run with two"
            return
        assert _alike(tensor, buffer), f"{tensor.shape} where {buffer.shape} was captured"
        buffer.copy_(tensor)
        self._sources[place] = tensor


def capture(network: nn.Module, inputs: dict[str, Any], *, accumulation: int = 1) -> Graphs:
    """Capture every decoder layer as this forward pass of `network` calls it, and install the
    graphs. `accumulation`: backward passes between two optimizer steps.
    """
    started = time.monotonic()
    captured, buffers = _rehearse(network, inputs)
    before = _reserved()
    samples = tuple(layer.sample(buffers) for layer in captured)
    functions = tuple(layer.of_tensors for layer in captured)
    replays: Any = torch.cuda.make_graphed_callables(functions, samples)
    graphs = Graphs(captured, buffers, replays)
    graphs.seconds = round(time.monotonic() - started, 2)
    graphs.gib = round((_reserved() - before) / 2**30, 3)
    for index, layer in enumerate(captured):
        layer.layer.__dict__["forward"] = partial(graphs.run, index)
        if accumulation > 1:
            for parameter in layer.held:
                if parameter.requires_grad:
                    parameter.register_hook(partial(_own, parameter))
    return graphs


def _reserved() -> int:
    """Bytes that PyTorch holds of the GPU, what it keeps unused given back first: the graphs' pool
    takes no block of the ordinary one.
    """
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def _own(parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    """A first gradient that the next replay does not overwrite: autograd takes it over as .grad
    without a copy, and a graph returns the same memory each time.
    """
    return gradient.clone() if parameter.grad is None else gradient


def _rehearse(network: nn.Module, inputs: dict[str, Any]) -> tuple[list[Captured], list[Tensor]]:
    """One forward pass that notes how each layer is called, and keeps no activations."""
    found: list[Captured] = []
    buffers: dict[int, Tensor] = {}
    alive: list[Any] = []  # an id names a tensor for as long as it lives

    def note(layer: nn.Module, plain: Forward, *args: Any, **kwargs: Any) -> Tensor:
        hidden, *rest = args
        alive.append((args, kwargs))
        call = Call((tuple(rest), kwargs), buffers)
        static = hidden.detach().clone().requires_grad_(hidden.requires_grad)
        found.append(Captured(layer, plain, static, call))
        with torch.no_grad():
            out = plain(*args, **kwargs)
        if not isinstance(out, Tensor):
            raise ConfigError(
                f"model.cuda_graphs: {type(layer).__name__} returns more than the hidden state; "
                "set model.cuda_graphs=false"
            )
        trained = hidden.requires_grad or any(p.requires_grad for p in layer.parameters())
        return out.detach().requires_grad_(trained)

    with _listened(decoder_layers(network), note):
        network(**inputs, logits_to_keep=1)
    assert found, "a forward pass that reached no layer"
    return found, list(buffers.values())


@contextmanager
def _listened(layers: list[nn.Module], note: Callable[..., Tensor]) -> Iterator[None]:
    """`note(layer, its forward, ...)` in place of every layer's forward."""
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.__dict__["forward"] = partial(note, layer, layer.forward)
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.__dict__["forward"]
            if own is not None:
                layer.__dict__["forward"] = own


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether a copy of one into the other changes neither its shape nor its type."""
    return one.shape == other.shape and one.dtype == other.dtype
