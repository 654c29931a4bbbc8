"""What a model is made of, and what its backward keeps, without holding a single weight.

The network is built on the meta device by the code that trains it, adapters included, so parameter
counts are exact. One forward pass over fake tensors then counts the bytes autograd saves in each
layer. Modelled: storages saved for backward, each once, without parameters; attention is a fused
kernel (q, k, v, out, log-sum-exp) unless `model.attention=eager`. Not modelled: what an allocator
wastes. Llama-3-8B in bf16: 196.1 KiB a token and layer trained whole, 180.4 with PEFT adapters.
"""

import functools
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tuneloom.config import did_you_mean
from tuneloom.errors import ConfigError
from tuneloom.train.config import BatchConfig, MethodConfig, ModelConfig, TrainConfig

SHAPES = Path(__file__).with_name("shapes.json")
"""config.json of the hub models that shipped experiments name: they plan with no network."""
Patches = Literal["none", "ops", "diet"]
"""Of kernels/: none, the single ops, or whole layers on the activation diet."""


@dataclass(frozen=True)
class Anatomy:
    """Elements of the parameters, by what ZeRO, quantisation and the optimizer do with them."""

    base: int
    """Parameters of the base, tied ones once."""
    linears: tuple[int, ...]
    """Elements of each base linear that QLoRA holds in NF4: all but the head."""
    experts: int
    """Elements of stacked experts, which are no linears and no method converts."""
    trainable: int
    matrices: int
    """Trainable elements that Muon would take: two dimensions, neither embedding nor head."""
    largest: int
    """Elements of the largest single parameter."""
    largest_trained: int
    largest_layer: int
    """Elements of the largest decoder layer: what ZeRO-3 gathers at a time."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    """Half of a query's and a value's, which are alike but for latent attention."""
    vocabulary: int
    gated: int
    """Columns of a layer's gated MLP; 0 for experts."""
    fused_head: bool
    """model.kernels=true and tiles take the loss from the head, with no logits of all tokens."""

    @property
    def linear(self) -> int:
        return sum(self.linears)


@dataclass(frozen=True)
class Saved:
    """Bytes that a forward pass keeps for backward, on one rank."""

    per_layer: tuple[int, ...]
    outside: int
    """Embedding, final norm and rotary tables; the loss head is left out."""
    layer_input: int
    """Bytes of one layer's input: all that a recomputed layer keeps."""
    tile: int = 0
    """What one tile's backward computes again and holds; 0 where MLPs are whole."""


def anatomy(config: TrainConfig) -> Anatomy:
    """Count the parameters of `config`'s model and method; seconds, whatever the size."""
    return _anatomy(_key(config.model), _frozen(config.method))


