"""What of a model text passes through: all of it, but for towers of images or sound, their
projectors and poolers, where a checkpoint has them beside its language model (Gemma 3).
"""

from collections.abc import Iterator
from typing import Any

from torch import nn


def causal_of(network: nn.Module) -> Any:
    """The transformers model inside PEFT's wrapper, or `network` itself."""
    inner: Any = network
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def aside(network: nn.Module) -> dict[str, nn.Module]:
    """The largest modules that text never meets, by their path in the transformers model."""
    causal = causal_of(network)
    if causal.config.get_text_config() is causal.config:
        return {}
    met = {
        module
        for part in (causal.get_decoder(), causal.get_output_embeddings())
        for module in (part.modules() if part is not None else ())
    }
    return dict(_apart(causal, "", met)) if causal not in met else {}


def _apart(module: nn.Module, path: str, met: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        place = f"{path}.{name}" if path else name
        if met.isdisjoint(child.modules()):
            yield place, child
        elif child not in met:
            yield from _apart(child, place, met)


def modules_aside(network: nn.Module) -> set[nn.Module]:
    """All modules that text never meets."""
    return {module for tower in aside(network).values() for module in tower.modules()}


def decoder_layers(network: nn.Module) -> list[Any]:
    """The language model's layers, in the order in which they run; empty where none is known."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    other = modules_aside(network)
    return [
        module
        for module in network.modules()
        if isinstance(module, GradientCheckpointingLayer) and module not in other
    ]
