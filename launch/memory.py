"""Memory of one rank: what each ZeRO stage, method and optimizer holds, and the peaks in between.

Formulas follow train/zero.py and the source of DeepSpeed 0.19.8: P base parameters, A trained
ones, b bytes a weight, n ranks; masters and moments in fp32 (ZeRO, arXiv 1910.02054).
Not modelled: fragmentation, for which `USABLE` leaves room.
"""

import math
from dataclasses import dataclass, fields

from tuneloom.launch.anatomy import Anatomy, Saved
from tuneloom.train.config import ADAPTER_BUCKET, MethodConfig, OptimConfig, TrainConfig

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
USABLE = 0.95
"""Share of a device that a plan may fill; the rest is fragmentation."""
GPU_CONTEXT = 1536 * 2**20
"""CUDA context, cuBLAS workspace, NCCL buffers of a rank: estimate, about 1.5 GiB on an H100."""
PROCESS = 700 * 2**20
"""Resident Python, torch, transformers, PEFT and DeepSpeed of one CPU rank: measured 0.66 GiB."""
BUCKET = 500_000_000
"""DeepSpeed's reduce_bucket_size: elements of the staging buffer, allocated whole on a GPU."""
MAX_LIVE = 1_000_000_000
"""stage3_max_live_parameters: gathered elements that ZeRO-3 keeps for reuse."""
PREFETCH = 50_000_000
SWAP_TENSORS, SWAP_ELEMENTS = 4, 500_000_000
"""Host buffers of NVMe offload, DeepSpeed's defaults: 4 of a sub-group's state, 5 x 1e8 weights."""
MEMORY_STEPS = 3
NF4_BLOCK, NESTED_BLOCK, MOMENT_BLOCK = 64, 256, 256


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one rank, then on its host and drive."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss_head: int
    temporary: int
    """Peaks beside the steady parts: reduce buckets, ZeRO-3 gathers, casts at the step."""
    context: int
    host: int
    """Host memory that offload and copies of the state take, per rank."""
    nvme: int

    @property
    def device(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self) if f.name not in ("host", "nvme"))


