"""For tests only: a tiny random Llama with its tokenizer, and free ports."""

import json
import socket
from pathlib import Path

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
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
    folder: Path, *, hidden: int = 64, layers: int = 2, seed: int = 0, dtype: str = "float32"
) -> Path:
    """A random Llama of about 100,000 parameters with tokenizer and chat template, saved in `folder`."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer(folder, [f"question {i} answer {i * i} the quick brown fox" for i in range(200)])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, tie_word_embeddings=True, dtype=dtype,
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
