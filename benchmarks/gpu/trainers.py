"""B6, whole trainers: ours beside TRL's SFTTrainer and Unsloth, by default and at their best.

One random model in a folder, the same documents, LoRA r=16 on all linears. Each contender is a
process of its own, since Unsloth and Liger patch what they find: `benchmarks.gpu.trainers NAME
FOLDER STEPS`. Counted are tokens of documents a second, padding left out, in steps after the first
ones; what is done before step 1 (tokenising, packing) is not in it. Each row says which attention
ran: TRL packs on flash-attn where it is installed, else on SDPA under a mask of documents (T^2),
beside which stands TRL without packing, whose SDPA needs no mask.
"""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.first_step import BASE
from benchmarks.gpu.lora_step import LLAMA_8B, TINY, Shape
from benchmarks.gpu.timing import Plan, device

TRL: dict[str, dict[str, Any]] = {
    "TRL, its defaults": {},
    "TRL at its best": {"packing": True, "gradient_checkpointing": False, "use_liger_kernel": True},
    "TRL at its best, no packing": {"gradient_checkpointing": False, "use_liger_kernel": True},
    "Unsloth, its defaults": {"unsloth": "unsloth"},
    "Unsloth at its best": {"packing": True, "gradient_checkpointing": False, "unsloth": False},
}
"""What each sets in SFTConfig; `unsloth` is its own use_gradient_checkpointing."""
OURS = "ours"
FLASH = {"flash_attention_3": "flash_attn_interface", "flash_attention_2": "flash_attn"}
"""transformers' names, and the modules behind them."""


def run(plan: Plan, dry: bool) -> dict[str, Any]:
    """All contenders in turn on one model and one set of rows."""
    shape = TINY if dry else LLAMA_8B
    steps = plan.warm_up + plan.timed
    rows: dict[str, Any] = {}
    missing = {name: reason for name in TRL if (reason := _missing(name))}
    with tempfile.TemporaryDirectory(prefix="trainers-") as made:
        folder = Path(made)
        write_model(folder / "base", shape)
        write_documents(folder / "rows.jsonl", shape, count=64 * steps)
        for name in (OURS, *(name for name in TRL if name not in missing)):
            command = [sys.executable, "-m", "benchmarks.gpu.trainers", name, made, str(steps)]
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            if ran.returncode:
                missing[name] = f"failed: {(ran.stderr.strip() or '?').splitlines()[-1][:300]}"
                continue
            said = json.loads(ran.stdout.splitlines()[-1])
            speeds = said["speeds"][plan.warm_up :]
            rows[name] = {"tokens_per_second": round(statistics.median(speeds), 1),
                          "range": [round(min(speeds), 1), round(max(speeds), 1)],
                          "attention": said["attention"]}  # fmt: skip
    mine = rows.get(OURS, {}).get("tokens_per_second")
    ratios = {f"ours / {name}": round(mine / row["tokens_per_second"], 3)
              for name, row in rows.items() if mine and name != OURS}  # fmt: skip
    return {"shape": vars(shape), "rows": rows, "not_run": missing, "ratios": ratios}


def _missing(name: str) -> str:
    """Why a peer cannot run here; empty where it can."""
    wanted = ["trl", "datasets"]
    wanted += ["unsloth"] if "unsloth" in TRL[name] else []
    wanted += ["liger_kernel"] if TRL[name].get("use_liger_kernel") else []
    lacking = [package for package in wanted if not importlib.util.find_spec(package)]
    if lacking:
        return f"not installed: {', '.join(lacking)}"
    gpu_only = "unsloth" in TRL[name] or TRL[name].get("use_liger_kernel")
    return "needs a GPU" if gpu_only and not torch.cuda.is_available() else ""


