"""Answers and losses of a loaded model, batched by length: left-padded or right."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneloom.evals.model import Loaded

BATCH_TOKENS = 4096
"""Padded tokens of one batch: 2 GB of fp32 logits at a vocabulary of 128,000."""
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


def stop_ids(loaded: Loaded) -> list[int]:
    """Ids that end an answer: the model's, the tokenizer's, and the template's end of turn."""
    found = loaded.model.generation_config.eos_token_id
    ids = {loaded.tokenizer.eos_token_id, *(found if isinstance(found, list) else [found])}
    for golden in loaded.contract.golden if loaded.contract else ():
        if golden.targets and "messages" in golden.record:
            last = golden.ids[golden.targets[-1][1] - 1]
            if last in loaded.tokenizer.all_special_ids:
                ids.add(last)
    return sorted(i for i in ids if i is not None)


def answers(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    batch_tokens: int = BATCH_TOKENS,
    advance: Advance = lambda count: None,
) -> list[str]:
    """The model's answer to each prompt, greedy at temperature 0, without its end-of-turn token."""
    import torch

    found = [""] * len(prompts)
    options = _options(loaded, max_new_tokens=max_new_tokens, temperature=temperature)
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    for batch in by_length(lengths, batch_tokens=batch_tokens):
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
    """Keyword arguments of generate(); sampling defaults that a base ships with are not used."""
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


def losses(
    loaded: Loaded,
    rows: Sequence[tuple[NDArray[np.int32], NDArray[np.bool_]]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    advance: Advance = lambda count: None,
) -> NDArray[np.float64]:
    """Summed cross-entropy over the target tokens of each row.

    rows: N pairs of ids (L,) int32 and target (L,) bool. Returns (N,) float64.
    """
    import torch
    from torch.nn.functional import cross_entropy

    found = np.zeros(len(rows), np.float64)
    for batch in by_length([len(ids) for ids, _ in rows], batch_tokens=batch_tokens):
        width = max(len(rows[i][0]) for i in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        mask = torch.zeros(len(batch), width, dtype=torch.int64)
        target = torch.zeros(len(batch), width, dtype=torch.bool)
        for row, index in enumerate(batch):
            length = len(rows[index][0])
            ids[row, :length] = torch.from_numpy(np.asarray(rows[index][0], np.int64))
            target[row, :length] = torch.from_numpy(np.asarray(rows[index][1], np.bool_))
            mask[row, :length] = 1
        ids, mask, target = (t.to(loaded.device) for t in (ids, mask, target))
        with torch.inference_mode():
            logits = loaded.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            where = target[:, 1:]  # position i is predicted from i - 1
            each = cross_entropy(logits[:, :-1][where].float(), ids[:, 1:][where], reduction="none")
            summed = torch.zeros(where.shape, dtype=torch.float64, device=loaded.device)
            summed[where] = each.double()
        found[batch] = summed.sum(1).cpu().numpy()
        advance(len(batch))
    return found
