"""Patterns of attention and position that this trainer would get wrong: refused, or said, before
step 1.

Attention here is causal, in a window where the layer passes one, and gets no mask: what a model's
code writes into its mask alone would be lost. Rotary frequencies that follow the longest position
of a batch (longrope, dynamic) differ between the parts of a sequence, and documents of a pack
change each other's.
"""

import inspect
import sys
from typing import Any

from torch import nn

from tuneloom.errors import ConfigError
from tuneloom.train.config import BatchConfig


def refuse(network: nn.Module, batch: BatchConfig) -> str | None:
    """Raise ConfigError for what would be wrong; returns a sentence on what is only inexact."""
    causal: Any = network
    text = causal.config.get_text_config()
    _refuse_masks(network, text, batch.max_length)
    return _refuse_rope(text, batch)


def _refuse_masks(network: nn.Module, text: Any, longest: int) -> None:
    kinds = getattr(text, "layer_types", None)
    chunk = getattr(text, "attention_chunk_size", None)
    window = getattr(text, "sliding_window", None)
    name = type(network).__name__
    if "chunked_attention" in (kinds or ()) and chunk and longest > chunk:
        raise ConfigError(
            f"batch.max_length: {name} attends in chunks of {chunk} tokens, which no backend here "
            f"computes, got {longest}; set batch.max_length={chunk}"
        )
    masks = hasattr(sys.modules[type(network).__module__], "create_sliding_window_causal_mask")
    slides = masks if kinds is None else "sliding_attention" in kinds
    if slides and window and longest > window and not _passes_window(network):
        raise ConfigError(
            f"batch.max_length: {name} attends in a window of {window} tokens by its mask, which "
            f"no backend here gets, got {longest}; set batch.max_length={window}"
        )


def _passes_window(network: nn.Module) -> bool:
    """Whether an attention's own code calls anything with `sliding_window=`."""
    kinds = {type(m) for m in network.modules() if "Attention" in type(m).__name__}
    codes = [inspect.unwrap(kind.forward).__code__ for kind in kinds]
    consts = [const for code in codes for const in code.co_consts]  # single ones since Python 3.14
    return any(c == "sliding_window" or (isinstance(c, tuple) and "sliding_window" in c)
               for c in consts)  # fmt: skip


def _refuse_rope(text: Any, batch: BatchConfig) -> str | None:
    for rope in _ropes(text):
        kind = str(rope.get("rope_type"))
        if kind != "longrope" and "dynamic" not in kind:
            continue
        if batch.sequence_parallel > 1:
            raise ConfigError(
                f"batch.sequence_parallel: this model's rotary frequencies ({kind}) follow the "
                "longest position of a batch, of which each rank sees a part; set "
                "batch.sequence_parallel=1"
            )
        whole = text.max_position_embeddings
        switch = rope["original_max_position_embeddings"] if kind == "longrope" else whole
        if batch.packing and batch.max_length > switch:
            return (
                f"batch.packing: this model's rotary frequencies ({kind}) change for a whole pack "
                f"that holds a document of more than {switch} tokens; to train each as if alone, "
                f"set batch.max_length={switch}, or batch.packing=false with batch.sequences=1"
            )
    return None


def _ropes(text: Any) -> list[dict[str, Any]]:
    """The parameters of every kind of rotary embedding: one, or one a kind of layer."""
    found = getattr(text, "rope_parameters", None) or {}
    return [found] if "rope_type" in found else [v for v in found.values() if isinstance(v, dict)]
