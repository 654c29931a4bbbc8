"""Before step 1: prove on the real model that documents in a pack do not see each other.

Change document A's tokens; document B's logits must not move by a bit. A backend that ignores the
boundaries moves them (trl#3067, prime-rl#2943), and so do layers that mix tokens by other means.
"""

import torch
from torch import nn

from tuneloom.errors import TrainingError
from tuneloom.train.batches import collate

LENGTH = 12


@torch.no_grad()
def isolation(network: nn.Module, vocabulary: int, device: torch.device, *, seed: int) -> float:
    """Largest change of B's logits when A changes; raises TrainingError if B sees A. Collective
    under ZeRO-3.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (3, LENGTH), generator=generator).int().numpy()
    targets = tokens >= 0
    was_training = network.training
    network.eval()
    logits = []
    for first in (tokens[0], tokens[1]):
        pack = collate([0, 1], [(first, targets[0]), (tokens[2], targets[2])], packing=True)
        logits.append(network(**pack.to(device).model_inputs()).logits[0].float())
    network.train(was_training)
    moved_a = (logits[0][:LENGTH] - logits[1][:LENGTH]).abs().max().item()
    moved_b = (logits[0][LENGTH:] - logits[1][LENGTH:]).abs().max().item()
    assert moved_a > 0, "document A's logits did not move when its tokens changed"
    if moved_b > 0:
        raise TrainingError(
            "batch.packing: documents in a pack see each other in this model (logits of the second "
            "moved "
            f"by {moved_b:.3g} when the first changed); set batch.packing=false"
        )
    return moved_b
