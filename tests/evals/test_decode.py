"""Reading and answering in batches give what the model gives row by row."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tuneloom.data.records import parse
from tuneloom.data.rows import open_rows
from tuneloom.evals import decode
from tuneloom.evals.model import Loaded, load


@pytest.fixture(scope="module")
def loaded(trained: dict[str, Path]) -> Loaded:
    adapter = trained["run"] / "export" / "adapter"
    return load(str(trained["base"]), adapter=str(adapter), device="cpu")


@pytest.fixture(scope="module")
def examples(loaded: Loaded, trained: dict[str, Path]) -> list[Any]:
    rows, renderer = open_rows(trained["test"]), loaded.renderer
    return [(renderer.render(rows[i]), renderer.prompt_ids(rows[i])) for i in range(12)]


def one_by_one(loaded: Loaded, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens without cache, batch or padding."""
    import torch

    ids, stops = list(prompt), decode.stop_ids(loaded)
    with torch.inference_mode():
        while len(ids) < len(prompt) + count:
            ids.append(int(loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in stops:
                break
    return ids[len(prompt) :]


def test_batches_are_sorted_by_length_within_the_budget_and_lose_no_row() -> None:
    lengths = [5, 90, 7, 60, 61, 3]
    batches = list(decode.by_length(lengths, batch_tokens=128))
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    for batch in batches:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= 128 or len(batch) == 1
    assert batches[0] == [1]


@pytest.mark.parametrize("batch_tokens", [1, 200, 4096])
def test_padded_batches_lose_as_a_row_alone_does(
    loaded: Loaded, examples: list[Any], batch_tokens: int
) -> None:
    import torch

    reading = decode.read(
        loaded,
        [(example.ids, example.target) for example, _ in examples],
        prompt_lengths=[len(prompt) for _, prompt in examples],
        batch_tokens=batch_tokens,
    )
    for (example, _), loss in zip(examples, reading.loss, strict=True):
        ids = torch.from_numpy(example.ids.astype(np.int64))[None]
        labels = torch.where(torch.from_numpy(example.target)[None], ids, -100)
        with torch.inference_mode():
            mean = loaded.model(input_ids=ids, labels=labels).loss
        assert loss == pytest.approx(float(mean) * int(example.target.sum()), rel=1e-4)


def test_batched_answers_equal_decoding_one_row_without_cache(
    loaded: Loaded, examples: list[Any]
) -> None:
    prompts = [prompt for _, prompt in examples]
    texts = decode.answers(loaded, prompts, max_new_tokens=6, batch_tokens=200)
    for prompt, text in zip(prompts, texts, strict=True):
        alone = one_by_one(loaded, prompt, 6)
        assert text == loaded.tokenizer.decode(alone, skip_special_tokens=True)


def test_reading_knows_which_rows_greedy_decoding_gets_right(
    loaded: Loaded, examples: list[Any], trained: dict[str, Path]
) -> None:
    rows = open_rows(trained["test"])
    reading = decode.read(
        loaded,
        [(example.ids, example.target) for example, _ in examples],
        prompt_lengths=[len(prompt) for _, prompt in examples],
    )
    texts = decode.answers(loaded, [prompt for _, prompt in examples], max_new_tokens=8)
    right = [text == rows[i].content["messages"][-1]["content"] for i, text in enumerate(texts)]
    assert reading.followed.tolist() == right
    assert any(right) and not all(right)


def test_an_answer_that_is_not_trained_on_is_not_followed_unread(loaded: Loaded) -> None:
    turns = [("user", "cat 1: which kind?"), ("assistant", "animal"), ("user", "and?"),
             ("assistant", "nothing that it would say")]  # fmt: skip
    messages: list[dict[str, Any]] = [{"role": r, "content": c} for r, c in turns]
    messages[-1]["train"] = False
    record = parse({"messages": messages})
    example, prompt = loaded.renderer.render(record), loaded.renderer.prompt_ids(record)
    reading = decode.read(loaded, [(example.ids, example.target)], prompt_lengths=[len(prompt)])
    assert reading.followed.tolist() == [False]


def test_penalties_that_a_base_ships_with_do_not_change_its_greedy_answers(
    loaded: Loaded, examples: list[Any], trained: dict[str, Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(trained["base"], tmp_path / "base"))
    path = base / "generation_config.json"
    shipped = json.loads(path.read_text()) if path.exists() else {}
    penalties = {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "min_new_tokens": 6}
    path.write_text(json.dumps(shipped | penalties))
    adapter = trained["run"] / "export" / "adapter"
    penalised = load(str(base), adapter=str(adapter), device="cpu")
    prompts = [prompt for _, prompt in examples]
    assert decode.answers(penalised, prompts, max_new_tokens=8) == decode.answers(
        loaded, prompts, max_new_tokens=8
    )
    assert decode.stop_ids(penalised) == decode.stop_ids(loaded)


def test_streamed_text_is_the_answer(loaded: Loaded, examples: list[Any]) -> None:
    prompt, pieces = examples[0][1], []
    whole = decode.stream(loaded, prompt, max_new_tokens=6, temperature=0.0, write=pieces.append)
    assert "".join(pieces) == whole
    assert whole == decode.answers(loaded, [prompt], max_new_tokens=6)[0]


def test_the_end_of_turn_token_of_the_template_ends_an_answer(loaded: Loaded) -> None:
    end = loaded.tokenizer.convert_tokens_to_ids("<|end|>")
    assert end in decode.stop_ids(loaded)


def test_sampling_is_repeatable_by_its_seed_and_differs_from_greedy(
    loaded: Loaded, examples: list[Any]
) -> None:
    import torch

    prompts = [prompt for _, prompt in examples]

    def sample(seed: int) -> list[str]:
        torch.manual_seed(seed)
        return decode.answers(loaded, prompts, max_new_tokens=6, temperature=5.0)

    assert sample(1) == sample(1) != sample(2)


def test_without_the_adapter_the_model_is_its_base(
    loaded: Loaded, examples: list[Any], trained: dict[str, Path]
) -> None:
    import torch

    base = load(str(trained["base"]), device="cpu")
    ids = torch.tensor([examples[0][1]])
    with torch.inference_mode():
        alone = base.model(input_ids=ids).logits
        tuned = loaded.model(input_ids=ids).logits
        with loaded.without_adapter():
            bare = loaded.model(input_ids=ids).logits
    assert torch.equal(bare, alone)
    assert not torch.equal(tuned, alone)
