"""B6, B9 and B10: whole LoRA steps on random weights, ours against PEFT at default and at best.

A step is forward, summed token loss, backward and a fused AdamW over the adapters. All contenders
train the same tokens, the same adapters and (through kernels/attention.py) the same attention; they
differ in ops and in what they keep or recompute. Speeds are compared within one precision of the
base; the headline is against the best peer.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import itertools
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional

from benchmarks.gpu.timing import UNLIKE, Plan, agreement, ceilings, device, failure, interleave
from tuneloom.kernels import nf4
from tuneloom.kernels.attention import NAME
from tuneloom.kernels.fp8 import CAPABILITY, hold_linears
from tuneloom.train import graphed

PUBLISHED_BF16 = 989.4
"""TFLOP/s of an H100 or H200, dense, from its data sheet: the M of MFU."""


Step = Callable[[Tensor], object]


@dataclass(frozen=True)
class Shape:
    """A Llama-like model by its sizes, and the micro-batch it steps on."""

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    key_heads: int
    classes: int
    rows: int
    length: int
    rank: int = 16
    head: int = 128


LLAMA_8B = Shape("llama-3-8b", 32, 4096, 14336, 32, 8, 128256, 2, 4096)
LLAMA_1B = Shape("llama-3.2-1b", 16, 2048, 8192, 32, 8, 128256, 1, 4096, head=64)
QWEN_06B = Shape("qwen3-0.6b sizes", 28, 1024, 3072, 16, 8, 151936, 1, 2048)
TINY = Shape("tiny", 2, 32, 48, 4, 2, 61, 2, 16, rank=4, head=8)


@dataclass(frozen=True)
class Way:
    """How a contender trains."""

    ours: bool = False
    augmented: bool = False
    recompute: bool = False
    liger: bool = False
    compiled: bool = False
    graphs: bool = False
    nf4: bool = False
    prefetch: bool = False
    fp8: bool = False
    exact: bool = False
    """fp32 throughout: the truth of the parity gate."""

    @property
    def base(self) -> str:
        """Precision of the frozen base."""
        return "NF4" if self.nf4 else "FP8" if self.fp8 else "bf16"


STEP_WAYS = {
    "ours": Way(ours=True),
    "ours, augmented": Way(ours=True, augmented=True),
    "PEFT, its default (recompute)": Way(recompute=True),
    "PEFT, kept activations": Way(),
    "PEFT, Liger": Way(liger=True),
}
SMALL_WAYS = {
    **STEP_WAYS,
    "ours, CUDA graphs": Way(ours=True, graphs=True),
    "PEFT, torch.compile": Way(compiled=True),
}
"""torch.compile only where its cold start fits ten minutes."""
LOW_WAYS = {
    "ours, bf16": Way(ours=True),
    "ours, FP8": Way(ours=True, fp8=True),
    "ours, NF4": Way(ours=True, nf4=True),
    "ours, NF4, prefetch": Way(ours=True, nf4=True, prefetch=True),
    "PEFT, NF4 (recompute)": Way(recompute=True, nf4=True),
    "PEFT, NF4, kept activations": Way(nf4=True),
}


def run_step(plan: Plan, dry: bool) -> dict[str, Any]:
    """B6."""
    return _compare(TINY if dry else LLAMA_8B, STEP_WAYS, plan)


def run_small(plan: Plan, dry: bool) -> dict[str, Any]:
    """B9: a model so small that launches, not products, take the time."""
    return _compare(TINY if dry else QWEN_06B, SMALL_WAYS, plan)


def run_1b(plan: Plan, dry: bool) -> dict[str, Any]:
    """B9, the next size."""
    return _compare(TINY if dry else LLAMA_1B, SMALL_WAYS, plan)


def run_reach(plan: Plan, dry: bool) -> dict[str, Any]:
    """B9: the most tokens of one 8B micro-batch that fit, by way of training."""
    shape = TINY if dry else LLAMA_8B
    grain, most = (16, 4) if dry else (2048, 64)
    names = ("ours", "PEFT, kept activations", "PEFT, its default (recompute)")
    tokens = {name: grain * _most(shape, STEP_WAYS[name], grain, most) for name in names}
    return {"shape": shape.name, "grain": grain, "most_tried": grain * most, "tokens": tokens}


def _most(shape: Shape, way: Way, grain: int, most: int) -> int:
    """Largest multiple of `grain`, by bisection, whose step fits; the second has Adam's state."""
    _release()
    with _built(shape, way) as step:
        low, high = 0, most + 1
        while high - low > 1:
            middle = (low + high) // 2
            ids = _ids(shape, 1, middle * grain)
            if _fits(step, ids):
                low = middle
            else:
                high = middle
    return low


def _fits(step: Step, ids: Tensor) -> bool:
    try:
        for _ in range(2):
            step(ids)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        _release()


