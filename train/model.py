"""The base model and its tokenizer: found, checked, loaded in the right precision, nothing run from
it.

Only safetensors are read and no remote code is executed; no key of any config turns that on.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tuneloom.errors import ConfigError
from tuneloom.kernels import attention
from tuneloom.registry.digests import weight_files
from tuneloom.train.config import MethodConfig, ModelConfig
from tuneloom.train.offload import checkpoint_on_host
from tuneloom.train.text import decoder_layers

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RECOMPUTED: Counter[str] = Counter()
"""Layers run again in backward since `RECOMPUTED.clear()`; effects.json is written from it."""
MOE_BLOCKS = ("MoeBlock", "SparseMoe", "MoE", "MLPExperts", "Experts")


def locate(model: ModelConfig) -> Path:
    """The local folder of `model.path`: itself, or the hub snapshot, downloaded where there is a
    network.

    Raises ConfigError when there is neither, when the folder is an adapter, or has no tokenizer.
    """
    folder = Path(model.path)
    if not folder.is_dir():
        folder = _download(model)
    if (folder / "adapter_config.json").exists():
        raise ConfigError(
            f"model.path: {folder} is an adapter, not a base; "
            "set model.path to the base it was trained on and adapter= where you use it"
        )
    if not (folder / "config.json").exists():
        raise ConfigError(
            f"model.path: {folder} has no config.json; give a Hugging Face model folder"
        )
    if not any((folder / n).exists() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ConfigError(
            f"model.path: {folder} has no tokenizer (tokenizer.json); copy it beside the weights"
        )
    for config in sorted(folder.glob("*config.json")):  # the tokenizer's and nested ones too
        if '"auto_map"' in config.read_text(encoding="utf-8"):
            raise ConfigError(
                f"model.path: {config} asks for remote code (auto_map), never run here; "
                "remove the key if transformers knows the architecture"
            )
        if '"transformers_weights"' in config.read_text(encoding="utf-8"):
            raise ConfigError(
                f"model.path: {config} names a weights file of its own (transformers_weights), "
                "which may be pickled; remove the key"
            )
    if model.init == "pretrained":
        if not list(folder.glob("*.safetensors")):
            raise ConfigError(
                f"model.path: {folder} has no *.safetensors; pickled weights are not read"
            )
        weight_files(folder)
    return folder


def largest_parameter(base: Path, model: ModelConfig) -> int | None:
    """Elements of the largest tensor in the base's safetensors, from their headers; None where the
    model's parameters are not the files' tensors: random weights, experts that are stacked.
    """
    from safetensors import safe_open
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(base, trust_remote_code=False).get_text_config()
    stacked = any(getattr(text, name, None) for name in ("num_experts", "num_local_experts"))
    if model.init == "random" or stacked:
        return None
    sizes = []
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            sizes += [math.prod(tensors.get_slice(key).get_shape()) for key in list(tensors.keys())]
    return max(sizes)


def _download(model: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.errors import LocalEntryNotFoundError as NotFound

    try:
        return Path(
            snapshot_download(
                model.path,
                revision=model.revision,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"],
            )
        )
    except HFValidationError:
        raise ConfigError(
            f"model.path: no folder {model.path!r} here, and that is no hub id either"
        ) from None
    except (NotFound, OSError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise ConfigError(
            f"model.path: no folder {model.path!r} here, and the hub gave no such model "
            f"({reason}); copy it here and give its folder, or check the id, the network, its "
            "licence and HF_TOKEN"
        ) from None


def load(
    folder: Path, model: ModelConfig, method: MethodConfig, device: torch.device, *, seed: int
) -> nn.Module:
    """The causal language model in `model.dtype` on `device`, attention installed, caches off.

    Under ZeRO-3 the caller has switched partitioned initialisation on (`train/zero.py`), and
    weights
    arrive already sharded over ranks. Raises ConfigError for an architecture that is not a causal
    LM.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    dtype = DTYPES[model.dtype]
    torch.manual_seed(seed)
    try:
        if model.init == "random":
            network = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        else:
            network = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                **_quantisation(method, dtype, device),
            )
    except (ValueError, KeyError) as error:
        if "Unrecognized configuration" in str(error) or "AutoModelForCausalLM" in str(error):
            raise ConfigError(
                f"model.path: {folder} is no causal language model ({config.model_type})"
            ) from None
        raise
    causal: Any = network
    causal.config.use_cache = False
    choose_attention(network, model)
    if method.kind == "qlora":
        keep_unpacked(network)
        return network
    return network.to(device)


def keep_unpacked(network: nn.Module) -> None:
    """Stop bitsandbytes from packing NF4 weights for its CPU inference kernel (AVX512-BF16).

    0.50.2 packs at the first forward in eval mode without gradients, never unpacks, and gradients
    of later training steps are wrong: their sum was 82,020 in place of 189,277 (test_export.py).
    """
    modules: Iterable[Any] = network.modules()
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def choose_attention(
    network: nn.Module, model: ModelConfig, *, exchange: attention.Exchange | None = None
) -> attention.Choice:
    """Pick a backend for this model and device and install it."""
    config: Any = network.config
    text = config.get_text_config()
    head_dim, value_dim = attention.widths(text)
    softcap = getattr(text, "attn_logit_softcapping", None)
    choice = attention.choose(
        model.attention, dtype=DTYPES[model.dtype], head_dim=head_dim, value_dim=value_dim,
        softcap=softcap, dropout=any(getattr(text, key, None) for key in attention.DROPOUTS),
    )  # fmt: skip
    attention.install(network, choice, exchange=exchange)
    return choice


def _quantisation(method: MethodConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Keyword arguments that make from_pretrained hold linears in NF4, for QLoRA."""
    if method.kind != "qlora":
        return {}
    from transformers import BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=method.double_quantisation,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": quantisation, "device_map": {"": device}}


def checkpoint_activations(network: nn.Module, model: ModelConfig) -> int:
    """Turn recomputation on for all or every n-th decoder layer; returns how many layers
    recompute.
    """
    if model.checkpointing == "off":
        return 0
    causal: Any = network
    causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers = decoder_layers(network)
    if not layers:
        raise ConfigError(
            f"model.checkpointing: {type(network).__name__} has no layers that recompute; "
            "set it to off"
        )
    every = model.checkpoint_every_layers if model.checkpointing == "selective" else 1
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index % every == 0
        checkpoint = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = _counted(
            checkpoint_on_host if model.checkpoint_offload else checkpoint
        )
    return sum(layer.gradient_checkpointing for layer in layers)


def _counted(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """`checkpoint(layer, *inputs)`, which counts every run of the layer but the first."""

    def counting(layer: Callable[..., Any], *inputs: Any) -> Any:
        runs = itertools.count()

        def run(*inputs: Any) -> Any:
            RECOMPUTED["layers"] += next(runs) > 0
            return layer(*inputs)

        return checkpoint(run, *inputs)

    return counting


def moe_blocks(network: nn.Module) -> list[type[nn.Module]]:
    """Classes of mixture-of-experts blocks, which ZeRO-3 must gather whole (DeepSpeed#7461)."""
    return sorted(
        {type(m) for m in network.modules() if type(m).__name__.endswith(MOE_BLOCKS)},
        key=lambda kind: kind.__name__,
    )
