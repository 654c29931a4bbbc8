"""A plain PyTorch loop over the very rows that the ledger books gives the trainer's curve."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tuneloom.data.rows import open_rows
from tuneloom.testing import Gang, metrics, small_config
from tuneloom.train.config import OptimConfig
from tuneloom.train.schedule import lr_at

STEPS, LR = 20, 5e-3


def plain_loop(lab: Path, run_id: str) -> list[float]:
    """One row at a time, no packing, no DeepSpeed, the mask by the template's text."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(lab / "base")
    model = AutoModelForCausalLM.from_pretrained(lab / "base", dtype=torch.float32)
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(model, lora)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0
    )
    rows = open_rows(lab / "rows.jsonl")
    by_id = {rows[i].id: rows[i].content["messages"] for i in range(len(rows))}

    def loss_of(messages: list[dict[str, str]]) -> tuple[Tensor, int]:
        prompt = f"<|bos|><|user|>\n{messages[0]['content']}<|end|>\n<|assistant|>\n"
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        answer = tokenizer(f"{messages[1]['content']}<|end|>", add_special_tokens=False).input_ids
        newline = tokenizer("\n", add_special_tokens=False).input_ids
        whole = torch.tensor([ids + answer + newline])
        logits = model(input_ids=whole).logits[0, len(ids) - 1 : len(ids) + len(answer) - 1]
        return F.cross_entropy(logits, torch.tensor(answer), reduction="sum"), len(answer)

    table = pq.read_table(lab / "runs" / run_id / "exposure.parquet").to_pylist()
    losses = []
    for step in range(1, STEPS + 1):
        parts = [loss_of(by_id[row["record_id"]]) for row in table if row["step"] == step]
        loss = torch.stack([part for part, _ in parts]).sum() / sum(count for _, count in parts)
        for group in optimizer.param_groups:
            schedule = OptimConfig(lr=LR, warmup_steps=2)
            group["lr"] = LR * lr_at(step - 1, (step - 1) / STEPS, schedule)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("stage", [0, 2])
def test_a_plain_loop_gives_the_same_twenty_losses(
    lab: Path, one: Gang, two: Gang, stage: int, packing: bool
) -> None:
    run_id = f"against-plain{stage}-{packing}".lower()
    gang = two if stage else one
    settings = {"steps": STEPS, "optim__lr": LR, "zero__stage": stage, "batch__packing": packing}
    gang.fit(small_config(lab, run_id, **settings))
    assert json.loads((lab / "runs" / run_id / "run.json").read_text())["steps"] == STEPS
    assert metrics(lab, run_id) == pytest.approx(plain_loop(lab, run_id), rel=1e-5)
