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

EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Names of routers' and experts' linears before transformers 5 made parameters of them, one of all
experts; PEFT still takes them as targets, for the models that it knows."""
FUSED = ({"gate_proj", "up_proj"}, {"w1", "w3"})
"""Those that became one parameter: PEFT adapts it where both are named."""


def apply(network: nn.Module, method: MethodConfig) -> nn.Module:
    """Freeze and adapt `network` as `method` says; full fine-tuning freezes what text never meets.

    Called after the seed, so adapters start alike on every rank. Raises ConfigError when a target
    or extra module does not exist in the model, or in its towers alone, and for what PEFT cannot do
    on stacked experts.
    """
    towers = aside(network)
    if method.kind == "full":
        for tower in towers.values():  # without a gradient, weight decay alone would move it
            tower.requires_grad_(False)
        return network
    imports.adapters()
    from peft import LoraConfig, get_peft_model

    experts = _experts(network)
    _known_modules(network, method, experts)
    _refuse_on_experts(method, experts)
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


def _experts(network: nn.Module) -> set[str]:
    """Targets that PEFT takes for parameters of this model; none where no experts are stacked."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    asked: Any = LoraConfig(target_modules=list(EXPERTS))
    convert_peft_config_for_transformers(asked, model=network, conversions=None)
    return set(EXPERTS) - set(asked.target_modules)


def _known_modules(network: nn.Module, method: MethodConfig, experts: set[str]) -> None:
    other = modules_aside(network)
    found = (name for name, module in network.named_modules() if name and module not in other)
    names = sorted({name.rsplit(".", 1)[-1] for name in found})
    targets = [] if method.targets == "all-linear" else method.targets
    for key, wanted, known in (
        ("method.targets", targets, sorted({*names, *experts})),
        ("method.extra_modules", method.extra_modules, names),
    ):
        for name in wanted:
            if name.rsplit(".", 1)[-1] not in known:
                also = f"; its experts are {', '.join(sorted(experts))}" if experts else ""
                raise ConfigError(
                    f"{key}: the model has no module {name!r}{did_you_mean(name, known)}"
                    f"{also if key == 'method.targets' else ''}"
                )


def _refuse_on_experts(method: MethodConfig, experts: set[str]) -> None:
    """Raise ConfigError for half of a fused parameter, and for variants of LoRA on any of them."""
    last = {name.rsplit(".", 1)[-1] for name in method.targets}
    reached = experts if method.targets == "all-linear" else experts & last
    for pair in FUSED:
        if len(half := reached & pair) == 1:
            raise ConfigError(
                f"method.targets: {' and '.join(sorted(pair))} are one parameter of this model's "
                f"experts, got {half.pop()} alone; name both"
            )
    away = "name method.targets without experts, such as [q_proj, k_proj, v_proj, o_proj]"
    if reached and method.dropout:
        raise ConfigError(
            f"method.dropout: adapters on stacked experts ({', '.join(sorted(reached))}) cannot "
            f"drop anything out, got {method.dropout}; set method.dropout=0, or {away}"
        )
    if reached and method.dora:
        raise ConfigError(
            f"method.dora: adapters on stacked experts ({', '.join(sorted(reached))}) cannot be "
            f"weight-decomposed; set method.dora=false, or {away}"
        )
