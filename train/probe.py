"""Before step 1, on the real model: documents in a pack do not see each other, and a pack shared by
several ranks is the pack.

Change document A's tokens; document B's logits must not move by a bit. A backend that ignores the
boundaries moves them (trl#3067, prime-rl#2943), and so do layers that mix tokens by other means.
Those would also see no token of another rank, so logits of parts are held against logits of wholes.
"""

import numpy as np
import torch
from torch import Tensor, nn

from tuneloom.errors import TrainingError
from tuneloom.train import distributed
from tuneloom.train.batches import MicroBatch, collate
from tuneloom.train.distributed import World

LENGTH = 12
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of logits in units of the largest logit: other shapes sum in other orders."""


@torch.no_grad()
def isolation(network: nn.Module, vocabulary: int, world: World, *, seed: int) -> float:
    """Largest change of B's logits when A changes; raises TrainingError if B sees A. Collective
    under ZeRO-3 and where ranks share a pack.
    """
    tokens = _tokens(vocabulary, seed)
    packs = [_pack(first, tokens[2], world) for first in tokens[:2]]
    logits = [_logits(network, pack.shard(world.sequence_rank, world.sequence)) for pack in packs]
    moved = (logits[0] - logits[1]).abs().amax(-1).cpu()  # (T / S,)
    of_a = world.sequence_rank * len(moved) + torch.arange(len(moved)) < LENGTH
    most = torch.stack([(moved * of_a).max(), (moved * ~of_a).max()])
    moved_a, moved_b = distributed.max_over_ranks(most).tolist()
    assert moved_a > 0, "document A's logits did not move when its tokens changed"
    if moved_b > 0:
        raise TrainingError(
            "batch.packing: documents in a pack see each other in this model (logits of the second "
            "moved "
            f"by {moved_b:.3g} when the first changed); set batch.packing=false"
        )
    return float(moved_b)


@torch.no_grad()
def sharing(network: nn.Module, vocabulary: int, world: World, *, seed: int) -> float:
    """Largest difference between a pack's logits from the ranks that share it and from each alone,
    in units of the largest logit; raises TrainingError above `CLOSE`. Collective.
    """
    tokens = _tokens(vocabulary, seed)
    pack = _pack(tokens[0], tokens[2], world)
    part = pack.shard(world.sequence_rank, world.sequence)
    whole, shared = _logits(network, pack), _logits(network, part)
    here = slice(world.sequence_rank * len(shared), (world.sequence_rank + 1) * len(shared))
    apart = (shared - whole[here]).abs().max() / whole.abs().max()
    worst = distributed.max_over_ranks(apart.cpu()).item()
    dtype = next(network.parameters()).dtype
    if not worst <= CLOSE[dtype]:
        raise TrainingError(
            "batch.sequence_parallel: this model's logits of a pack shared by "
            f"{world.sequence} ranks differ by {worst:.3g} from those of the pack on one; a layer "
            "beside attention mixes tokens; set batch.sequence_parallel=1"
        )
    return float(worst)


def _tokens(vocabulary: int, seed: int) -> np.ndarray:
    """(3, LENGTH) int32: two versions of document A, and document B."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (3, LENGTH), generator=generator).int().numpy()


def _pack(first: np.ndarray, second: np.ndarray, world: World) -> MicroBatch:
    documents = [(ids, ids >= 0) for ids in (first, second)]
    return collate([0, 1], documents, packing=True, multiple=world.sequence).to(world.device)


def _logits(network: nn.Module, micro: MicroBatch) -> Tensor:
    """(positions, V) fp32, as in evaluation."""
    was_training = network.training
    network.eval()
    logits: Tensor = network(**micro.model_inputs()).logits[0].float()
    network.train(was_training)
    return logits
