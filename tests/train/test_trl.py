"""TRL's SFTTrainer on the same rows: the same losses, so mask, loss and optimizer agree."""

import json
from pathlib import Path

import pytest
import torch

from tuneloom.testing import Gang, metrics, small_config

STEPS, ROWS = 8, 12


@pytest.fixture(scope="module")
def completions(tmp_path_factory: pytest.TempPathFactory, lab: Path) -> Path:
    """A lab of prompt/completion rows, which every trainer renders alike."""
    folder = tmp_path_factory.mktemp("trl")
    (folder / "base").symlink_to(lab / "base")
    rows = [
        {"prompt": f"question {i} {'7 ' * (i % 5)}\n", "completion": f"answer {i * i} {i % 3}"}
        for i in range(ROWS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def by_trl(folder: Path) -> list[float]:
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, target_modules="all-linear")
    settings = SFTConfig(
        output_dir=str(folder / "trl"), max_steps=STEPS, per_device_train_batch_size=ROWS,
        learning_rate=5e-3, lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=1.0,
        logging_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
        gradient_checkpointing=False, completion_only_loss=True, disable_tqdm=True,
    )  # fmt: skip
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    trainer = SFTTrainer(
        model=get_peft_model(model, lora),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "base"),
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_sft_trainer_gives_the_same_losses(completions: Path, one: Gang) -> None:
    one.fit(
        small_config(
            completions, "ours", steps=STEPS, batch__packing=False, batch__sequences=ROWS,
            optim__schedule="constant", optim__warmup_steps=0,
        )
    )  # fmt: skip
    theirs = by_trl(completions)
    assert len(theirs) == STEPS
    # TRL rounds what it logs to four digits after the point.
    assert metrics(completions, "ours") == pytest.approx(theirs, rel=2e-5, abs=6e-5)
