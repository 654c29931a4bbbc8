"""What is trained: every weight, or adapters on a frozen base (LoRA, QLoRA, DoRA, rsLoRA), by
PEFT.
"""

from typing import Any

from torch import nn

from tuneloom import imports
from tuneloom.config import did_you_mean
from tuneloom.errors import ConfigError
from tuneloom.train.config import MethodConfig


def apply(network: nn.Module, method: MethodConfig) -> nn.Module:
    """Freeze and adapt `network` as `method` says; full fine-tuning returns it as it is.

    Called after the seed, so adapters start alike on every rank. Raises ConfigError when a target
    or extra module does not exist in the model.
    """
    if method.kind == "full":
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


def _known_modules(network: nn.Module, method: MethodConfig) -> None:
    names = sorted({name.rsplit(".", 1)[-1] for name, _ in network.named_modules() if name})
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
