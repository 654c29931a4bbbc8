"""The model's own head gives the loss: transformers' forward runs as it is, but no logits are made.

    with loss_from_head(network, labels) as fused:
        out = network(**inputs, logits_to_keep=positions).logits    # (1, K, V), or () if fused
    loss = out if fused else cross_entropy(out...)

patch.py puts `forward` below on `lm_head`. Inside the context it returns the summed token loss of
`linear_cross_entropy` in place of logits; outside it is the linear it was. The call still goes
through the root module and `lm_head(...)`, so that ZeRO-3's hooks gather the head's weight.
A head that PEFT copies to train it whole is fused, too, and so is one whose model caps its logits
after it (Gemma 2). Not fused, and said so by the False: a head with an adapter, and one that is no
plain linear.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from tuneloom.kernels.jit import CALLS
from tuneloom.kernels.linear_cross_entropy import linear_cross_entropy

OP = "linear_cross_entropy"
_LABELS = "_tuneloom_labels"
_CAP = "final_logit_softcapping"
"""In the configs of models that cap their logits, in transformers' forward after the head."""


@contextlib.contextmanager
def loss_from_head(
    network: nn.Module, labels: Tensor, *, kept: Tensor | None = None
) -> Iterator[bool]:
    """Within, the head of `network` returns the loss sum against `labels`, flat, -100 ignored;
    `kept`, the positions that are not, saves a GPU from waiting for their number.
    """
    causal: Any = network
    head = running(causal.get_output_embeddings())
    if "_tuneloom_loss_head" not in getattr(head, "__dict__", ()):
        CALLS["loss from logits: the head is not a patched linear"] += 1
        yield False
        return
    config = next((m.config for m in causal.modules() if "lm_head" in m._modules), None)
    softcap = getattr(config, _CAP, None)
    head.__dict__[_LABELS] = labels, kept, softcap
    if softcap:  # or the loss would be capped, too
        setattr(config, _CAP, None)
    try:
        yield True
    finally:
        del head.__dict__[_LABELS]
        if softcap:
            setattr(config, _CAP, softcap)


def running(head: Any) -> Any:
    """What computes when `head` is called: of a head that PEFT trains whole, its active copy."""
    if "modules_to_save" not in getattr(head, "_modules", ()):
        return head
    active = [] if head.disable_adapters else head.active_adapters
    return head.modules_to_save[active[0]] if active else head.original_module


def forward(self: nn.Linear, hidden: Tensor) -> Tensor:
    """Of a patched head; hidden: (..., D), as many positions as labels within the context."""
    asked = self.__dict__.get(_LABELS)
    if asked is None:
        return functional.linear(hidden, self.weight, self.bias)
    labels, kept, softcap = asked
    return linear_cross_entropy(
        hidden, self.weight, labels, bias=self.bias, kept=kept, softcap=softcap
    )
