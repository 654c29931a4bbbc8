"""Model FLOPs of a step by what the mathematics needs, and the peak of the device it ran on.

Full:  6 N_linear + 6 V D f + 3 L 2 s d_attn a token.    LoRA: 4 N_linear + 6 N_adapter + 4 V D f +
the same attention (no weight gradients of the frozen base; a head of method.extra_modules has
them). s = sum(len^2) / sum(len) of the packed documents, causal; f = share of tokens with a label;
of stacked experts those that a token is sent to. Padding and recomputation are never counted (PaLM,
arXiv 2204.02311, app. B).
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tuneloom.kernels.attention import widths
from tuneloom.train.text import causal_of, modules_aside

# Dense bf16 TFLOP/s (V100: fp16), vendor data sheets, without sparsity. Keys are words of the names
# that CUDA gives; what shares a chip at other clocks has a key of its own.
PEAK_TFLOPS = {
    "GB200": 2500, "B200": 2250, "GH200": 989.4, "H200": 989.4, "H200 NVL": 835.5,
    "H100": 989.4, "H100 PCIe": 756, "H100 NVL": 835.5, "H800": 989.4, "H800 PCIe": 756,
    "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "4090": 165, "3090": 71,
    "V100": 125,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What the formula needs of a model."""

    linear: int
    """Parameters of base linears that a token meets, head, embeddings and towers left out."""
    adapter: int
    """Trainable parameters beside the base, of adapters on stacked experts those that are met."""
    head: int
    """V * D."""
    head_frozen: bool
    attention: int
    """Sum over layers of heads * head width, a query's and a value's halved."""
    frozen: bool

    def step(self, *, tokens: int, target_tokens: int, square_tokens: int) -> float:
        """FLOPs of forward and backward over `tokens` real tokens in documents of sum(len^2)."""
        passes = 4 if self.frozen else 6
        linear = passes * self.linear * tokens + 6 * self.adapter * tokens
        head = (4 if self.head_frozen else 6) * self.head * target_tokens
        return linear + head + 6.0 * self.attention * square_tokens


def shape_of(network: nn.Module, *, frozen: bool) -> Shape:
    """Count parameters by the module that holds them; works on ZeRO-3 shards and NF4 weights."""
    linear = adapter = 0
    causal = causal_of(network)
    text, other = causal.config.get_text_config(), modules_aside(network)
    experts, met = experts_of(text), getattr(text, "num_experts_per_tok", 1)
    of_stacks = _adapters_of_stacks(network)
    # Of PEFT's wrapper around a module that is trained whole: that of its copy.
    head_weight = getattr(causal.get_output_embeddings(), "weight", None)
    for path, module in network.named_modules():
        if isinstance(module, nn.Embedding) or "original_module" in path.split("."):
            continue
        if module in other:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            size = true_numel(parameter)
            if parameter is head_weight:
                continue
            if frozen and parameter.requires_grad:
                adapter += size * met // experts if module in of_stacks else size
            elif name == "weight" and isinstance(module, nn.Linear):
                linear += size
            elif is_stack(parameter, experts):
                linear += size * met // experts
    return Shape(
        linear=linear,
        adapter=adapter,
        head=text.vocab_size * text.hidden_size,
        head_frozen=frozen and not getattr(head_weight, "requires_grad", False),
        attention=text.num_hidden_layers * text.num_attention_heads * sum(widths(text)) // 2,
        frozen=frozen,
    )


def _adapters_of_stacks(network: nn.Module) -> set[nn.Module]:
    """A and B of PEFT's wrappers around stacked experts: they hold those of every expert."""
    wrappers: list[Any] = [m for m in network.modules() if getattr(m, "num_experts", 1) != 1]
    pairs = [(m.lora_A, m.lora_B) for m in wrappers if hasattr(m, "lora_A")]
    return {side for pair in pairs for sides in pair for side in sides.values()}


def experts_of(text: Any) -> int:
    """Experts of a layer, by a text model's config; 0 where it has none."""
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((int(n) for key in keys if (n := getattr(text, key, None))), 0)


def is_stack(parameter: nn.Parameter, experts: int) -> bool:
    """Whether it holds one matrix of every expert, as transformers 5 has them: no nn.Linear."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) == 3 and shape[0] == experts


def true_numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, whether sharded by ZeRO-3 or packed in 4 bits."""
    if hasattr(parameter, "ds_numel"):
        return int(parameter.ds_numel)
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else parameter.numel()


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of this GPU; None where it is not known, and then no MFU is reported."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = [key for key in PEAK_TFLOPS if re.search(rf"\b{key}\b", name)]
    return PEAK_TFLOPS[max(found, key=len)] * 1e12 if found else None
