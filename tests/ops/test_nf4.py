"""NF4 weights unpacked ahead: the same bits, every hit and miss counted, no race of two streams."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.test_patch import adapted, tiny
from tuneloom.kernels import nf4
from tuneloom.kernels.jit import CALLS
from tuneloom.kernels.patch import patch

bitsandbytes = pytest.importorskip("bitsandbytes")
FORWARD = 14
"""Linears of two Llama layers; backward asks for all but the first layer's q, k and v."""
BACKWARD = 11


def packed(linear: nn.Module, *, double: bool = True) -> Any:
    """`linear` in NF4, as BitsAndBytesConfig loads it."""
    out, depth = linear.weight.shape  # type: ignore[misc, union-attr]
    four: Any = bitsandbytes.nn.Linear4bit(
        depth, out, bias=False, quant_type="nf4", compress_statistics=double,
        compute_dtype=torch.float32,
    )  # fmt: skip
    four.load_state_dict({"weight": linear.weight.data})  # type: ignore[union-attr]
    return four.to("cpu")


def quantised(*, double: bool = True, **lora: Any) -> Any:
    """A tiny Llama in NF4 with our layers and adapters; q and gate differ in size."""
    model = tiny("Llama", hidden_size=128, intermediate_size=192)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, packed(linear, double=double))
    patch(model)
    return adapted(model, **lora).train()


def micro_batch(model: Any, seed: int, *, tokens: int = 11) -> Tensor:
    torch.manual_seed(seed)  # of dropout
    batch = torch.randint(1, 61, (2, tokens), generator=torch.Generator().manual_seed(seed))
    logits = model(input_ids=batch).logits
    return functional.cross_entropy(logits.flatten(0, 1), batch.roll(-1, 1).flatten())


def trained(model: Any, *, steps: int = 3, validate: bool = True) -> list[Tensor]:
    """Losses and adapter gradients of steps of two micro-batches, with validation between."""
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    seen: list[Tensor] = []
    for step in range(steps):
        for part in range(2):
            loss = micro_batch(model, 2 * step + part, tokens=11 - part)
            loss.backward()
            seen.append(loss.detach())
        seen += [p.grad.clone() for p in adapters if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        if validate:
            model.eval()
            with torch.no_grad():
                seen += [micro_batch(model, seed) for seed in (50, 51)]
            model.train()
    return seen


def identical(ours: list[Tensor], plain: list[Tensor]) -> bool:
    return len(ours) == len(plain) > 0 and all(map(torch.equal, ours, plain))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    "lora", [{}, {"lora_dropout": 0.3}, {"use_dora": True}], ids=["lora", "dropout", "dora"]
)
def test_steps_with_prefetch_have_the_same_bits_as_without(
    lora: dict[str, Any], double: bool
) -> None:
    plain = trained(quantised(double=double, **lora))
    model = quantised(double=double, **lora)
    prefetch = nf4.install(model)
    CALLS.clear()
    assert identical(trained(model), plain)
    assert CALLS["activation_diet"] == 2 * 3 * 4  # layers, steps, passes
    assert not [reason for reason in CALLS if reason.startswith("not on the diet")]
    assert prefetch.counts["hits"] > 10 * prefetch.counts["misses"]


def test_hits_and_misses_are_counted_exactly() -> None:
    model = quantised()
    prefetch = nf4.install(model)

    def asked(**run: Any) -> tuple[int, int]:
        prefetch.counts.clear()
        trained(model, **run)
        return prefetch.counts["hits"], prefetch.counts["misses"]

    both = FORWARD + BACKWARD
    # Nothing is ahead of the first ask, and of the first backward and its end nothing is known.
    assert asked(steps=1, validate=False) == (2 * both - 1 - BACKWARD - 1, 1 + BACKWARD + 1)
    assert asked(steps=2, validate=False) == (4 * both, 0)
    # The last layer's down is followed by backward, in validation by a forward: wrong twice.
    assert asked(steps=1) == (2 * both + 2 * FORWARD - 1, 1)
    assert asked(steps=1, validate=False) == (2 * both - 1, 1)
    assert asked(steps=1, validate=False) == (2 * both, 0)
    largest = 128 * 192 * 4  # gate, in fp32
    assert prefetch.bytes == 2 * largest