def run_low_precision(plan: Plan, dry: bool) -> dict[str, Any]:
    """B10: a base in FP8, with its agreement with fp32 beside bf16's, and in NF4, which
    is unpacked where it is used or ahead of it.
    """
    shape = replace(TINY, width=128, inner=128, head=32) if dry else LLAMA_8B
    return _compare(shape, LOW_WAYS, plan)


def _compare(shape: Shape, ways: dict[str, Way], plan: Plan) -> dict[str, Any]:
    """One contender at a time holds the GPU; blocks are interleaved by building it again. What
    fails, or fails its gate, has no row.
    """
    ceiling = ceilings(plan)
    truth = _first_step(shape, Way(exact=True))
    calls: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    gates: dict[str, Any] = {}
    not_run = {name: reason for name, way in ways.items() if (reason := _missing(way))}
    for _, (name, way) in itertools.product(range(plan.blocks), ways.items()):
        if name in not_run:
            continue
        try:
            if name not in gates:
                gates[name] = _gate(shape, way, truth)
            if gates[name]["passed"]:
                calls[name].append(_block(shape, way, plan))
            else:
                not_run[name] = UNLIKE
        except Exception as error:
            not_run[name] = failure(error)
            if way.ours and not isinstance(error, torch.OutOfMemoryError):
                traceback.print_exception(error)
        _release()
    tokens = shape.rows * shape.length
    flops = flops_per_token(shape) * tokens
    rows = {}
    for name, blocks in calls.items():
        if name in not_run:
            continue
        ms = sorted(b["median_ms"] for b in blocks)[len(blocks) // 2]
        reached = flops / ms / 1e9
        rows[name] = {
            "blocks": blocks,
            "median_ms": ms,
            "tokens_per_second": round(tokens / ms * 1e3, 1),
            "of_matmul_ceiling": round(reached / ceiling["matmul_tflops"], 4),
            "mfu": round(reached / PUBLISHED_BF16, 4),
        }
    return {
        "shape": vars(shape),
        "ceilings": ceiling,
        "parity": gates,
        "rows": rows,
        "not_run": not_run,
        "ratios": ratios({n: row["tokens_per_second"] for n, row in rows.items()}, ways),
    }


def _gate(shape: Shape, way: Way, exact: dict[str, Tensor]) -> dict[str, float | bool]:
    """Against float32, or with an NF4 base, which is another model, against PEFT's."""
    truth = _first_step(shape, Way(nf4=True)) if way.nf4 else exact
    least = 0.99 if way.fp8 else 0.999  # both operands of a product rounded by 2.6 %
    return agreement(_first_step(shape, way), truth, least=least)


def _block(shape: Shape, way: Way, plan: Plan) -> dict[str, Any]:
    """One block of one contender, with the seconds its first step took and, of torch.compile, how
    many graphs it made.
    """
    with _built(shape, way) as step:
        ids = _ids(shape, shape.rows, shape.length)
        start = time.perf_counter()
        step(ids)
        cold = time.perf_counter() - start
        times = interleave({"step": lambda: step(ids)}, replace(plan, blocks=1))["step"]
        graphs = {"graphs": counters["stats"]["unique_graphs"]} if way.compiled else {}
    return {**times.as_dict(), "first_step_s": round(cold, 2), **graphs}


def ratios(speeds: dict[str, float], ways: dict[str, Way]) -> dict[str, float]:
    """The best of ours over each peer of the same base, and over the best of ours in bf16."""
    best: dict[str, float] = {}
    for name, speed in speeds.items():
        if ways[name].ours:
            best[ways[name].base] = max(speed, best.get(ways[name].base, 0.0))
    found = {
        f"ours / {name}": round(best[ways[name].base] / speed, 3)
        for name, speed in speeds.items()
        if not ways[name].ours and ways[name].base in best
    }
    low = {base: speed for base, speed in best.items() if base != "bf16" and "bf16" in best}
    return found | {
        f"ours {base} / ours bf16": round(v / best["bf16"], 3) for base, v in low.items()
    }


def flops_per_token(shape: Shape) -> float:
    """4 N + 6 n + causal attention (3 passes of 2 products over half the square) + 4 V d."""
    kv = shape.key_heads * shape.head
    q = shape.heads * shape.head
    pairs = [(shape.width, q), (shape.width, kv), (shape.width, kv), (q, shape.width)]
    pairs += [(shape.width, shape.inner)] * 2 + [(shape.inner, shape.width)]
    base = sum(a * b for a, b in pairs)
    adapters = sum(shape.rank * (a + b) for a, b in pairs)
    attention = 3 * 2 * shape.length * q
    return shape.layers * (4 * base + 6 * adapters + attention) + 4 * shape.classes * shape.width


def _missing(way: Way) -> str:
    if way.liger and not (torch.cuda.is_available() and importlib.util.find_spec("liger_kernel")):
        return "liger-kernel needs to be installed, and a GPU"
    if (way.compiled or way.graphs) and not torch.cuda.is_available():
        return "needs a GPU"
    if way.fp8 and torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY:
        return "the GPU has no FP8 products"
    if way.nf4 and not importlib.util.find_spec("bitsandbytes"):
        return "bitsandbytes is not installed"
    return ""


def _model(shape: Shape, way: Way) -> Any:
    """Random weights from a seed, adapters on all linears, attention installed, ops put in."""
    import transformers
    from peft import LoraConfig, get_peft_model

    from tuneloom.kernels import attention
    from tuneloom.kernels.patch import patch

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head,
        vocab_size=shape.classes,
        tie_word_embeddings=False,
        use_cache=False,
    )
    if way.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(fused_linear_cross_entropy=False)
    with device():
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    kind = torch.float32 if way.exact else torch.bfloat16
    choice = attention.choose("auto", dtype=kind, head_dim=shape.head, softcap=None)
    attention.install(model, choice)
    if way.nf4:
        _quantise(model)
    if way.fp8:
        hold_linears(model)
    if way.ours:
        patch(model)
    lora = LoraConfig(r=shape.rank, lora_alpha=2 * shape.rank, target_modules="all-linear")
    if way.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at start, which would hide a wrong gradient of A
            torch.nn.init.normal_(parameter, std=0.02)
    if way.exact:
        model.float()
    if way.augmented:
        from tuneloom.kernels.augmented_lora import augment

        augment(model)
    if way.prefetch:
        nf4.install(model)
    return model.train()


