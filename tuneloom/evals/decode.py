"""Answers and losses of a loaded model, left-padded batches of rows of like length."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneloom.data import golden
from tuneloom.evals.model import Loaded

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1024, 16384
"""Padded tokens of one batch; on a CPU 1,024 are 30 % faster than 4,096, whose values leave L2."""
Advance = Callable[[int], None]


def by_length(lengths: Sequence[int], *, batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of like length, longest first, each of at most `batch_tokens` tokens."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def default_batch_tokens(loaded: Loaded) -> int:
    """What suits the device."""
    return GPU_BATCH_TOKENS if loaded.device.type == "cuda" else CPU_BATCH_TOKENS


def stop_ids(loaded: Loaded) -> list[int]:
    """Ids that end an answer: the model's, the tokenizer's, and the template's end of turn."""
    found = loaded.model.generation_config.eos_token_id
    ids = {loaded.tokenizer.eos_token_id, *(found if isinstance(found, list) else [found])}
    special = set(loaded.tokenizer.all_special_ids)
    ends = {one.ids[one.targets[-1][1] - 1] for one in golden.goldens(loaded.renderer)}
    ids |= ends & special
    return sorted(i for i in ids if i is not None)


def answers(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    batch_tokens: int | None = None,
    advance: Advance = lambda count: None,
) -> list[str]:
    """The model's answer to each prompt, greedy at temperature 0, without its end-of-turn token."""
    import torch

    found = [""] * len(prompts)
    options = _options(loaded, max_new_tokens=max_new_tokens, temperature=temperature)
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    budget = batch_tokens or default_batch_tokens(loaded)
    for batch in by_length(lengths, batch_tokens=budget):
        width = max(len(prompts[i]) for i in batch)
        ids = np.full((len(batch), width), options["pad_token_id"], np.int64)
        mask = np.zeros((len(batch), width), np.int64)
        for row, index in enumerate(batch):
            ids[row, width - len(prompts[index]) :] = prompts[index]
            mask[row, width - len(prompts[index]) :] = 1
        with torch.inference_mode():
            out = loaded.model.generate(
                input_ids=torch.from_numpy(ids).to(loaded.device),
                attention_mask=torch.from_numpy(mask).to(loaded.device),
                **options,
            )
        texts = loaded.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        for index, text in zip(batch, texts, strict=True):
            found[index] = text
        advance(len(batch))
    return found


def stream(
    loaded: Loaded,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    write: Callable[[str], None],
) -> str:
    """Answer one prompt, handing text to `write` as soon as it is certain; returns it whole."""
    import torch
    from transformers import TextStreamer

    class Writer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)
            write(text)

    pieces: list[str] = []
    ids = torch.tensor([list(prompt)], device=loaded.device)
    with torch.inference_mode():
        loaded.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            streamer=Writer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True),
            **_options(loaded, max_new_tokens=max_new_tokens, temperature=temperature),
        )
    return "".join(pieces)


def _options(loaded: Loaded, *, max_new_tokens: int, temperature: float) -> dict[str, Any]:
    """Keyword arguments of generate(); nothing else that a base ships with is used."""
    stops = stop_ids(loaded)
    pad = loaded.tokenizer.pad_token_id
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    return {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": stops or None,
        "pad_token_id": pad if pad is not None else (stops or [0])[0],
        "top_p": None,
        "top_k": None,
        "use_cache": True,
        **sampling,
    }


@dataclass(frozen=True)
class Reading:
    """What one forward pass over the right answers tells.

    loss: (N,) float64, summed over target tokens. followed: (N,) bool, every token of the last
    answer is the likeliest one after those before it, so greedy decoding gives just this answer.
    """

    loss: NDArray[np.float64]
    followed: NDArray[np.bool_]


def read(
    loaded: Loaded,
    rows: Sequence[tuple[NDArray[np.int32], NDArray[np.bool_]]],
    *,
    prompt_lengths: Sequence[int],
    batch_tokens: int | None = None,
    advance: Advance = lambda count: None,
) -> Reading:
    """Loss of each row, and whether the model would have answered the same.

    rows: N pairs of ids (L,) int32 and target (L,) bool; prompt_lengths: where the last answer
    starts. Left-padded, so that logits are taken of the last positions alone: at a vocabulary of
    128,000 those of whole rows are the largest thing in memory.
    """
    import torch
    from torch.nn.functional import cross_entropy

    loss = np.zeros(len(rows), np.float64)
    followed = np.zeros(len(rows), np.bool_)
    budget = batch_tokens or default_batch_tokens(loaded)
    for batch in by_length([len(ids) for ids, _ in rows], batch_tokens=budget):
        width = max(len(rows[i][0]) for i in batch)
        ids = np.zeros((len(batch), width), np.int64)
        mask, target, last = (np.zeros((len(batch), width), np.bool_) for _ in range(3))
        for row, index in enumerate(batch):
            start = width - len(rows[index][0])
            ids[row, start:], target[row, start:] = rows[index]
            mask[row, start:] = True
            last[row, start + prompt_lengths[index] :] = True
        first = int(target.any(0).argmax())  # the earliest target of the batch
        keep = width - first + 1  # position i is predicted from i - 1
        with torch.inference_mode():
            logits = loaded.model(
                input_ids=torch.from_numpy(ids).to(loaded.device),
                attention_mask=torch.from_numpy(mask.astype(np.int64)).to(loaded.device),
                position_ids=torch.from_numpy(_positions(mask)).to(loaded.device),
                use_cache=False,
                logits_to_keep=keep,
            ).logits[:, -keep:-1]
            truth = torch.from_numpy(ids[:, first:]).to(loaded.device)
            flat = logits.flatten(0, 1).float()
            each = cross_entropy(flat, truth.flatten(), reduction="none").view_as(truth).cpu()
            likeliest = (logits.argmax(-1) == truth).cpu().numpy()
        wanted = target[:, first:]
        loss[batch] = np.where(wanted, each.double().numpy(), 0.0).sum(1)
        answer = wanted & last[:, first:]  # none where the last answer is `train: false`
        followed[batch] = (likeliest | ~answer).all(1) & answer.any(1)
        advance(len(batch))
    return Reading(loss, followed)


def _positions(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(B, S) positions that start at 0 where padding ends."""
    return np.maximum(np.cumsum(mask, 1, dtype=np.int64) - 1, 0)
