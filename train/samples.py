"""Greedy answers of the live model to a few validation prompts, without a cache: right under any
ZeRO stage.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tuneloom.redact import redacted

FILE = "samples.jsonl"
"""In the run folder."""


@torch.no_grad()
def answer(
    network: nn.Module,
    prompts: list[list[int]],
    *,
    stops: set[int],
    max_tokens: int,
    device: torch.device,
) -> list[list[int]]:
    """New token ids for each prompt, ended by a stop token or `max_tokens`. Collective under
    ZeRO-3.

    Right-padded rows, causal attention: each step reads the logits at each row's own last token.
    """
    was_training = network.training
    network.eval()
    rows = [list(p) for p in prompts]
    done = [False] * len(rows)
    for _ in range(max_tokens):
        width = max(len(r) for r in rows)
        ends = sorted({len(row) - 1 for row in rows})  # logits of all positions may be gigabytes
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        positions = torch.arange(width).expand(len(rows), width)
        logits = network(
            input_ids=ids.to(device),
            position_ids=positions.to(device),
            use_cache=False,
            logits_to_keep=torch.tensor(ends, device=device),
        ).logits  # (B, ends, V)
        for i, row in enumerate(rows):
            if not done[i]:
                row.append(int(logits[i, ends.index(len(row) - 1)].argmax()))
                done[i] = row[-1] in stops
        if all(done):
            break
    network.train(was_training)
    return [row[len(p) :] for row, p in zip(rows, prompts, strict=True)]


def append(path: Path, step: int, rows: list[dict[str, Any]]) -> None:
    """Add one step's samples, without the secrets in them."""
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(redacted({"step": step, **row}), ensure_ascii=False) + "\n")


def rewind(path: Path, step: int) -> None:
    """Keep those of steps up to `step`: later ones come again, and a torn line never ended."""
    if not path.exists():
        return
    # Not by splitlines(): a text may hold a line separator of Unicode's.
    lines = re.findall(r"[^\n]*\n", path.read_text(encoding="utf-8", errors="replace"))
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(x for x in lines if _step_of(x) <= step), encoding="utf-8")
    os.replace(aside, path)


def _step_of(line: str) -> float:
    """Infinite for a line that is none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