def saved_activations(config: TrainConfig) -> Saved:
    """Bytes saved for backward by one rank's part of a micro-batch, with no layer recomputed.

    A part of S has 1/S of everything: of the tokens outside attention, of the heads inside it.
    (Key/value heads repeated for an S that does not divide them are not counted.)
    """
    whole = _whole(config)
    tiled = config.model.tile_tokens
    if tiled is not None:
        whole = _in_tiles(config, whole, config.batch.tiles(tiled))
    shared = config.batch.sequence_parallel
    return Saved(
        tuple(size // shared for size in whole.per_layer), whole.outside // shared,
        whole.layer_input // shared, whole.tile // shared,
    )  # fmt: skip


def _in_tiles(config: TrainConfig, whole: Saved, tiles: int) -> Saved:
    """MLPs that keep their input, and of their products one tile at a time."""
    kept = [size + whole.layer_input for size in _whole(config, mlps=False).per_layer]
    products = max(size - rest for size, rest in zip(whole.per_layer, kept, strict=True))
    return Saved(tuple(kept), whole.outside, whole.layer_input, -(-products // tiles))


def _whole(config: TrainConfig, *, mlps: bool = True) -> Saved:
    """Of a whole micro-batch; without `mlps` what their insides save is left out."""
    rows, length = micro_batch(config.batch)
    shape, method = _key(config.model), _frozen(config.method)
    kernels, dtype = _patches(config), config.model.dtype
    # Fused kernels keep the same bytes for one long row, in the packed layout.
    fused = _saved(shape, method, kernels, dtype, "sdpa", 1, rows * length, mlps)
    if config.model.attention != "eager":
        return fused
    eager = _saved(shape, method, kernels, dtype, "eager", rows, length, mlps)
    if not config.batch.packing:
        return eager
    # Documents just over half of the longest are padded to it: scores of twice the tokens.
    layers = zip(eager.per_layer, fused.per_layer, strict=True)
    return replace(eager, per_layer=tuple(2 * scores - rest for scores, rest in layers))


def _patches(config: TrainConfig) -> Patches:
    """ZeRO-3's shards and trained FP8 weights keep layers off the diet (kernels/lora_linear.py)."""
    if not config.model.kernels:
        return "none"
    trained_fp8 = config.model.fp8 and config.method.kind == "full"
    return "ops" if config.zero.stage == 3 or trained_fp8 else "diet"


def micro_batch(batch: BatchConfig) -> tuple[int, int]:
    """Rows and length of the fullest micro-batch; a pack counts as its longest documents."""
    if not batch.packing:
        return batch.sequences, batch.max_length
    return max(1, batch.tokens // batch.max_length), min(batch.max_length, batch.tokens)


def shape_of(path: str, *, revision: str | None = None) -> dict[str, Any]:
    """config.json of a model folder, or of a hub id that this project knows or the hub answers for.

    Raises ConfigError when neither does.
    """
    file = Path(path) / "config.json"
    if file.exists():
        return _described(file)
    known = json.loads(SHAPES.read_text(encoding="utf-8"))
    if path in known["models"]:
        return dict(known["shapes"][known["models"][path]])
    return _from_hub(path, revision, list(known["models"]))


def _from_hub(path: str, revision: str | None, known: list[str]) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = hf_hub_download(path, "config.json", revision=revision)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model.path: no folder {path!r} with a config.json here, and the hub could not be "
            f"asked ({type(error).__name__}); give a folder{did_you_mean(path, known)}"
        ) from None
    return _described(Path(found))


def _described(file: Path) -> dict[str, Any]:
    """What a config.json says; raises ConfigError for one that names no architecture."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"model.path: {file}: not JSON ({error}); copy it again") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise ConfigError(
            f"model.path: {file}: has no model_type, so it is of no known architecture; give a "
            "Hugging Face model folder"
        )
    return fields


def _key(model: ModelConfig) -> str:
    """The shape as a string, so that results can be cached."""
    return json.dumps(shape_of(model.path, revision=model.revision), sort_keys=True)


def _frozen(method: MethodConfig) -> str:
    return method.model_dump_json()


@functools.lru_cache(maxsize=4)
def _network(shape: str, method: str, kernels: Patches = "none") -> Any:
    """The adapted network on the meta device, with the fused ops of kernels/ or without.

    It drops no attention out: a GPU's kernels keep a seed, where the CPU's would keep the scores.
    """
    import torch

    from tuneloom.kernels.patch import patch, unpatch_module
    from tuneloom.train import method as methods

    # PEFT imports bitsandbytes, which warns of a CPU kernel that nothing here would call.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    network = _causal(json.loads(shape))
    with torch.device("meta"):
        if kernels != "none":
            patch(network)
        for layer in _layers(network) if kernels == "ops" else []:
            unpatch_module(layer)
        return methods.apply(network, MethodConfig.model_validate_json(method))


def _causal(fields: dict[str, Any]) -> Any:
    """The bare network of a config.json, without dropout of attention and caches."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tuneloom.kernels.attention import DROPOUTS

    try:
        config = AutoConfig.for_model(**fields)
        text = config.get_text_config()
        for key in DROPOUTS:
            if getattr(text, key, None):
                setattr(text, key, 0.0)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, trust_remote_code=False
            )
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"model.path: config.json is of no causal language model ({fields.get('model_type')!r})"
        ) from error
    network.config.use_cache = False
    return network


@functools.lru_cache(maxsize=8)
def _anatomy(shape: str, method: str) -> Anatomy:
    from torch import nn

    from tuneloom.kernels.attention import widths
    from tuneloom.train.flops import experts_of, is_stack

    network = _network(shape, method)
    causal = network.get_base_model() if hasattr(network, "get_base_model") else network
    head = causal.get_output_embeddings()
    base_head = getattr(head, "original_module", head)  # beside the copy of it that is trained
    named = dict(network.named_parameters())
    adapters = {n for n in named if ".lora_" in n or ".modules_to_save." in n}
    trainable = {n: p for n, p in named.items() if p.requires_grad}
    text = causal.config.get_text_config()
    return Anatomy(
        base=sum(p.numel() for n, p in named.items() if n not in adapters),
        linears=tuple(
            module.weight.numel()
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear) and module is not base_head
            and ".lora_" not in name and ".modules_to_save." not in name
        ),
        experts=sum(
            p.numel() for n, p in named.items()
            if n not in adapters and is_stack(p, experts_of(text))
        ),
        trainable=sum(p.numel() for p in trainable.values()),
        matrices=sum(
            p.numel() for n, p in trainable.items()
            if p.dim() >= 2 and "embed" not in n and "lm_head" not in n
        ),
        largest=max(p.numel() for p in named.values()),
        largest_trained=max(p.numel() for p in trainable.values()),
        largest_layer=max(sum(p.numel() for p in layer.parameters()) for layer in _layers(network)),
        layers=len(_layers(network)),
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_width=sum(widths(text)) // 2,
        vocabulary=text.vocab_size,
        gated=0 if experts_of(text) else getattr(text, "intermediate_size", 0),
        fused_head=_takes_loss(causal, head),
    )  # fmt: skip