def write_model(folder: Path, shape: Shape) -> None:
    """A random Llama with the tokenizer of the shipped base, which knows fewer words."""
    import transformers

    classes = max(shape.classes, json.loads((BASE / "config.json").read_text())["vocab_size"])
    config = transformers.LlamaConfig(
        hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_heads, head_dim=shape.head,
        vocab_size=classes, tie_word_embeddings=False, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    with device():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model  # or this process keeps its memory from those that are measured
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for path in BASE.glob("*token*"):
        shutil.copy(path, folder)


def write_documents(path: Path, shape: Shape, *, count: int) -> None:
    """Texts of known words: about 600 tokens in the mean at the full size, few of them long."""
    vocabulary = json.loads((BASE / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    words = sorted(t[1:] for t in vocabulary if t[0] == "Ġ" and t[1:].isalpha())
    draws = random.Random(0)
    mean = shape.length * 0.1
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            size = min(shape.length, max(4, round(mean * draws.lognormvariate(0.0, 0.9))))
            file.write(json.dumps({"text": " ".join(draws.choices(words, k=size))}) + "\n")


def ours(folder: Path, shape: Shape, steps: int) -> dict[str, Any]:
    """Tokens a second of each step, as metrics.jsonl has them, and the attention that ran."""
    from tuneloom.config import build, compose
    from tuneloom.kernels import attention
    from tuneloom.train.config import TrainConfig
    from tuneloom.train.loop import fit

    half = "bf16" if torch.cuda.is_available() else "fp32"
    mapping = compose("train", [
        "model=folder", f"model.path={folder}/base", f"model.dtype={half}", "model.kernels=true",
        "objective=pretrain", f"data.path={folder}/rows.jsonl", "data.validation=null",
        f"batch.max_length={shape.length}", f"batch.tokens={shape.rows * shape.length}",
        "batch.over_length=truncate", "batch.max_lost_answer_tokens=1.0", "method=lora",
        f"method.rank={shape.rank}", "zero=stage0", f"steps={steps}", "tracker=off",
        "checkpoint.every=0", "train.drill=false", f"run.root={folder}/runs", "run.id=ours",
    ])  # fmt: skip
    del mapping["launch"]
    fit(build(TrainConfig, mapping))
    lines = (folder / "runs" / "ours" / "metrics.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    speeds = [r["speed/tokens_per_second"] for r in rows if "speed/tokens_per_second" in r]
    return {"speeds": speeds, "attention": " ".join(attention.CALLS)}


def attention_of(keys: dict[str, Any]) -> str:
    """What TRL's model attends with: documents of a pack need flash-attn, or a mask."""
    there = (name for name, module in FLASH.items() if importlib.util.find_spec(module))
    usable = keys.get("packing") and torch.cuda.is_available()
    return next(there, "sdpa") if usable else "sdpa"


def theirs(name: str, folder: Path, shape: Shape, steps: int) -> dict[str, Any]:
    """The same of an SFTTrainer, with Unsloth's model where the name says so."""
    keys = dict(TRL[name])
    unsloth = keys.pop("unsloth", None)
    if unsloth is not None:
        model, tokenizer = _unsloth(folder / "base", shape, unsloth)  # before trl is imported
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    if unsloth is None:
        half = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        model = AutoModelForCausalLM.from_pretrained(
            folder / "base", dtype=half, attn_implementation=attention_of(keys)
        )
        tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    adapter = LoraConfig(task_type="CAUSAL_LM", r=shape.rank, lora_alpha=2 * shape.rank,
                         target_modules="all-linear")  # fmt: skip
    if keys:  # defaults keep TRL's own size of a batch
        keys["per_device_train_batch_size"] = shape.rows
    settings = SFTConfig(
        output_dir=str(folder / "peer"), max_steps=steps, max_length=shape.length, report_to=[],
        disable_tqdm=True, save_strategy="no", use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(), **keys,
    )  # fmt: skip
    read = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train",
                        cache_dir=str(folder / "cache"))  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=settings, train_dataset=read, processing_class=tokenizer,
        peft_config=adapter if unsloth is None else None,
    )  # fmt: skip
    return {"speeds": _timed(trainer), "attention": model.config._attn_implementation}


def _unsloth(base: Path, shape: Shape, checkpointing: Any) -> tuple[Any, Any]:
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(base), max_seq_length=shape.length, dtype=torch.bfloat16, load_in_4bit=False
    )
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = FastLanguageModel.get_peft_model(
        model, r=shape.rank, lora_alpha=2 * shape.rank, target_modules=linears,
        use_gradient_checkpointing=checkpointing,
    )  # fmt: skip
    return adapted, tokenizer


def _timed(trainer: Any) -> list[float]:
    """Train; tokens a second of every step. Batches are counted on the host, as they are made."""
    from transformers import TrainerCallback

    counts: list[int] = []
    speeds: list[float] = []
    collate = trainer.data_collator

    def counted(examples: Any) -> Any:
        batch = collate(examples)
        counts.append(int((batch["labels"] != -100).sum()))
        return batch

    class Clock(TrainerCallback):
        started = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not self.started:
                self.started = _now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now, done = _now(), len(speeds)
            speeds.append(counts[done] / (now - self.started))
            self.started = now

    trainer.data_collator = counted
    trainer.add_callback(Clock())
    trainer.train()
    return speeds


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main(name: str, folder: Path, steps: int) -> None:
    """One contender: its speeds as the last line."""
    sizes = json.loads((folder / "base" / "config.json").read_text("utf-8"))
    shape = LLAMA_8B if sizes["hidden_size"] == LLAMA_8B.width else TINY
    found = ours(folder, shape, steps) if name == OURS else theirs(name, folder, shape, steps)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