def test_a_changed_order_gives_right_weights_and_is_learned() -> None:
    weights = stack(5)
    wanted = [nf4.unpack(weight) for weight in weights]
    prefetch = nf4.Prefetch(weights)

    def misses(order: list[int]) -> int:
        prefetch.counts.clear()
        for index in order:
            found = prefetch.matrix(weights[index], "forward")
            assert torch.equal(found, wanted[index])
        assert sum(prefetch.counts.values()) == len(order)
        return prefetch.counts["misses"]

    assert misses([0, 1, 2, 3, 4]) == 1
    assert misses([4, 2, 0, 3, 1, 1]) == 6
    assert misses([4, 2, 0, 3, 1, 1]) == 1 + 1  # 1 is followed by 1 or by 4: one of both is wrong
    assert misses([3, 1]) == 1


def stack(count: int) -> list[Tensor]:
    """NF4 weights of different sizes."""
    torch.manual_seed(0)
    return [packed(nn.Linear(64, 64 * (1 + i % 3), bias=False)).weight for i in range(count)]


def test_a_weight_that_changed_since_it_was_unpacked_is_unpacked_again() -> None:
    weights, other = stack(2), packed(nn.Linear(64, 128, bias=False)).weight
    prefetch = nf4.Prefetch(weights)
    prefetch.matrix(weights[0], "forward")  # 1 is ahead
    assert weights[1].shape == other.shape
    weights[1].data, weights[1].quant_state = other.data, other.quant_state  # type: ignore[attr-defined]
    assert torch.equal(prefetch.matrix(weights[1], "forward"), nf4.unpack(other))
    assert prefetch.counts["misses"] == 2
    prefetch.matrix(weights[0], "forward")
    with torch.no_grad():
        weights[1].zero_()
    assert torch.equal(prefetch.matrix(weights[1], "forward"), nf4.unpack(weights[1]))


def test_a_network_and_its_buffers_can_be_let_go() -> None:
    model = quantised()
    prefetch = weakref.ref(nf4.install(model))
    assert nf4.of(model) is prefetch() and nf4.of(quantised()) is None
    micro_batch(model, 0).backward()
    del model
    gc.collect()
    assert prefetch() is None


# Streams


class Event:
    """What a stream had seen when it was recorded: operations done on each stream."""

    def __init__(self, seen: dict[str, int]) -> None:
        self.seen = dict(seen)


class Stream:
    """A stream as a vector clock: which operations of all streams are over before its next one."""

    def __init__(self, name: str, *, deaf: bool = False) -> None:
        self.name, self.deaf = name, deaf
        self.seen = {name: 0}

    def wait_event(self, event: Event) -> None:
        if self.deaf:  # the fault that the checker must find
            return
        for name, count in event.seen.items():
            self.seen[name] = max(self.seen.get(name, 0), count)

    def record_event(self) -> Event:
        return Event(self.seen)

    def operate(self) -> tuple[str, int]:
        self.seen[self.name] += 1
        return self.name, self.seen[self.name]

    def behind(self, operation: tuple[str, int]) -> bool:
        """Whether the next operation here starts after that one is over."""
        name, count = operation
        return self.seen.get(name, 0) >= count


class Schedule:
    """A fake of torch.cuda's streams that holds every read and write of the buffers against
    happens-before, whatever the hardware would make of it.
    """

    def __init__(self, *, deaf: str = "") -> None:
        self.side = Stream("side", deaf=deaf == "side")
        self.main = Stream("main", deaf=deaf == "main")
        self.current = self.main
        self.wrote: dict[int, tuple[str, int]] = {}
        self.used: dict[int, list[tuple[str, int]]] = {}
        self.races: list[str] = []

    def current_stream(self, device: Any) -> Stream:
        return self.current

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def write(self, buffer: int) -> None:
        before = [*self.used.pop(buffer, []), *filter(None, [self.wrote.get(buffer)])]
        if not all(map(self.current.behind, before)):
            self.races.append("written before its last use was over")
        self.wrote[buffer] = self.current.operate()

    def use(self, buffer: int) -> None:
        if not self.current.behind(self.wrote[buffer]):
            self.races.append("used before it was ready")
        self.used.setdefault(buffer, []).append(self.current.operate())


