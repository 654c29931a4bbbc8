"""Rendering: the mask is right for every template shape, and text never becomes a control token."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuneloom.data.records import Record, parse
from tuneloom.data.render import Example, Renderer
from tuneloom.data.tokenizer import load_tokenizer
from tuneloom.errors import DataError

Maker = Callable[..., Any]
KINDS = ["byte_level", "metaspace_first", "metaspace_always", "prepend", "unigram", "word_piece"]
SHAPES = [
    "chatml", "tagged", "tagged_without_end", "llama3", "llama3_date", "mistral", "gemma", "phi3",
]  # fmt: skip


def chat(*turns: tuple[str, str], **flags: bool) -> Record:
    """chat(("user", "..."), ("assistant", "..."), m1=False): m1 is `train` of messages[1]."""
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in turns]
    for name, value in flags.items():
        messages[int(name[1:])]["train"] = value
    return parse({"messages": messages})


TWO_TURNS = (
    ("user", "hello world"),
    ("assistant", "some text"),
    ("user", "question?"),
    ("assistant", "the answer."),
)


def spans(tokenizer: Any, example: Example) -> list[str]:
    """The decoded runs of trained tokens."""
    edges = np.flatnonzero(np.diff(example.target.astype(int), prepend=0, append=0))
    return [
        tokenizer.decode(example.ids[start:stop]).strip()
        for start, stop in zip(edges[::2], edges[1::2], strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_is_on_answers_with_their_end_of_turn_and_on_nothing_else(
    make_tokenizer: Maker, shape: str, kind: str
) -> None:
    tokenizer = make_tokenizer(shape, kind)
    renderer = Renderer(tokenizer)
    found = spans(tokenizer, renderer.render(chat(*TWO_TURNS)))
    end = tokenizer.eos_token
    assert [text.removesuffix(end).strip() for text in found] == ["some text", "the answer."]
    assert all(text.endswith(end) for text in found)
    assert renderer.template.end_of_turn == end


@pytest.mark.parametrize("shape", SHAPES)
def test_ids_are_those_of_transformers(make_tokenizer: Maker, shape: str) -> None:
    tokenizer = make_tokenizer(shape)
    messages = [{"role": role, "content": text} for role, text in TWO_TURNS]
    if shape == "llama3_date":
        tokenizer.chat_template = tokenizer.chat_template.replace(
            'strftime_now("%d %b %Y")', "'26 Jul 2024'"
        )
    expected = tokenizer.apply_chat_template(messages)["input_ids"]
    if shape == "mistral":  # the space after [/INST] starts the answer, so no merge crosses it
        assert tokenizer.decode(Renderer(tokenizer).render(chat(*TWO_TURNS)).ids) == (
            tokenizer.decode(expected)
        )
    else:
        assert Renderer(tokenizer).render(chat(*TWO_TURNS)).ids.tolist() == expected


@pytest.mark.parametrize("shape", ["tagged"])
def test_the_mask_is_that_of_transformers_for_a_tagged_template(
    make_tokenizer: Maker, shape: str
) -> None:
    tokenizer = make_tokenizer(shape)
    messages = [{"role": role, "content": text} for role, text in TWO_TURNS]
    theirs = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
    ours = Renderer(tokenizer).render(chat(*TWO_TURNS))
    assert ours.target.tolist() == [bool(bit) for bit in theirs["assistant_masks"]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_prompt_that_is_served_is_a_prefix_of_what_was_trained(
    make_tokenizer: Maker, shape: str, kind: str
) -> None:
    renderer = Renderer(make_tokenizer(shape, kind, bos=True))
    for record in (
        chat(*TWO_TURNS),
        chat(*TWO_TURNS, m1=False),
        chat(("user", "a  "), ("assistant", " spaced out \n")),
        parse({"prompt": "hello wor", "completion": "ld and more"}),
        parse({"prompt": "hello ", "completion": " world"}),
    ):
        example = renderer.render(record)
        prompt = renderer.prompt_ids(record)
        assert example.ids[: len(prompt)].tolist() == prompt
        assert len(prompt) < len(example.ids)
        assert not example.target[len(prompt) - 1] and example.target[len(prompt)]


def test_a_message_with_train_false_carries_no_loss(make_tokenizer: Maker) -> None:
    for shape in ("chatml", "tagged"):
        tokenizer = make_tokenizer(shape)
        found = spans(tokenizer, Renderer(tokenizer).render(chat(*TWO_TURNS, m1=False)))
        assert found == ["the answer.<|im_end|>"]


def test_a_template_that_strips_thinking_trains_the_last_answer_only(make_tokenizer: Maker) -> None:
    tokenizer = make_tokenizer("qwen3")
    renderer = Renderer(tokenizer)
    single = renderer.render(chat(("user", "hello"), ("assistant", "<think>\nhm\n</think>\n\nyes")))
    assert spans(tokenizer, single) == ["<think>\nhm\n</think>\n\nyes<|im_end|>"]
    record = chat(*TWO_TURNS, m1=False)
    found = renderer.render(record)
    assert spans(tokenizer, found) == ["<think>\n\n</think>\n\nthe answer.<|im_end|>"]
    prompt = renderer.prompt_ids(record)
    assert found.ids[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize(
    ("shape", "turns"),
    [("qwen3", TWO_TURNS), ("mistral_system_last", (("system", "be kind"), *TWO_TURNS))],
)
def test_a_template_that_rewrites_history_is_refused_by_name(
    make_tokenizer: Maker, shape: str, turns: tuple[tuple[str, str], ...]
) -> None:
    with pytest.raises(DataError, match=rf"{shape}-byte_level \(template .*train: false"):
        Renderer(make_tokenizer(shape)).render(chat(*turns))


def test_a_template_that_refuses_a_chat_is_quoted(make_tokenizer: Maker) -> None:
    with pytest.raises(DataError, match=r"gemma.*System role not supported"):
        Renderer(make_tokenizer("gemma")).render(chat(("system", "x"), *TWO_TURNS))
    with pytest.raises(DataError, match=r"mistral.*roles must alternate"):
        Renderer(make_tokenizer("mistral")).render(chat(("user", "a"), *TWO_TURNS))


def test_a_tag_that_misses_the_answer_is_refused(make_tokenizer: Maker) -> None:
    tokenizer = make_tokenizer("tagged")
    tokenizer.chat_template = (
        "{% for m in messages %}{% generation %}x{% endgeneration %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(DataError, match="2 spans for 1 assistant"):
        Renderer(tokenizer).render(chat(("user", "hello"), ("assistant", "answer")))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}"
        "{% generation %}x{% endgeneration %}{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match="does not hold its content"):
        Renderer(tokenizer).render(chat(("user", "hello"), ("assistant", "answer")))


def test_a_closing_token_of_the_whole_chat_is_no_obstacle(make_tokenizer: Maker) -> None:
    tokenizer = make_tokenizer("phi3_closing")
    found = spans(tokenizer, Renderer(tokenizer).render(chat(*TWO_TURNS)))
    assert found == ["some text<|end|>", "the answer.<|end|></s>"]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("endless", "writes nothing after an answer, so the model would never learn to stop"),
        ("parts", r"does not write the content of message 1 \('some text'\)"),
        ("opens_thinking", r"generation starts with .*<think>\\n', but the rendered answer"),
    ],
)
def test_a_template_that_would_teach_something_else_is_refused(
    make_tokenizer: Maker, shape: str, expected: str
) -> None:
    with pytest.raises(DataError, match=rf"{shape}-byte_level \(template .*{expected}"):
        Renderer(make_tokenizer(shape)).render(chat(*TWO_TURNS))


def test_a_tagged_template_that_serves_something_else_says_so(make_tokenizer: Maker) -> None:
    renderer = Renderer(make_tokenizer("opens_thinking_tagged"))
    assert (
        spans(renderer.tokenizer, renderer.render(chat(*TWO_TURNS)))[1] == "the answer.<|im_end|>"
    )
    assert not renderer.template.serves_what_it_trains
    assert Renderer(make_tokenizer("tagged")).template.serves_what_it_trains


def test_a_block_that_starts_before_the_answer_still_cuts_where_generation_starts(
    make_tokenizer: Maker,
) -> None:
    tokenizer = make_tokenizer("tagged")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}"
        "{% generation %}\n{{ m.content }}<|im_end|>{% endgeneration %}{% else %}\n{{ m.content }}"
        "<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    renderer = Renderer(tokenizer)
    record = chat(("user", "a"), ("assistant", "\n\nb"), ("user", "c"), ("assistant", "\nd"))
    example, prompt = renderer.render(record), renderer.prompt_ids(record)
    assert example.ids[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, "qwen3"])
def test_every_special_token_in_a_message_stays_text(
    make_tokenizer: Maker, shape: str, kind: str
) -> None:
    tokenizer = make_tokenizer(shape, kind)
    renderer = Renderer(tokenizer)
    control = set(tokenizer.all_special_ids) | {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    hostile = " ".join(token.content for token in tokenizer.added_tokens_decoder.values())

    def controls(record: Record) -> list[int]:
        unknown = tokenizer.unk_token_id
        ids = renderer.render(record).ids.tolist()
        return [i for i in ids if i in control and i != unknown]

    plain = controls(chat(("user", "hello"), ("assistant", "answer")))
    attacked = controls(chat(("user", f"hello {hostile} x"), ("assistant", f"answer {hostile} x")))
    assert attacked == plain
    assert len(plain) >= 2


@pytest.fixture(scope="module")
def chatml(make_tokenizer: Maker) -> Renderer:
    return Renderer(make_tokenizer("chatml"))


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_text_makes_a_control_token(chatml: Renderer, data: st.DataObject) -> None:
    renderer, tokenizer = chatml, chatml.tokenizer
    special = [token.content for token in tokenizer.added_tokens_decoder.values()]
    pieces = st.lists(st.sampled_from([*special, "<|", "im_end", "|>", " ", "\n", "é", "text"]))
    user, answer = ("a" + "".join(data.draw(pieces)) + "z" for _ in range(2))
    example = renderer.render(chat(("user", user), ("assistant", answer)))
    control = [i for i in example.ids.tolist() if tokenizer.convert_ids_to_tokens(i) in special]
    start, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>"))
    assert control == [start, end, start, end]
    text = tokenizer.decode(example.ids)
    assert (
        text == f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    )
    completion = renderer.render(parse({"prompt": user, "completion": answer})).ids.tolist()
    assert [i for i in completion if tokenizer.convert_ids_to_tokens(i) in special] == [end]


def test_tool_calls_are_trained_and_results_are_not(make_tokenizer: Maker) -> None:
    tokenizer = make_tokenizer("tools")
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    record = parse(
        {
            "tools": [{"type": "function", "function": {"name": "add <|im_end|>"}}],
            "messages": [
                {"role": "user", "content": "1 + 1"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "2 <|im_end|>"},
                {"role": "assistant", "content": "It is 2."},
            ],
        }
    )
    example = Renderer(tokenizer).render(record)
    assert spans(tokenizer, example) == [
        '<tool_call>add {"a": 1}</tool_call><|im_end|>',
        "It is 2.<|im_end|>",
    ]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert example.ids.tolist().count(end) == 5


def test_a_field_that_the_template_never_reads_is_refused_not_lost(make_tokenizer: Maker) -> None:
    renderer = Renderer(make_tokenizer("chatml"))
    user = {"role": "user", "content": "q"}
    call = {"function": {"name": "f", "arguments": {}}}
    for row, field in [
        ({"messages": [user, {"role": "assistant", "content": "a"}], "tools": [{}]}, "tools"),
        ({"messages": [user, {"role": "assistant", "tool_calls": [call]}]}, "tool_calls"),
        (
            {"messages": [user, {"role": "assistant", "content": "a", "reasoning_content": "r"}]},
            "reasoning_content",
        ),
    ]:
        with pytest.raises(DataError, match=f"chatml.* has no place for '{field}'"):
            renderer.render(parse(row))


@pytest.mark.parametrize("role", ["developer", "tool"])
def test_a_turn_that_the_template_passes_over_is_refused_by_its_role(
    make_tokenizer: Maker, role: str
) -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}<|im_start|>"
        "{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    record = chat(("user", "question"), (role, "some text 7"), ("assistant", "the answer."))
    with pytest.raises(DataError, match=f"does not write message 1, of role '{role}' \\('7'\\)"):
        Renderer(tokenizer).render(record)


def test_bos_comes_exactly_once_whoever_adds_it(make_tokenizer: Maker) -> None:
    for shape in ("llama3", "chatml"):
        tokenizer = make_tokenizer(shape, bos=True)
        bos = tokenizer.bos_token_id
        renderer = Renderer(tokenizer)
        rendered = renderer.render(chat(("user", "<s> hello"), ("assistant", "answer"))).ids
        assert rendered.tolist().count(bos) == (shape == "llama3")
        plain = renderer.render(parse({"prompt": "<s>a", "completion": "b"}))
        assert plain.ids[0] == bos and plain.ids.tolist().count(bos) == 1
        text = Renderer(tokenizer, "pretrain").render(parse({"text": "hello"}))
        assert text.ids[0] == bos and text.target.tolist() == [False] + [True] * (len(text.ids) - 1)
        assert text.ids[-1] == tokenizer.eos_token_id


def test_completion_and_its_end_are_trained(make_tokenizer: Maker) -> None:
    tokenizer = make_tokenizer("chatml")
    example = Renderer(tokenizer).render(parse({"prompt": "hello ", "completion": "world"}))
    assert spans(tokenizer, example) == ["world<|im_end|>"]


def test_masks_of_all_zeros_and_all_ones_are_refused(make_tokenizer: Maker) -> None:
    renderer = Renderer(make_tokenizer("chatml", bos=True))
    with pytest.raises(DataError, match="no token to train on"):
        renderer.render(chat(*TWO_TURNS, m1=False, m3=False))
    with pytest.raises(DataError, match="no token to train on"):
        renderer.render(chat(("user", "hello")))
    with pytest.raises(DataError, match="every token would be trained on"):
        renderer.render(parse({"prompt": "", "completion": "answer"}))


def test_a_row_of_another_objective_is_refused(make_tokenizer: Maker) -> None:
    with pytest.raises(DataError, match="objective=pretrain"):
        Renderer(make_tokenizer()).render(parse({"text": "hello"}))
    with pytest.raises(DataError, match="objective=sft"):
        Renderer(make_tokenizer(), "pretrain").render(chat(*TWO_TURNS))


def test_over_length_rows_are_dropped_cut_or_refused_and_counted(make_tokenizer: Maker) -> None:
    tokenizer = make_tokenizer()
    record = chat(("user", "hello"), ("assistant", "answer " * 50))
    whole = Renderer(tokenizer).render(record)
    dropped = Renderer(tokenizer, max_length=20).render(record)
    assert (len(dropped.ids), dropped.dropped) == (0, "over_length")
    assert (dropped.tokens, dropped.targets) == (len(whole.ids), int(whole.target.sum()))
    cut = Renderer(tokenizer, max_length=20, over_length="truncate").render(record)
    assert cut.ids.tolist() == whole.ids[:20].tolist() and cut.tokens == len(whole.ids)
    none_left = Renderer(tokenizer, max_length=5, over_length="truncate").render(record)
    assert (len(none_left.ids), none_left.dropped) == (0, "no_answer_left")
    with pytest.raises(DataError, match=r"batch.max_length is 20 and batch.over_length is error"):
        Renderer(tokenizer, max_length=20, over_length="error").render(record)


def test_the_clock_changes_no_token(make_tokenizer: Maker) -> None:
    tokenizer = make_tokenizer("llama3_date")
    text = tokenizer.decode(Renderer(tokenizer).render(chat(*TWO_TURNS)).ids)
    assert "Today Date: 26 Jul 2024" in text


def test_the_digest_names_tokenizer_template_and_options(make_tokenizer: Maker) -> None:
    tokenizer = make_tokenizer("chatml")
    digests = {
        Renderer(tokenizer).digest,
        Renderer(tokenizer, "pretrain").digest,
        Renderer(tokenizer, max_length=8).digest,
        Renderer(tokenizer, max_length=8, over_length="truncate").digest,
        Renderer(make_tokenizer("tagged")).digest,
        Renderer(make_tokenizer("chatml", "prepend")).digest,
        Renderer(make_tokenizer("chatml", bos=True)).digest,
    }
    assert len(digests) == 7
    again = make_tokenizer("chatml")
    again(["a", "bb"], padding=True)
    assert Renderer(again).digest == Renderer(tokenizer).digest


def test_the_answer_is_what_the_prompt_asks_for(make_tokenizer: Maker) -> None:
    renderer = Renderer(make_tokenizer())
    assert renderer.answer(chat(*TWO_TURNS)) == "the answer."
    assert renderer.answer(parse({"prompt": "a", "completion": " b"})) == " b"
    with pytest.raises(DataError, match="does not end with an answer"):
        renderer.answer(chat(("user", "hello")))
    open_chat = renderer.prompt_ids(chat(("user", "hello")))
    assert open_chat == renderer.prompt_ids(chat(("user", "hello"), ("assistant", "answer")))


def test_tokenizers_without_template_or_end_are_refused_where_they_need_one(
    make_tokenizer: Maker,
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        Renderer(tokenizer).render(chat(*TWO_TURNS))
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        Renderer(tokenizer).render(parse({"prompt": "a", "completion": "b"}))


def test_a_saved_tokenizer_loads_as_auto_tokenizer_would(
    make_tokenizer: Maker, tmp_path: Any
) -> None:
    from transformers import AutoTokenizer

    make_tokenizer("llama3", "metaspace_first", bos=True).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    ours, theirs = load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert Renderer(ours).digest == Renderer(theirs).digest


def test_a_hub_id_without_network_is_one_sentence_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    with pytest.raises(DataError, match=r"nobody/nothing: .* the hub cannot be reached"):
        load_tokenizer("nobody/nothing")
    with pytest.raises(DataError, match="/no/such: no such folder"):
        load_tokenizer("/no/such")


def test_a_folder_without_tokenizer_is_one_sentence(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"no tokenizer files; copy tokenizer\.json"):
        load_tokenizer(str(tmp_path))
