"""A base, with or without an adapter, ready to answer: digests checked before a weight is loaded.

One process scores both sides: `loaded.without_adapter()` is the base, bit for bit.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tuneloom.data import golden
from tuneloom.data.render import Renderer
from tuneloom.data.tokenizer import load_tokenizer
from tuneloom.errors import ConfigError
from tuneloom.registry.adapters import model_folder, open_adapter
from tuneloom.registry.contract import (
    FILE,
    Contract,
    check_base,
    check_tokenizer,
    check_weights,
    read,
)
from tuneloom.registry.digests import weights_digest

if TYPE_CHECKING:
    import torch

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "bf16", "fp16", "fp32"]
STORED = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode on `device`, its tokenizer, and what both were checked against."""

    model: Any
    tokenizer: Any
    device: "torch.device"
    dtype: str
    folder: Path
    """Of the base, or of the whole model."""
    digest: str
    """Of the tensors in `folder`."""
    adapter: Path | None
    contract: Contract | None

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Inside, the model is its base."""
        assert self.adapter is not None, "no adapter to leave out"
        with self.model.disable_adapter():
            yield

    @cached_property
    def renderer(self) -> Renderer:
        """Renders as in training; rows longer than the context come back dropped, to be counted."""
        return Renderer(
            self.tokenizer,
            self.contract.objective if self.contract else "sft",
            self.context_length(),
            "drop",
        )

    def context_length(self) -> int:
        """Longest sequence the architecture was made for."""
        config = self.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 1 << 20)


def load(
    path: str,
    *,
    adapter: str | None = None,
    revision: str | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    key: str = "model.path",
    contract: Contract | None = None,
) -> Loaded:
    """Load a base and put an adapter on it, once every digest in the adapter's contract holds.

    Raises RefusedError, naming both digests, for an adapter of another base, and ConfigError for
    an adapter in place of a base or the other way round. `key` is what the user calls the base;
    `contract` holds for an adapter that has no contract.json, straight from its run.
    """
    folder = model_folder(path, revision=revision, key=key)
    digest = weights_digest(folder)
    tokenizer_folder = folder
    if adapter is not None:
        exported = open_adapter(adapter).contract
        contract = _checked(exported or contract, adapter, digest=digest, given=path)
        tokenizer_folder = Path(adapter) if exported else folder
    elif (contract := read(folder)) is not None:
        check_weights(contract, folder, digest=digest)
    if contract is not None:
        check_tokenizer(contract, tokenizer_folder, holder=adapter or folder)
    tokenizer = load_tokenizer(str(tokenizer_folder))
    where = _device(device)
    precision = _dtype(dtype, contract, folder)
    model = _network(folder, contract if adapter else None, device=where, dtype=precision)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    loaded = Loaded(
        model=model.eval(),
        tokenizer=tokenizer,
        device=where,
        dtype=precision,
        folder=folder,
        digest=digest,
        adapter=Path(adapter) if adapter else None,
        contract=contract,
    )
    if contract is not None:
        golden.check(contract, loaded.renderer, holder=adapter or str(folder))
    return loaded


def _checked(
    contract: Contract | None, adapter: str, *, digest: str, given: str
) -> Contract | None:
    """The adapter's contract, held against the base and the adapter's own weights."""
    if contract is None:
        print(
            f"tuneloom: {adapter} has no {FILE}: nothing says which base it was trained on, "
            "so the base is not checked",
            file=sys.stderr,
        )
        return None
    check_base(contract, adapter, digest=digest, given=given)
    check_weights(contract, adapter, digest=weights_digest(adapter))
    return contract


def _device(device: Device) -> "torch.device":
    """The device asked for; `auto` is CUDA where there is one."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for, but no CUDA device is seen; set device=cpu")
    name = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _dtype(dtype: Dtype, contract: Contract | None, folder: Path) -> str:
    """The precision asked for; `auto` is that of training, else that of the stored weights."""
    if dtype != "auto":
        return dtype
    if contract is not None:
        return contract.dtype
    config = json.loads(Path(folder, "config.json").read_text("utf-8"))
    return STORED.get(config.get("dtype") or config.get("torch_dtype") or "float32", "fp32")


def _network(folder: Path, contract: Contract | None, *, device: "torch.device", dtype: str) -> Any:
    """The causal LM of a folder on a device; in NF4 where the adapter was trained on NF4."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    options: dict[str, Any] = {
        "dtype": torch_dtype,
        "trust_remote_code": False,
        "use_safetensors": True,
        "device_map": {"": device},
    }
    if contract is not None and contract.method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=bool(contract.double_quantisation),
            bnb_4bit_compute_dtype=torch_dtype,
        )
    network: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    # generate() takes from here what it is not told: a base's penalty on repeats, for one.
    shipped = network.generation_config
    network.generation_config = GenerationConfig(
        bos_token_id=shipped.bos_token_id,
        eos_token_id=shipped.eos_token_id,
        pad_token_id=shipped.pad_token_id,
    )
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else bitsandbytes on a CPU answers with another kernel than the one that trained.
            module.support_avx512bf16_for_cpu = False
    return network