class Reads(TorchDispatchMode):
    """Every operator that is given a buffer uses it, on the stream that is current."""

    def __init__(self, schedule: Schedule, buffers: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.schedule, self.paused = schedule, False
        self.buffers = {buffer.untyped_storage().data_ptr() for buffer in buffers}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.paused and not func.is_view:
            for tensor in filter(torch.is_tensor, [*args, *(kwargs or {}).values()]):
                address = tensor.untyped_storage().data_ptr()
                if address in self.buffers:
                    self.schedule.use(address)
        return func(*args, **(kwargs or {}))


def scheduled(
    monkeypatch: pytest.MonkeyPatch, model: Any, *, deaf: str = "", steps: int = 2
) -> tuple[Schedule, list[Tensor]]:
    """Train under fake streams; returns what they saw, and losses and gradients."""
    schedule = Schedule(deaf=deaf)
    prefetch = nf4.Prefetch([*_weights(model)], side=schedule.side)
    for weight in _weights(model):
        setattr(weight, nf4.PREFETCH, prefetch)
    reads, unpack = Reads(schedule, prefetch.buffers), nf4.unpack

    def watched(weight: Tensor, *, out: Tensor | None = None) -> Tensor:
        if out is not None:
            schedule.write(out.untyped_storage().data_ptr())
        reads.paused = True
        try:
            return unpack(weight, out=out)
        finally:
            reads.paused = False

    monkeypatch.setattr(nf4, "cuda", schedule)
    monkeypatch.setattr(nf4, "unpack", watched)
    with reads:
        seen = trained(model, steps=steps)
    assert sum(map(len, schedule.used.values())) > 0
    return schedule, seen


def _weights(model: Any) -> list[Tensor]:
    return [p for p in model.parameters() if getattr(p, "quant_state", None) is not None]


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_no_buffer_is_written_before_its_last_use_nor_used_before_it_is_ready(
    monkeypatch: pytest.MonkeyPatch, lora: dict[str, Any]
) -> None:
    plain = trained(quantised(**lora), steps=2)
    schedule, seen = scheduled(monkeypatch, quantised(**lora))
    assert schedule.races == []
    assert schedule.side.seen["side"] > 4 * FORWARD  # the side stream did the unpacking
    assert identical(seen, plain)


@pytest.mark.parametrize(
    ("deaf", "race"),
    [("main", "used before it was ready"), ("side", "written before its last use was over")],
)
def test_the_checker_finds_a_wait_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, deaf: str, race: str
) -> None:
    schedule, _ = scheduled(monkeypatch, quantised(), deaf=deaf)
    assert set(schedule.races) == {race}


def test_a_matrix_lent_to_one_stream_is_safe_when_the_next_is_asked_for_on_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    schedule, weights = Schedule(), stack(4)
    prefetch = nf4.Prefetch(weights, side=schedule.side)
    unpack = nf4.unpack

    def watched(weight: Tensor, *, out: Tensor | None = None) -> Tensor:
        if out is not None:
            schedule.write(out.untyped_storage().data_ptr())
        return unpack(weight, out=out)

    monkeypatch.setattr(nf4, "cuda", schedule)
    monkeypatch.setattr(nf4, "unpack", watched)
    buffers = {buffer.untyped_storage().data_ptr() for buffer in prefetch.buffers}
    streams = [schedule.main, Stream("other")]
    order = [0, 1, 2, 3, 0, 2, 1, 3] * 3
    for index, which in enumerate(order):
        with schedule.stream(streams[index * 5 // 3 % 2]):
            address = prefetch.matrix(weights[which], "forward").untyped_storage().data_ptr()
            if address in buffers:
                schedule.use(address)
    assert prefetch.counts["hits"] > 4 and schedule.races == []
