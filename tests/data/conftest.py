"""Tokenizers of every common construction and chat templates of the shapes that models ship."""

# ruff: noqa: E501 (a newline in a chat template is a newline in the prompt)

from collections.abc import Callable

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CHATML = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

TAGGED = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}

{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

TAGGED_WITHOUT_END = TAGGED.replace(
    "<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"
)

LLAMA3 = """{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

LLAMA32_DATE = """{{ bos_token }}<|start_header_id|>system<|end_header_id|>

Today Date: {{ strftime_now("%d %b %Y") }}<|eot_id|>{% for message in messages %}{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

MISTRAL = """{{ bos_token }}{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"""

MISTRAL_SYSTEM_LAST = """{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{% for message in rest %}{% if message.role == 'user' %}{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + message.content + '[/INST]' }}{% else %}{{ '[INST] ' + message.content + '[/INST]' }}{% endif %}{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"""

GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% set role = 'model' if message.role == 'assistant' else message.role %}{{ '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

QWEN3 = """{%- set ns = namespace(last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.last_query_index == messages|length - 1 and message.role == "user" %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}
            {{- '<|im_start|>assistant\n<think>\n' + reasoning + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""

PHI3 = """{% for message in messages %}{{ '<|' + message.role + '|>' + '\n' + message.content + '<|end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' + '\n' }}{% endif %}"""

PHI3_CLOSING = PHI3.replace("{% endif %}", "{% else %}{{ '</s>' }}{% endif %}")
ENDLESS = """{% for message in messages %}<|{{ message.role }}|>
{{ message.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
PARTS = """{% for message in messages %}<|im_start|>{{ message.role }}
{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
OPENS_THINKING = CHATML.replace(
    "{% if add_generation_prompt %}<|im_start|>assistant\n",
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n",
)

TOOLS = """{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content %}{{ message.content }}{% endif %}{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "tagged": (TAGGED, "<|im_end|>"),
    "tagged_without_end": (TAGGED_WITHOUT_END, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "llama3_date": (LLAMA32_DATE, "<|eot_id|>"),
    "mistral": (MISTRAL, "</s>"),
    "mistral_system_last": (MISTRAL_SYSTEM_LAST, "</s>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "qwen3": (QWEN3, "<|im_end|>"),
    "phi3": (PHI3, "<|end|>"),
    "phi3_closing": (PHI3_CLOSING, "<|end|>"),
    "endless": (ENDLESS, "</s>"),
    "parts": (PARTS, "<|im_end|>"),
    "opens_thinking": (OPENS_THINKING, "<|im_end|>"),
    "opens_thinking_tagged": (
        OPENS_THINKING.replace(
            "{{ message.content }}<|im_end|>", TAGGED.split("\n", 1)[1].split("\n\n{% endfor")[0]
        ),
        "<|im_end|>",
    ),
    "tools": (TOOLS, "<|im_end|>"),
}
SPECIAL = [
    "<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip
TEXT = [
    "hello world, this is some text for a tokenizer: user, assistant and system, question, answer.",
    "The quick brown fox jumps over the lazy dog; 0123456789 <think> </think> [INST] [/INST]",
] * 20

Maker = Callable[..., PreTrainedTokenizerFast]


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, pre_tokenizers.ByteLevel.alphabet())
    return tokenizer


def _metaspace(scheme: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    _train(tokenizer, sorted(set("".join(TEXT)) | set("<|>_[]/\n▁")))
    return tokenizer


def _prepend() -> Tokenizer:
    """Llama 2's: the normaliser puts a space before every segment between special tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _train(tokenizer, sorted(set("".join(TEXT)) | set("<|>_[]/\n▁")))
    return tokenizer


def _unigram() -> Tokenizer:
    """T5's and Gemma's kind: control tokens are pieces of the model's own vocabulary."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = sorted(set("".join(TEXT)) | set("<|>_[]/\n▁"))
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, unk_token="<unk>",
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def _word_piece() -> Tokenizer:
    """BERT's kind, whose normaliser strips characters without a name."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def _train(tokenizer: Tokenizer, alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)


BUILDERS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": _byte_level,
    "metaspace_first": lambda: _metaspace("first"),
    "metaspace_always": lambda: _metaspace("always"),
    "prepend": _prepend,
    "unigram": _unigram,
    "word_piece": _word_piece,
}
_built: dict[str, str] = {}


@pytest.fixture(scope="session")
def make_tokenizer() -> Maker:
    """make_tokenizer("chatml", "byte_level", bos=True): a real small BPE with that template."""

    def make(
        template: str = "chatml", kind: str = "byte_level", *, bos: bool = False
    ) -> PreTrainedTokenizerFast:
        if kind not in _built:
            _built[kind] = BUILDERS[kind]().to_str()
        core = Tokenizer.from_str(_built[kind])
        source, end = TEMPLATES[template]
        if template.startswith("phi3"):
            names = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
            core.add_special_tokens([AddedToken(n, special=True, rstrip=True) for n in names])
        if template == "tools":
            core.add_tokens([AddedToken(n, special=False) for n in ("<tool_call>", "</tool_call>")])
        if bos:
            core.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=core,
            bos_token="<s>",
            eos_token=end,
            pad_token="<|endoftext|>",
            unk_token="<unk>",
            chat_template=source,
            name_or_path=f"{template}-{kind}",
        )

    return make
