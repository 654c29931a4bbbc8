"""Put the fused ops into a transformers model, module by module, and take them out again.

    patched = patch(model)      # before or after PEFT wraps its linears
    patched.report              # {"LlamaMLP": {"gated": 32}, "LlamaRMSNorm": {"rms_norm": 65}, ...}
    unpatch(model)

Only instances of this model change (their `forward` is set on the instance), never a class or a
module of transformers, so other models in the process keep their own code. On a GPU the ops run as
Triton kernels; on the CPU the same autograd Functions run in plain PyTorch.

| op | into |
|---|---|
| rms_norm | RMSNorm of Llama, Qwen 2/3, Mistral, Gemma 1/2/3, Phi-3, Mixtral, Qwen 2/3 MoE |
| rope | attention of the same, and of Phi |
| gated | MLP of the same; experts of Mixtral and Qwen MoE |
| linear_cross_entropy | head of the same, but Gemma 2 (logits are capped after it) |
| activation_diet | decoder layers of Llama, Qwen 2/3, Mistral; falls back by name (diet.py) |

`tuneloom.kernels.jit.CALLS` counts what really ran.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from tuneloom.kernels import diet, loss_head
from tuneloom.kernels.rms_norm import rms_norm
from tuneloom.kernels.rope import rope
from tuneloom.kernels.swiglu import Activation, gated

OPS = ("rms_norm", "rope", "gated", loss_head.OP, "activation_diet")
"""As `jit.CALLS` counts them."""

LLAMA_LIKE = ("Llama", "Qwen2", "Qwen3", "Mistral")
GEMMA = ("Gemma", "Gemma2", "Gemma3")
MOE = ("Mixtral", "Qwen2Moe", "Qwen3Moe")
FAMILIES = (*LLAMA_LIKE, *GEMMA, "Phi3", *MOE)

NORMS = {f"{family}RMSNorm": 1.0 if family in GEMMA else 0.0 for family in FAMILIES}
MLPS = {f"{family}MLP" for family in FAMILIES}
EXPERTS = {f"{family}Experts" for family in MOE}
ATTENTIONS = {f"{family}Attention" for family in (*FAMILIES, "Phi")}
HEADS = {
    *(f"{family}ForCausalLM" for family in (*FAMILIES, "Phi")),
    "Gemma3ForConditionalGeneration",
}
LAYERS = {f"{family}DecoderLayer" for family in LLAMA_LIKE}

# transformers' activation modules and functions, by the name in its configs.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass
class Patched:
    """What went where: module class -> op -> instances."""

    report: dict[str, dict[str, int]] = field(default_factory=dict)

    def count(self, module: nn.Module, op: str) -> None:
        """One more instance of `module`'s class has `op`."""
        ops = self.report.setdefault(type(module).__name__, {})
        ops[op] = ops.get(op, 0) + 1


def patch(model: nn.Module) -> Patched:
    """Patch every module that is known; an unknown model stays as it is, reported as unpatched."""
    unpatch(model)
    patched = Patched()
    for module in model.modules():
        if not type(module).__module__.startswith("transformers.models."):
            continue
        installer = _installer(type(module).__name__)
        if installer is not None:
            installer(module, patched)
    if not patched.report:
        patched.count(model, "unpatched")
        logging.getLogger(__name__).warning(
            "model.kernels: no module of %s is known to kernels/patch.py; it runs unpatched",
            type(model).__name__,
        )
    elif not any(type(module).__name__ in HEADS for module in model.modules()):
        _say_head(model, patched)
    return patched


def _say_head(model: Any, patched: Patched) -> None:
    """Report a head that nothing here knows, under the name of its model."""
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        return
    patched.count(model, "unpatched")
    logging.getLogger(__name__).warning(
        "model.kernels: the head of %s is not known to kernels/patch.py; its loss is taken from "
        "logits",
        type(model).__name__,
    )


