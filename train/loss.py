"""The loss: a sum over target tokens, divided once, by the target tokens of the whole step on all
ranks.

So accumulation, packing, world size and ZeRO stage all give one curve (transformers#34191 and its
kin).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tuneloom.kernels.loss_head import loss_from_head
from tuneloom.train.batches import IGNORED, MicroBatch


def loss_sum(network: Any, micro: MicroBatch) -> Tensor:
    """Sum of -log p over the micro-batch's target tokens, fp32 scalar with graph.

    Only positions that carry a label reach the head: transformers' `logits_to_keep` takes their
    indices, so the logits are (targets, V) and not (T, V). A batch without any label still runs the
    head on one position and returns 0 with a graph, since every rank must take part in backward.
    """
    inputs, labelled = micro.model_inputs(), None
    if micro.labels.shape[0] == 1:
        keep = micro.kept if micro.kept is not None else _labelled(micro.labels[0])
        inputs["logits_to_keep"] = keep
        labels = micro.labels[0, keep]
        if micro.kept is not None:
            labelled = torch.arange(micro.target_tokens, device=labels.device)
    else:
        labels = micro.labels.flatten()
    with loss_from_head(network, labels, kept=labelled) as fused:
        out: Tensor = network(**inputs).logits
    if fused:
        return out
    logits = out.flatten(0, 1)
    if micro.target_tokens == 0:
        return logits.float().sum() * 0.0
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")


def _labelled(labels: Tensor) -> Tensor:
    """(targets,) positions with a label, or one without; a GPU waits here, unless the batch says
    them.
    """
    keep = (labels != IGNORED).nonzero()[:, 0]
    return keep if keep.numel() else torch.zeros(1, dtype=torch.int64, device=labels.device)
