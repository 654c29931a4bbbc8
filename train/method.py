"""What is trained: every weight, or adapters on a frozen base (LoRA, QLoRA, DoRA, rsLoRA), by
PEFT.
"""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from tuneloom import imports
from tuneloom.config import did_you_mean
from tuneloom.errors import ConfigError
from tuneloom.train.config import MethodConfig
from tuneloom.train.text import aside, modules_aside


def apply(network: nn.Module, method: MethodConfig) -> nn.Module:
    """Freeze and adapt `network` as `method` says; full fine-tuning freezes what text never meets.

    Called after the seed, so adapters start alike on every rank. Raises ConfigError when a target
    or extra module does not exist in the model, or in its towers alone.
    """
    towers = aside(network)
    if method.kind == "full":
        for tower in towers.values():  # without a gradient, weight decay alone would move it
            tower.requires_grad_(False)
        return network
    imports.adapters()
    from peft import LoraConfig, get_peft_model

    _known_modules(network, method)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=method.targets if method.targets == "all-linear" else list(method.targets),
        exclude_modules=_within(towers) if towers else None,
        modules_to_save=list(method.extra_modules) or None,
        use_dora=method.dora,
        use_rslora=method.rslora,
    )
    causal: Any = network
    if any(getattr(module, "gradient_checkpointing", False) for module in network.modules()):
        # Frozen embeddings would leave recomputed layers without an input that requires grad.
        causal.enable_input_require_grads()
    unused = [] if method.kind == "qlora" else ["bitsandbytes"]
    with imports.absent(*unused):
        return get_peft_model(causal, config, autocast_adapter_dtype=False)


def _within(towers: Iterable[str]) -> str:
    """PEFT's pattern for all modules of these paths."""
    return rf"(.*\.)?({'|'.join(map(re.escape, towers))})(\..*)?"


def _known_modules(network: nn.Module, method: MethodConfig) -> None:
    other = modules_aside(network)
    found = (name for name, module in network.named_modules() if name and module not in other)
    names = sorted({name.rsplit(".", 1)[-1] for name in found})
    targets = [] if method.targets == "all-linear" else method.targets
    for key, wanted in (
        ("method.targets", targets),
        ("method.extra_modules", method.extra_modules),
    ):
        for name in wanted:
            if name.rsplit(".", 1)[-1] not in names:
                raise ConfigError(
                    f"{key}: the model has no module {name!r}{did_you_mean(name, names)}"
                )
