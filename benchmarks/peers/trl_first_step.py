"""TRL's SFTTrainer up to its first step: trl_first_step.py WAY BASE ROWS FOLDER.

`defaults` is SFTConfig as it comes, `packed` the same work as ours (packs, nothing recomputed), and
`streaming` TRL at its fastest to step 1: an iterable dataset, tokenised as it is read. Writes
FOLDER/step when the first step is done.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

WAYS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "packed": {"packing": True, "per_device_train_batch_size": 2, "gradient_checkpointing": False},
    "streaming": {"per_device_train_batch_size": 4, "gradient_checkpointing": False},
}


class Told(TrainerCallback):
    """Says on disk that step 1 is done."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.path.touch()


def main(way: str, base: str, rows: str, folder: Path) -> None:
    """Train until killed."""
    read = load_dataset(
        "json", data_files=rows, split="train", cache_dir=str(folder / "cache"),
        streaming=way == "streaming",
    )  # fmt: skip
    settings = SFTConfig(
        output_dir=str(folder), max_steps=1000, max_length=512, use_cpu=True, bf16=False,
        report_to=[], disable_tqdm=True, save_strategy="no", **WAYS[way],
    )  # fmt: skip
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=settings,
        train_dataset=read,
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32,
                               target_modules="all-linear"),
        callbacks=[Told(folder / "step")],
    )  # fmt: skip
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