def forecast(
    config: TrainConfig,
    anatomy: Anatomy,
    saved: Saved,
    *,
    ranks: int,
    cuda: bool,
    several_hosts: bool = False,
) -> Memory:
    """Bytes of one rank of `ranks` under `config`."""
    shards = ranks if config.zero.stage >= 1 else 1
    optimizer = optimizer_bytes(config, anatomy) // shards
    weights = weight_bytes(config, anatomy) + unpacked_bytes(config, anatomy)
    if config.zero.stage == 3:
        weights //= ranks
    gradients = gradient_bytes(config, anatomy, ranks)
    host, nvme = offloaded_inputs(config, saved), 0
    if config.zero.offload != "none":
        host += _fp32(anatomy.trainable) // ranks  # the summed gradients move too
        if config.zero.offload == "cpu":
            host += optimizer
        else:
            nvme += optimizer
            host += SWAP_TENSORS * _fp32(min(anatomy.trainable // ranks, MAX_LIVE))
        optimizer = gradients = 0
    if config.zero.offload_parameters == "cpu":
        host, weights = host + weights, 0
    elif config.zero.offload_parameters == "nvme":
        host += BYTES[config.model.dtype] * SWAP_ELEMENTS
        nvme, weights = nvme + weights, 0
    host += copies_kept(config, several_hosts=several_hosts) * (
        checkpoint_bytes(config, anatomy) // shards
    )
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activation_bytes(config, saved)
        + working_bytes(config, anatomy, cuda=cuda)
        + captured_bytes(config, anatomy, saved),
        loss_head=loss_head_bytes(config, anatomy, saved, cuda=cuda),
        temporary=temporary_bytes(config, anatomy, ranks, cuda=cuda),
        context=GPU_CONTEXT if cuda else PROCESS,
        host=host,
        nvme=nvme,
    )


def copies_kept(config: TrainConfig, *, several_hosts: bool) -> int:
    """Of a rank's part of a checkpoint, in host memory: the one being saved beside training; two
    steps and the one being written, and on several hosts as many of another rank's.
    """
    kept = int(config.checkpoint.asynchronous)
    if config.checkpoint.memory_every:
        kept += MEMORY_STEPS * (2 if several_hosts else 1)
    return kept


def weight_bytes(config: TrainConfig, anatomy: Anatomy) -> int:
    """The whole model: base in `model.dtype` (its linears in NF4 for QLoRA, in FP8 where asked) and
    adapters beside it.
    """
    width = BYTES[config.model.dtype]
    adapters = 0 if config.method.kind == "full" else anatomy.trainable
    rest = anatomy.base - anatomy.linear
    if (
        config.model.fp8 and config.method.kind == "lora"
    ):  # a scale of 4 bytes a row is less than a thousandth
        return anatomy.linear + width * (rest + adapters)
    if config.method.kind != "qlora":
        return width * (anatomy.base + adapters)
    return nf4_bytes(anatomy.linears, config.method) + width * (rest + adapters)


def nf4_bytes(linears: tuple[int, ...], method: MethodConfig) -> int:
    """Packed NF4: half a byte an element, and block constants, themselves in 8 bits when doubled.

    bitsandbytes 0.50.2: blocks of 64, nested blocks of 256, a 16-entry and a 256-entry code.
    """
    total = 0
    for elements in linears:
        blocks = math.ceil(elements / NF4_BLOCK)
        constants = 4 * blocks
        if method.double_quantisation:
            constants = blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + 4 * 256 + 4
        total += math.ceil(elements / 2) + constants + 4 * 16
    return total


def unpacked_bytes(config: TrainConfig, anatomy: Anatomy) -> int:
    """The largest linear twice, as a matrix, where NF4 is unpacked ahead (kernels/nf4.py)."""
    return 2 * BYTES[config.model.dtype] * max(anatomy.linears) if config.method.prefetch else 0


def optimizer_bytes(config: TrainConfig, anatomy: Anatomy) -> int:
    """fp32 masters and moments of everything trained, before sharding."""
    trained = anatomy.trainable
    plain = config.zero.stage == 0 and config.model.dtype == "fp32"
    masters = 0 if plain else _fp32(trained)  # ZeRO clones fp32 weights into its partitions, too
    return masters + moment_bytes(config.optim, trained, anatomy.matrices)


def moment_bytes(optim: OptimConfig, trained: int, matrices: int) -> int:
    """AdamW: two in fp32. 8-bit: two in 1 byte, a constant per 256. Muon: one for a matrix."""
    if optim.name == "adamw8bit":
        return 2 * (trained + _fp32(math.ceil(trained / MOMENT_BLOCK)))
    if optim.name == "muon":
        return _fp32(matrices) + 2 * _fp32(trained - matrices)
    return 2 * _fp32(trained)


def gradient_bytes(config: TrainConfig, anatomy: Anatomy, ranks: int) -> int:
    """Gradients that live from the first micro-batch to the step.

    ZeRO-0 in half precision keeps them in that precision and casts at the step. ZeRO-1 in half
    precision sums whole fp32 gradients beside those of backward (BF16_Optimizer); in fp32 it keeps
    whole ones only to accumulate. ZeRO-2 and 3 keep an fp32 shard.
    """
    trained, width = anatomy.trainable, BYTES[config.model.dtype]
    if config.zero.stage == 0:
        return width * trained
    if config.zero.stage == 1 and config.model.dtype != "fp32":
        return (4 + width) * trained
    whole = _fp32(trained) if config.zero.stage == 1 and config.batch.accumulation > 1 else 0
    return whole + _fp32(trained) // ranks


def activation_bytes(config: TrainConfig, saved: Saved) -> int:
    """Saved for backward; recomputed layers keep their input, and one at a time is whole again, as
    is one tile of its MLP. Inputs on the host come back one at a time.
    """
    recomputed = _recomputed(config, saved)
    if not recomputed:
        return sum(saved.per_layer) + saved.outside + saved.tile
    kept = sum(saved.per_layer) - sum(recomputed)
    inputs = 1 if config.model.checkpoint_offload else len(recomputed)
    return kept + inputs * saved.layer_input + max(recomputed) + saved.tile + saved.outside


def captured_bytes(config: TrainConfig, anatomy: Anatomy, saved: Saved) -> int:
    """What CUDA graphs hold beside what backward needs: each layer's output and the gradients of
    its output, its input and its weights, in places of their own (make_graphed_callables).
    """
    if not config.model.cuda_graphs:
        return 0
    trained = anatomy.linear if config.method.kind == "full" else anatomy.trainable
    hidden = 3 * len(saved.per_layer) * saved.layer_input
    return hidden + BYTES[config.model.dtype] * trained


def working_bytes(config: TrainConfig, anatomy: Anatomy, *, cuda: bool) -> int:
    """What backward of one MLP on the diet works in, where nothing of the head is left: act(e) g,
    its gradient and that of g. Plain PyTorch adds act, its slope and two products in fp32, and in
    half precision e and the gradient, too (kernels/swiglu.py).
    """
    if not config.model.kernels:
        return 0
    width = BYTES[config.model.dtype]
    plain = 0 if cuda else 4 * (4 if width == 4 else 6)
    return (3 * width + plain) * config.batch.rank_tokens * anatomy.gated


def offloaded_inputs(config: TrainConfig, saved: Saved) -> int:
    """Bytes of recomputed layers' inputs in host memory."""
    there = len(_recomputed(config, saved)) if config.model.checkpoint_offload else 0
    return there * saved.layer_input


def _recomputed(config: TrainConfig, saved: Saved) -> list[int]:
    """What each recomputed layer saves when it is whole."""
    every = {"off": 0, "on": 1, "selective": config.model.checkpoint_every_layers}
    step = every[config.model.checkpointing]
    return [size for i, size in enumerate(saved.per_layer) if step and i % step == 0]


def loss_head_bytes(config: TrainConfig, anatomy: Anatomy, saved: Saved, *, cuda: bool) -> int:
    """Logits when backward reaches the loss, every token a target: three fp32 (tokens, V).

    Saved log-probabilities, the gradient of the picked ones, the gradient of the logits. In tiles,
    or where model.kernels=true takes the loss from the head: the gradient of the hidden states and
    that of a trained head, and a chunk of logits (on a CPU its fp32 scores and softmax, too), as
    far as they are more than what backward of a layer works in later
    (kernels/linear_cross_entropy.py).
    """
    tokens, vocabulary = config.batch.rank_tokens, anatomy.vocabulary
    fused = config.model.kernels and anatomy.fused_head
    if config.model.tile_tokens is None and not fused:
        return 3 * _fp32(tokens * vocabulary)
    from tuneloom.kernels.linear_cross_entropy import CHUNK_BYTES, CPU_CHUNK_BYTES

    width = BYTES[config.model.dtype]
    budget = CHUNK_BYTES if cuda else CPU_CHUNK_BYTES
    rows = min(tokens, max(128, budget // (vocabulary * width) // 128 * 128))
    chunk = rows * vocabulary * (width if cuda else width + 2 * 4)
    trained = config.method.kind == "full" or "lm_head" in config.method.extra_modules
    summed = width if config.model.dtype != "fp16" else 4  # a trained fp16 head's sums are fp32
    chunk += rows * vocabulary * summed if trained and summed != width else 0
    head = summed * vocabulary * anatomy.hidden if trained else 0
    kept = width * tokens * anatomy.hidden + head
    if fused:
        return max(0, chunk + kept - working_bytes(config, anatomy, cuda=cuda))
    return max(0, chunk - saved.tile - max(_recomputed(config, saved), default=0)) + kept


def temporary_bytes(config: TrainConfig, anatomy: Anatomy, ranks: int, *, cuda: bool) -> int:
    """Staging of backward, or the step's casts where they are larger.

    ZeRO stages gradients in a bucket, beside the one just made and its copy. ZeRO-3 also copies
    the bucket to scatter it, and holds gathered weights: those kept for reuse, and once more those
    of one fetch, which it concatenates. Against a 20 M Llama on 2 ranks the whole forecast is
    within 5 % under ZeRO 0 and 2, and up to 18 % high under ZeRO-3 (tests/launch/test_peak.py).
    """
    width, trained, stage = BYTES[config.model.dtype], anatomy.trainable, config.zero.stage
    if stage == 0:
        return 0 if config.model.dtype == "fp32" else _fp32(trained)
    fresh = 2 * width * anatomy.largest_trained
    if stage == 1 and config.model.dtype == "bf16" and config.zero.offload == "none":
        return fresh
    # A CPU backs only the pages of the bucket that are written.
    elements = BUCKET if config.method.kind == "full" else ADAPTER_BUCKET
    bucket = width * (elements if cuda else min(elements, trained))
    step = 0 if config.zero.offload != "none" else _fp32(trained) // ranks
    if stage < 3:
        return max(bucket + fresh, step)
    whole = anatomy.base + (0 if config.method.kind == "full" else trained)
    live = min(whole, max(MAX_LIVE, anatomy.largest_layer + PREFETCH, anatomy.largest))
    fetch = min(whole, anatomy.largest_layer + PREFETCH)
    scatter = bucket + fresh + width * min(elements, trained)
    return width * (live + fetch) + max(scatter, min(step, _fp32(MAX_LIVE) // ranks))


def checkpoint_bytes(config: TrainConfig, anatomy: Anatomy) -> int:
    """One checkpoint of all ranks: trained weights, masters, moments; no frozen weights."""
    return BYTES[config.model.dtype] * anatomy.trainable + optimizer_bytes(config, anatomy)


def best_bytes(config: TrainConfig, anatomy: Anatomy) -> int:
    """Weights of the best validation so far, and of a better one while it is written; adapters in
    fp32.
    """
    if config.train.patience == 0:
        return 0
    full = config.method.kind == "full"
    return 2 * (BYTES[config.model.dtype] * anatomy.base if full else _fp32(anatomy.trainable))


def _fp32(elements: int) -> int:
    return 4 * elements
