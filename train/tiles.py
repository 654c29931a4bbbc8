"""MLPs a few tokens at a time, for sequences whose whole gate and up products do not fit.

Each tile is a checkpoint of its own: forward keeps the MLP's input and nothing of the tiles,
backward computes one tile again at a time. (DeepSpeed's TiledMLP, 0.19.8, does the same by nested
backwards; where torch.chunk makes fewer pieces than asked for, as of 5 tokens into 4, it marks no
gradient as ready and ZeRO drops it.) The loss is tiled by kernels/linear_cross_entropy.py.
"""

import types
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tuneloom.errors import ConfigError
from tuneloom.kernels.patch import MLPS, patch_head
from tuneloom.train.config import BatchConfig, ModelConfig
from tuneloom.train.text import decoder_layers

SEEN: Counter[str] = Counter()
"""Tiled forward passes and tiles since `SEEN.clear()`; effects.json is written from it."""


def install(network: nn.Module, model: ModelConfig, batch: BatchConfig) -> int:
    """Tile every decoder layer's MLP and the loss; returns how many MLPs, 0 where it is off.

    Raises ConfigError for a model whose MLP or head is not known to work on each token alone.
    """
    if model.tile_tokens is None:
        return 0
    blocks = [getattr(layer, "mlp", layer) for layer in decoder_layers(network)]
    unknown = sorted({type(b).__name__ for b in blocks if type(b).__name__ not in MLPS})
    if unknown or not blocks or not patch_head(network):
        what = ", ".join(unknown) or type(network).__name__
        raise ConfigError(
            f"model.tile_tokens: {what} is not known to work on each token alone; leave it null"
        )
    tiles = batch.tiles(model.tile_tokens)
    for block in blocks:
        block.__dict__["forward"] = types.MethodType(_tiled(type(block).forward, tiles), block)
    return len(blocks)


def _tiled(forward: Any, tiles: int) -> Any:
    def tiled(self: nn.Module, x: Tensor) -> Tensor:
        """x: (B, S, D); the same out."""
        SEEN["forwards"] += 1
        SEEN["tiles"] += tiles
        rows = x.reshape(-1, x.shape[-1]).tensor_split(tiles)  # some of 0 rows in a short batch
        parts = [checkpoint(forward, self, part, use_reentrant=False) for part in rows]
        return torch.cat(parts).view(x.shape)

    return tiled
