"""What a capture takes of a layer: the same ops on the same shapes for every pack, and no wait for
the device.
"""

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests.train import cpu_graphs
from tests.train.cpu_graphs import PACKS, WAYS, build, pack
from tuneloom.kernels import attention
from tuneloom.train import graphed
from tuneloom.train.batches import MicroBatch
from tuneloom.train.loss import loss_sum
from tuneloom.train.text import decoder_layers

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique", "unique_dim")
Op = tuple[Any, ...]


class Ops(TorchDispatchMode):
    """Every op with what it is given, tensors by shape, strides, type and device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Op] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        leaves = pytree.tree_leaves((args, kwargs or {}))
        self.seen.append((func._schema.name, *map(_described, leaves)))
        return func(*args, **(kwargs or {}))

    def waits(self) -> list[Op]:
        """Ops whose result a host must know to go on, and those that leave a device."""
        return [op for op in self.seen if _waits(op)]


def _described(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device.type
    return repr(leaf) if isinstance(leaf, torch.dtype | torch.device) else leaf


def _waits(op: Op) -> bool:
    name = op[0].split("::")[1]
    tensors = [part for part in op[1:] if isinstance(part, tuple) and len(part) == 4]
    devices = {device for shape, _, _, device in tensors if shape}
    by_mask = name == "index" and any(kind == torch.bool for _, _, kind, _ in tensors)
    return name in WAITS or by_mask or len(devices) > 1


def captured_ops(
    network: Any, micro: MicroBatch, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Op], list[Op]]:
    """What a capture of the layers after this pack would record, forward and backward, and the
    waits among it.
    """
    ops = Ops()

    def record(functions: tuple[Any, ...], samples: tuple[Any, ...]) -> tuple[Any, ...]:
        for function, static in zip(functions, samples, strict=True):
            wanted = [t for t in static if t.requires_grad]
            with ops:
                out = function(*static)
                torch.autograd.grad(out, wanted, torch.empty_like(out))
        return functions

    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "make_graphed_callables", record)
        graphed.capture(network, micro.model_inputs())
    return ops.seen, ops.waits()


@pytest.mark.parametrize(("method", "kernels"), WAYS)
def test_a_layer_is_the_same_ops_for_every_pack_and_waits_for_nothing(
    method: str, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_by_document", cpu_graphs.dense)
    found = []
    for lengths in PACKS:
        seen, waits = captured_ops(build(method, kernels=kernels), pack(lengths), monkeypatch)
        assert waits == [] and len(seen) > 100
        found.append(seen)
    assert all(seen == found[0] for seen in found)


def on_meta(micro: MicroBatch) -> MicroBatch:
    moved = {k: v.to("meta") for k, v in vars(micro).items() if isinstance(v, Tensor)}
    return MicroBatch(**(vars(micro) | moved))


@pytest.mark.parametrize("kernels", [False, True])
def test_the_code_around_varlen_waits_for_nothing(
    kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, whose tensors have no numbers to wait for: reading one is an error."""
    found = []
    for lengths in PACKS[:2]:
        network = build(kernels=kernels, backend="varlen", device="meta")
        seen, waits = captured_ops(network, on_meta(pack(lengths)), monkeypatch)
        assert waits == []
        found.append(seen)
    assert found[0] == found[1]
    names = {op[0] for op in found[0]}
    assert {"torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward"} <= names


def test_torchs_own_capture_takes_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checks, warm-up and both passes, on a CUDA that does nothing: every input that wants a
    gradient is used, and gradients reach the parameters, not their aliases.
    """
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    for name in ("graph", "stream", "Stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(attention, "_by_document", cpu_graphs.dense)
    network = build()
    graphs = graphed.capture(network, pack(()).model_inputs())
    loss_sum(network, pack(PACKS[0])).backward()
    assert len(graphs.replays) == 3
    assert all((p.grad is not None) == p.requires_grad for p in network.parameters())


def accumulators(out: Tensor) -> set[Any]:
    """AccumulateGrad nodes that a backward from `out` reaches."""
    reached, left = set(), [out.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in reached:
            reached.add(node)
            left += [after for after, _ in node.next_functions]
    return {node for node in reached if type(node).__name__ == "AccumulateGrad"}


def test_a_capture_reaches_no_node_that_deepspeed_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """One made on the default stream would break it."""
    monkeypatch.setattr(attention, "_by_document", cpu_graphs.dense)
    network = build()
    trained = [p for p in network.parameters() if p.requires_grad]
    held = set().union(*(accumulators(p.view_as(p)) for p in trained))
    assert accumulators(loss_sum(network, pack(PACKS[0]))) == held
    reached: set[Any] = set()

    def record(functions: tuple[Any, ...], samples: tuple[Any, ...]) -> tuple[Any, ...]:
        for function, static in zip(functions, samples, strict=True):
            reached.update(accumulators(function(*static)))
        return functions

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    graphed.capture(network, pack(()).model_inputs())
    assert len(reached) >= len(trained) and not reached & held


def test_the_check_finds_attention_by_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads the documents' lengths, which a meta tensor lacks."""
    with pytest.raises(NotImplementedError, match="meta tensor"):
        captured_ops(build(device="meta"), on_meta(pack(PACKS[0])), monkeypatch)


def test_the_check_finds_packs_of_other_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_by_document", cpu_graphs.dense)
    one, other = (
        captured_ops(build(), pack(lengths, frame=None), monkeypatch)[0] for lengths in PACKS[:2]
    )
    assert one != other


@pytest.mark.parametrize("read", [lambda x: x * float(x.sum()), lambda x: x * bool(x.sum() > 0)])
def test_the_check_finds_a_number_that_is_read(
    read: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_by_document", cpu_graphs.dense)
    network = build()
    norm = decoder_layers(network)[1].input_layernorm
    plain = norm.forward
    norm.__dict__["forward"] = lambda x: read(plain(x))
    _, waits = captured_ops(network, pack(PACKS[0]), monkeypatch)
    assert waits


@pytest.mark.parametrize("kernels", [False, True])
def test_a_whole_micro_batch_waits_for_nothing(
    kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_by_document", cpu_graphs.dense)
    network, micro, ops = build(kernels=kernels), pack(PACKS[0]), Ops()
    with ops:
        loss_sum(network, micro).backward()
    assert ops.waits() == []
    unknown = MicroBatch(**(vars(micro) | {"kept": None}))
    with ops:
        loss_sum(network, unknown)
    assert {op[0] for op in ops.waits()} >= {"aten::nonzero"}
