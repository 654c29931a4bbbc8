"""For tests only: a tiny random Llama with its tokenizer, rows, and a gang of gloo ranks."""

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def tiny_tokenizer(folder: Path, texts: list[str], vocab_size: int = 384) -> None:
    """Train a byte-level BPE with a chat template on `texts` and save it into `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", bos_token="<|bos|>", eos_token="<|end|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def tiny_model(
    folder: Path,
    *,
    hidden: int = 64,
    layers: int = 2,
    seed: int = 0,
    dtype: str = "float32",
    tied: bool = True,
) -> Path:
    """A random Llama of about 100,000 parameters with tokenizer and chat template, saved in
    `folder`.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer(folder, [f"question {i} answer {i * i} the quick brown fox" for i in range(200)])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, tie_word_embeddings=tied, dtype=dtype,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def chat_rows(path: Path, count: int, seed: int = 0) -> Path:
    """`count` short chats with answers of uneven length, as JSONL."""
    import random

    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            words = " ".join(str(rng.randrange(100)) for _ in range(rng.randrange(1, 12)))
            row = [
                {"role": "user", "content": f"question {i} {words}"},
                {"role": "assistant", "content": f"answer {words}"},
            ]
            file.write(json.dumps({"messages": row}) + "\n")
    return path


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def small_config(folder: Path, run_id: str, **dotted: object) -> dict[str, object]:
    """A train config over folder/base and folder/rows.jsonl that takes a second; keys such as
    `zero__stage`.
    """
    config: dict[str, object] = {
        "epochs": 100.0, "steps": 6, "run": {"root": str(folder / "runs"), "id": run_id},
        "model": {"path": str(folder / "base"), "dtype": "fp32"},
        "method": {"kind": "lora", "rank": 8},
        "objective": {"kind": "sft"},
        "data": {"path": str(folder / "rows.jsonl"), "validation": None},
        "batch": {"max_length": 128, "tokens": 512, "window": 64},
        "optim": {"lr": 5e-3, "warmup_steps": 2}, "zero": {"stage": 0}, "checkpoint": {"every": 0},
        "train": {"drill": False}, "tracker": {"mode": "off"},
    }  # fmt: skip
    for key, value in dotted.items():
        *path, last = key.split("__")
        at: dict[str, object] = config
        for part in path:
            at = at.setdefault(part, {})  # type: ignore[assignment]
        at[last] = value
    method: Any = config["method"]
    if method["kind"] == "full":
        method.pop("rank", None)
    return config


def metrics(folder: Path, run_id: str, key: str = "train/loss") -> list[float]:
    """One number a step of a run, as written; `step` itself of the steps that were trained."""
    lines = (folder / "runs" / run_id / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    trained = [row for row in rows if "train/loss" in row] if key == "step" else rows
    return [row[key] for row in trained if key in row]


def exposures(folder: Path, run_id: str) -> list[tuple[object, ...]]:
    """Which row was in which step of a run that is done, and its tokens."""
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "runs" / run_id / "exposure.parquet")
    return sorted(
        zip(*(table[c].to_pylist() for c in ("step", "record_id", "tokens")), strict=True)
    )


def cut_back(folder: Path, run_id: str, step: int) -> None:
    """Leave a run at a checkpoint, with a mark in the rows up to there: `went_on` looks for it, as
    a run that began anew has the same losses.
    """
    run = folder / "runs" / run_id
    for checkpoint in (run / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        if "train/loss" in row and row["step"] <= step:
            row["marked"] = row["step"]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")


def went_on(folder: Path, run_id: str, step: int) -> bool:
    """True for a run that took up the checkpoint of `step` that `cut_back` left."""
    return metrics(folder, run_id, "marked") == list(range(1, step + 1))


@contextmanager
def cramped_files(most: int) -> Iterator[None]:
    """No file of this process may become larger, as on a disk that is full."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


class Gang:
    """`size` processes joined by gloo that train one config after another: imports are paid
    once.
    """

    def __init__(self, size: int, *, setup: Callable[[], None] | None = None) -> None:
        """`setup` runs first in every process; it is a function that a module has by name."""
        self._size, self._setup = size, setup
        self._start()

    def _start(self) -> None:
        import multiprocessing

        context = multiprocessing.get_context("spawn")
        port = free_port()
        self.pipes, self.processes = [], []
        for rank in range(self._size):
            ours, theirs = context.Pipe()
            task = (rank, self._size, port, theirs, self._setup)
            process = context.Process(target=_serve, args=task, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def fit(self, config: dict[str, object], *, timeout_seconds: float = 180.0) -> None:
        """Train on all ranks; raises rank 0's error, or AssertionError when a rank hangs or dies,
        with what the others raised: that may be what it waits for.
        """
        outcomes: list[Exception | None] = []
        try:
            for pipe in self.pipes:
                pipe.send(config)
            for pipe in self.pipes:
                if not pipe.poll(timeout_seconds):
                    raise TimeoutError(f"gave no answer in {timeout_seconds:.0f} s")
                outcomes.append(pipe.recv())
        except (OSError, EOFError) as error:  # late or dead: the next config needs ranks anew
            dead = [process.exitcode for process in self.processes]
            self.close()
            self._start()
            raise AssertionError(
                f"rank {len(outcomes)}: {error!r}; exit codes {dead}; before it {outcomes}"
            ) from None
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(10)
            process.kill()


def _serve(
    rank: int, size: int, port: int, pipe: Any, setup: Callable[[], None] | None
) -> None:  # fmt: skip
    """One rank of a Gang: a config in, None or the exception out."""
    import os

    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    import torch

    torch.set_num_threads(1)
    from tuneloom.config import build
    from tuneloom.errors import TuneloomError
    from tuneloom.train import distributed
    from tuneloom.train.config import TrainConfig
    from tuneloom.train.loop import fit

    distributed.start()
    if setup is not None:
        setup()
    while True:
        try:
            config = pipe.recv()
        except EOFError:
            return
        try:
            fit(build(TrainConfig, config))
            pipe.send(None)
        except TuneloomError as error:
            pipe.send(error)
        except Exception as error:
            import traceback

            pipe.send(AssertionError("".join(traceback.format_exception(error))))
