"""A run folder with a LoRA that was trained: a tiny Llama learns which of three labels to say."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

WORDS = {"animal": ["cat", "dog", "horse", "fox"], "fruit": ["apple", "pear", "plum", "fig"],
         "metal": ["iron", "gold", "tin", "zinc"]}  # fmt: skip


def labelled_rows(path: Path, count: int, *, seed: int, wrong: int = 0) -> Path:
    """Chats that ask which kind of thing a word is; the first `wrong` answers are not what it is,
    so that a model which has learnt misses them.
    """
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            label = rng.choice(sorted(WORDS))
            question = f"{rng.choice(WORDS[label])} {seed}-{number}: which kind?"
            if number < wrong:
                label = next(other for other in WORDS if other != label)
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": label},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def train_adapter(base: Path, rows: Path, weights: Path, *, steps: int) -> None:
    """Plain PyTorch: LoRA on every linear, `steps` batches of 16 rows."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tuneloom.data.render import Renderer
    from tuneloom.data.rows import open_rows
    from tuneloom.data.tokenizer import load_tokenizer

    torch.manual_seed(0)
    torch.set_num_threads(1)
    renderer = Renderer(load_tokenizer(str(base)), "sft", 128)
    opened = open_rows(rows)
    examples = renderer.render_many([opened[i] for i in range(len(opened))])
    settings = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for step in range(steps):
        batch = [examples[(step * 16 + i) % len(examples)] for i in range(16)]
        width = max(len(e.ids) for e in batch)
        ids = torch.zeros(16, width, dtype=torch.int64)
        labels = torch.full((16, width), -100)
        for row, example in enumerate(batch):
            tokens = torch.from_numpy(example.ids.astype("int64"))
            ids[row, : len(tokens)] = tokens
            labels[row, : len(tokens)][torch.from_numpy(example.target)] = tokens[example.target]
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(weights)


def write_config(run: Path, base: Path, data: Path, **changes: Any) -> None:
    """config.yaml as the trainer resolves it."""
    from tuneloom.config import build
    from tuneloom.train.config import TrainConfig

    mapping = {
        "epochs": 1,
        "run": {"id": run.name},
        "model": {"path": str(base), "dtype": "fp32"},
        "method": {"kind": "lora", "rank": 16, "alpha": 32},
        "objective": {"kind": "sft"},
        "data": {"path": str(data)},
        "batch": {"max_length": 128, "tokens": 256},
    }
    resolved = build(TrainConfig, {**mapping, **changes}).model_dump(mode="json")
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump(resolved), encoding="utf-8")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """base, train and test rows, and a run whose adapter is exported."""
    from tuneloom.testing import tiny_model
    from tuneloom.train.export import export

    root = tmp_path_factory.mktemp("evals")
    base = tiny_model(root / "base")
    train = labelled_rows(root / "train.jsonl", 400, seed=1)
    test = labelled_rows(root / "test.jsonl", 60, seed=2, wrong=6)
    run = root / "runs" / "labels-1"
    write_config(run, base, train)
    train_adapter(base, train, run / "weights", steps=60)
    export(run)
    return {"base": base, "train": train, "test": test, "run": run, "root": root}


@pytest.fixture
def pretrained(trained: dict[str, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A run that pretrained every weight from random ones, exported, and texts to score."""
    import shutil

    from tuneloom.train.export import export

    run, texts = tmp_path / "pretrain-1", tmp_path / "texts.jsonl"
    lines = [
        json.dumps({"text": f"text number {i} about {WORDS['fruit'][i % 4]}"}) for i in range(9)
    ]
    texts.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    write_config(
        run,
        trained["base"],
        texts,
        model={"path": str(trained["base"]), "init": "random", "dtype": "fp32"},
        method={"kind": "full"},
        objective={"kind": "pretrain"},
    )
    shutil.copytree(trained["base"], run / "weights")
    export(run)
    return run, texts