def _quantise(model: Any) -> None:
    """Every linear of the layers in NF4, as BitsAndBytesConfig does when it loads."""
    from bitsandbytes.nn import Linear4bit

    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if not isinstance(linear, torch.nn.Linear):
                    continue
                depth, out = linear.in_features, linear.out_features
                four: Any = Linear4bit(
                    depth, out, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16
                )
                four.load_state_dict({"weight": linear.weight.data.cpu()})
                setattr(part, name, four.to(device()))


@contextlib.contextmanager
def _built(shape: Shape, way: Way) -> Iterator[Step]:
    """A callable that takes one optimizer step on ids."""
    with _own_llama(), _compiling():
        model = _model(shape, way)
        if way.graphs:
            graphed.capture(model, {"input_ids": _ids(shape, shape.rows, shape.length)})
        adapters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(adapters, lr=1e-4, fused=torch.cuda.is_available() or None)
        network = _compiled(model) if way.compiled else model

        def step(ids: Tensor) -> None:
            optimizer.zero_grad()
            _loss(network, model, ids, way).backward()
            optimizer.step()

        yield step


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Past its limit of graphs Dynamo would go on uncompiled without a word."""
    with torch._dynamo.config.patch(disable=False, fail_on_recompile_limit_hit=True):
        yield


def _compiled(model: Any) -> Any:
    """Attention stays outside: Dynamo would guard on the count of its calls, and compile anew at
    every step.
    """
    from transformers import AttentionInterface

    torch.compiler.reset()
    counters.clear()
    AttentionInterface.register(NAME, torch.compiler.disable(AttentionInterface()[NAME]))
    return torch.compile(model, dynamic=False)


@contextlib.contextmanager
def _own_llama() -> Iterator[None]:
    """Liger replaces names in transformers' module; give them back."""
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    try:
        yield
    finally:
        vars(modeling_llama).update(before)


def _ids(shape: Shape, rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, shape.classes, (rows, length), generator=generator).to(device())


def _loss(network: Any, model: Any, ids: Tensor, way: Way) -> Tensor:
    labels = ids.roll(-1, 1)
    if way.ours:
        from tuneloom.kernels.loss_head import loss_from_head

        with loss_from_head(model, labels) as fused:
            assert fused
            out: Tensor = network(input_ids=ids).logits
        return out / labels.numel()
    if way.liger:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        hidden = model.get_base_model().model(input_ids=ids).last_hidden_state.flatten(0, 1)
        head = model.get_output_embeddings().weight
        mean: Tensor = LigerFusedLinearCrossEntropyLoss()(head, hidden, labels.flatten())
        return mean
    logits = network(input_ids=ids).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def _first_step(shape: Shape, way: Way) -> dict[str, Tensor]:
    """Loss and adapter gradients of two layers and at most 256 tokens, for the parity gate."""
    small = replace(shape, layers=2)
    with _own_llama(), _compiling():
        model = _model(small, way)
        ids = _ids(small, 1, min(shape.length, 256))
        if way.graphs:
            graphed.capture(model, {"input_ids": ids})
        loss = _loss(_compiled(model) if way.compiled else model, model, ids, way)
        loss.backward()
        named = model.named_parameters()
        found = {n: p.grad.detach().cpu() for n, p in named if p.grad is not None}
    return {"loss": loss.detach().cpu(), **found}


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