def _takes_loss(causal: Any, head: Any) -> bool:
    """As kernels/patch.py finds it: a plain head without an adapter.

    The cached network is looked at, not patched, since it plans runs without kernels, too.
    """
    from torch import nn

    from tuneloom.kernels.loss_head import running
    from tuneloom.kernels.patch import HEADS

    return type(causal).__name__ in HEADS and type(running(head)) is nn.Linear


def _layers(network: Any) -> list[Any]:
    from tuneloom.train.text import decoder_layers

    found = decoder_layers(network)
    if not found:
        raise ConfigError(f"model.path: {type(network).__name__} has no decoder layers to plan for")
    return found


@functools.lru_cache(maxsize=32)
def _saved(
    shape: str, method: str, kernels: Patches, dtype: str, backend: str, rows: int, length: int,
    mlps: bool,
) -> Saved:  # fmt: skip
    import torch

    from tuneloom.kernels import attention
    from tuneloom.train.model import DTYPES
    from tuneloom.train.text import causal_of

    network = _network(shape, method, kernels).train()
    attention.install(network, attention.Choice(backend, "planned"))
    ledger = _Ledger()
    layers = _layers(network)
    left_out = [] if mlps else [layer.mlp for layer in layers]
    hidden = network.config.get_text_config().hidden_size
    layer_input = rows * length * hidden * DTYPES[dtype].itemsize
    fake = torch._subclasses.FakeTensorMode()
    with fake, _grouped_products(), ledger.watch(layers, left_out):
        state = _state(network, DTYPES[dtype])
        ledger.own(state.values())
        ids = torch.zeros(rows, length, dtype=torch.int64)
        call = {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}
        try:
            torch.func.functional_call(network, state, (), call, tie_weights=True)
        except RuntimeError as error:  # such as lengths that the data decide
            name = type(causal_of(network)).__name__
            print(
                f"plan: what {name} keeps for backward is not estimated and not in the sum, as its "
                f"shapes are not known ahead ({type(error).__name__}); leave room for it",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            return Saved((0,) * len(layers), 0, layer_input)
    per_layer = tuple(after - before for before, after in ledger.spans)
    return Saved(per_layer, ledger.total - sum(per_layer), layer_input)


def _grouped_products() -> Any:
    """Lets fake stacked experts multiply in every dtype: as of torch 2.13 the shapes of a grouped
    product are known for bf16 alone, while its kernels take the others.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Grouped(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
                rows, stack = args[:2]
                return rows.new_empty(rows.shape[0], stack.shape[-1])
            return func(*args, **(kwargs or {}))

    return Grouped()


def _state(network: Any, dtype: Any) -> dict[str, Any]:
    """Fake parameters and buffers; DeepSpeed keeps adapters in the base's dtype, masters beside.

    Real Parameters, or PEFT's on stacked experts would leave buffers in the network behind.
    """
    import torch

    state = {
        name: torch.nn.Parameter(torch.empty(p.shape, dtype=dtype), p.requires_grad)
        for name, p in network.named_parameters()
    }
    return state | {n: torch.empty(b.shape, dtype=b.dtype) for n, b in network.named_buffers()}


class _Ledger:
    """Storages that autograd saved, each once."""

    def __init__(self) -> None:
        self.paused = False
        self.kept: dict[int, tuple[Any, int]] = {}
        self.parameters: set[int] = set()
        self.spans: list[tuple[int, int]] = []

    @property
    def total(self) -> int:
        return sum(size for _, size in self.kept.values())

    def own(self, tensors: Any) -> None:
        self.parameters = {t.untyped_storage()._cdata for t in tensors}

    def pack(self, tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if not self.paused and storage._cdata not in self.parameters:
            # The storage is held, so that its address is not given to another one.
            self.kept.setdefault(storage._cdata, (storage, storage.nbytes()))
        return tensor

    def _pause(self, paused: bool) -> None:
        self.paused = paused

    @contextmanager
    def watch(self, layers: list[Any], left_out: list[Any]) -> Iterator[None]:
        """Count while the context is open, but not inside the modules `left_out`; `spans` gets
        total before and after each layer.
        """
        import torch

        starts: list[int] = []
        hooks = []
        for layer in layers:
            hooks.append(layer.register_forward_pre_hook(lambda *_: starts.append(self.total)))
            hooks.append(
                layer.register_forward_hook(
                    lambda *_: self.spans.append((starts.pop(), self.total))
                )
            )
        for module in left_out:
            hooks.append(module.register_forward_pre_hook(lambda *_: self._pause(True)))
            hooks.append(module.register_forward_hook(lambda *_: self._pause(False)))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t):
                yield
        finally:
            for hook in hooks:
                hook.remove()