def patch_head(model: nn.Module) -> bool:
    """Patch the head alone, so that the loss never holds all logits; False where none is known."""
    patched = Patched()
    for module in model.modules():
        if type(module).__name__ in HEADS:
            _head(module, patched)
    return any(loss_head.OP in ops for ops in patched.report.values())


def unpatch(model: nn.Module) -> int:
    """Give every module its own code back; returns how many had ours."""
    return sum(unpatch_module(module) for module in model.modules())


def unpatch_module(module: nn.Module) -> int:
    """Give one module its own code back."""
    names = module.__dict__.pop("_tuneloom_patched", ())
    for name in names:
        del module.__dict__[name]
    return len(names)


def _installer(name: str) -> Callable[[Any, Patched], None] | None:
    if name in NORMS:
        return _norm
    if name in MLPS:
        return _mlp
    if name in EXPERTS:
        return _experts
    if name in ATTENTIONS:
        return _attention
    if name in HEADS:
        return _head
    return _layer if name in LAYERS else None


def _set(module: nn.Module, name: str, value: Any) -> None:
    """An instance attribute that hides the class's; outside nn.Module's own bookkeeping."""
    module.__dict__[name] = value
    module.__dict__.setdefault("_tuneloom_patched", []).append(name)


def _norm(module: Any, patched: Patched) -> None:
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    offset = NORMS[type(module).__name__]

    def forward(self: Any, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps, offset=offset)

    _set(module, "forward", types.MethodType(forward, module))
    patched.count(module, "rms_norm")


def _mlp(module: Any, patched: Patched) -> None:
    activation = _activation(module)
    if activation is None:
        patched.count(module, "unpatched")
        return

    def split(self: Any, x: Tensor) -> Tensor:
        h: Tensor = self.down_proj(gated(self.gate_proj(x), self.up_proj(x), activation))
        return h

    def fused(self: Any, hidden_states: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        h: Tensor = self.down_proj(gated(gate, up, activation))
        return h

    forward = fused if hasattr(module, "gate_up_proj") else split
    _set(module, "forward", types.MethodType(forward, module))
    patched.count(module, "gated")


def _experts(module: Any, patched: Patched) -> None:
    """The hook that transformers' batched and grouped expert products call between their two."""
    activation = _activation(module)
    if activation is None or not hasattr(type(module), "_apply_gate"):
        patched.count(module, "unpatched")
        return

    def apply_gate(self: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return gated(gate, up, activation)

    _set(module, "_apply_gate", types.MethodType(apply_gate, module))
    patched.count(module, "gated")


def _activation(module: Any) -> Activation | None:
    """The op's name of a module's activation; None for one that no kernel computes."""
    config = module.config
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return ACTIVATIONS.get(name or "")


def _with_rope(module: Any) -> Callable[..., Any]:
    """The attention's own forward, in which `apply_rotary_pos_emb` is ours."""
    function = type(module).forward
    names = {**function.__globals__, "apply_rotary_pos_emb": rope}
    ours = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    ours.__kwdefaults__ = function.__kwdefaults__
    return ours


def _attention(module: Any, patched: Patched) -> None:
    if "apply_rotary_pos_emb" not in type(module).forward.__code__.co_names:
        patched.count(module, "unpatched")
        return
    _set(module, "forward", types.MethodType(_with_rope(module), module))
    patched.count(module, "rope")


def _layer(module: Any, patched: Patched) -> None:
    activation = _activation(module.mlp)
    if activation is None:
        patched.count(module, "unpatched")
        return
    original = types.MethodType(type(module).forward, module)
    attend = _with_rope(module.self_attn)
    _set(module, "forward", partial(diet.layer_forward, module, original, attend, activation))
    patched.count(module, "activation_diet")


def _head(module: Any, patched: Patched) -> None:
    head = module.lm_head
    if type(head) is not nn.Linear:
        patched.count(module, "unpatched")
        return
    _set(head, "forward", types.MethodType(loss_head.forward, head))
    _set(head, "_tuneloom_loss_head", True)
    patched.count(module, loss_head.OP)
