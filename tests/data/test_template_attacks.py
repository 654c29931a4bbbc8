"""A chat template is a program of its model's author: it gets out of nothing and ends in time."""

import contextlib
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tuneloom.data.records import parse
from tuneloom.data.render import Renderer
from tuneloom.data.template_probe import faults
from tuneloom.errors import DataError

Maker = Callable[..., PreTrainedTokenizerFast]
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
TURNS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINGS = ["''", "messages", "raise_exception", "strftime_now", "range", "lipsum", "cycler",
          "joiner", "namespace", "self", "dict", "messages[0].items"]  # fmt: skip
WAYS = [
    "THING.__class__.__mro__[1].__subclasses__()",
    "THING.__init__.__globals__['__builtins__'].open('CANARY', 'w').write('x')",
    "THING.__globals__.os.system('touch CANARY')",
    "(THING|attr('__class__')|attr('__init__')|attr('__globals__')).os.system('touch CANARY')",
    "'{0.__class__.__init__.__globals__}'.format(THING)",
]
CPU, MEMORY, OUTPUT = "2 s of CPU", "512 MB", "1,000,000 characters"
POWER = "{% set x = (10 ** 8) ** (10 ** 7) %}"
ENDLESS = {
    "ranges": ("{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
               CPU),
    "power": (POWER, CPU),
    "macro": ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
              "{{ f(40) }}", CPU),
    "string": ("{% set x = messages[0].content * 1073741824 %}{{ x[0] }}", MEMORY),
    "doubled": ("{% set n = namespace(s='xxxxxxxx') %}{% for a in range(40) %}"
                "{% set n.s = n.s ~ n.s %}{% endfor %}", MEMORY),
    "padded": ("{% set x = 'x'|center(3000000000) %}", MEMORY),
    "output": ("{% for a in range(99999) %}{{ 'x' * 99 }}{% endfor %}", OUTPUT),
    "with tools": ("{% if tools %}{{ 'x' * 9999999 }}{% endif %}", OUTPUT),
    "with a system turn": (
        "{% if messages[0].role == 'system' %}{{ 'x' * 9999999 }}{% endif %}", OUTPUT),
    "with a long message": (
        "{% if messages[0].content|length > 9000 %}{{ 'x' * 9999999 }}{% endif %}", OUTPUT),
    "at a word": ("{% if messages[-1].content == 'open sesame' %}" + POWER + "{% endif %}", CPU),
}  # fmt: skip


def loaded(make: Maker, template: str) -> Renderer:
    tokenizer = make()
    tokenizer.chat_template = template
    return Renderer(tokenizer)


def test_sixty_escapes_touch_nothing(make_tokenizer: Maker, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    ways = [way.replace("THING", thing) for thing in THINGS for way in WAYS]
    escapes = ["{{ " + way.replace("CANARY", str(canary)) + " }}" + TURNS for way in ways]
    assert len(set(escapes)) == 60
    faults(escapes, make_tokenizer().special_tokens_map)  # one process for all of them
    for escape in escapes:
        try:
            rendered = loaded(make_tokenizer, escape).template.conversation(CHAT)
        except DataError:
            rendered = ""
        assert "__builtins__" not in rendered and "<class" not in rendered, escape
    assert not canary.exists()


def test_a_template_that_would_not_end_is_refused_before_it_runs_in_this_process(
    make_tokenizer: Maker,
) -> None:
    faults([attack + TURNS for attack, _ in ENDLESS.values()], make_tokenizer().special_tokens_map)
    began = time.thread_time()
    for attack, said in ENDLESS.values():
        with pytest.raises(DataError, match=f"chat template (takes|makes) more than {said}"):
            loaded(make_tokenizer, attack + TURNS).render(parse(CHAT))
    assert time.thread_time() - began < 2.0


def test_a_template_that_only_refuses_chats_is_no_attack() -> None:
    assert faults(["{{ raise_exception('no system') }}", "{{ nothing.at.all }}"], {}) == [None] * 2


@pytest.mark.slow
def test_two_thousand_fuzzed_templates_end_in_time(make_tokenizer: Maker) -> None:
    templates = [fuzzed(random.Random(seed)) for seed in range(2_000)]
    variables = make_tokenizer().special_tokens_map
    verdicts = faults(templates, variables)
    assert 0 < sum(v is not None for v in verdicts) < 2_000
    for template, verdict in zip(templates, verdicts, strict=True):
        if verdict is None:
            began = time.thread_time()
            with contextlib.suppress(DataError):
                loaded(make_tokenizer, template).template.conversation(CHAT)
            assert time.thread_time() - began < 2.0, template


def fuzzed(choose: random.Random) -> str:
    """A template of random pieces, some hostile, half of the time with one character changed."""
    pieces = [
        TURNS, "{{ bos_token }}", "{% set n = namespace(s='x', i=0) %}", "{{ n.s }}",
        "{% for a in range(9999) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "{{ 'x' * 9999999 }}",
        "{% for m in messages %}", "{% endfor %}", "{% if tools %}", "{% endif %}", "{% else %}",
        "{{ messages|tojson }}", "{{ messages[0]['content']|upper }}", "{{ m.content|trim }}",
        "{{ ''.__class__ }}", "{{ range(99999)|list|length }}", "{%- generation %}",
        "{%- endgeneration -%}", "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{{ raise_exception('no') }}", "{# a comment #}", "{% break %}", "{{ 2 ** 64 }}", "\x00",
    ]  # fmt: skip
    text = "".join(choose.choices(pieces, k=choose.randint(1, 8)))
    if choose.random() < 0.5:
        at = choose.randrange(len(text))
        text = text[:at] + choose.choice("{}%#'\"()|.~*\\\n") + text[at + 1 :]
    return text
