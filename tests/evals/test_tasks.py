"""What is asked of a record, which answers are labels, and when an answer is right."""

from typing import Any

import pytest

from tuneloom.data.records import parse
from tuneloom.errors import DataError
from tuneloom.evals import baseline
from tuneloom.evals.tasks import (
    Row,
    as_row,
    choose,
    exact,
    labels_of,
    named_label,
    said,
    still_thinking,
)

CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2"},
    ]
}


def rows_of(answers: list[str]) -> list[Row]:
    pairs = enumerate(answers)
    return [as_row(parse({"prompt": f"question {i}", "completion": a})) for i, a in pairs]


def test_the_last_assistant_turn_is_the_answer_and_all_before_it_the_question() -> None:
    row = as_row(parse(CHAT))
    assert (row.question, row.answer) == ("Be brief.\nOne?\n1\nTwo?", "2")


def test_a_chat_that_ends_with_the_user_and_a_text_have_no_answer() -> None:
    assert as_row(parse({"messages": CHAT["messages"][:-1]})).answer is None
    assert as_row(parse({"text": "just text"})).answer is None


def test_few_distinct_answers_are_labels_and_many_are_not() -> None:
    assert labels_of(rows_of(["perl", "python", "perl "] * 5)) == ("perl", "python")
    assert labels_of(rows_of([f"answer {i}" for i in range(30)])) == ()
    assert labels_of(rows_of(["always"] * 30)) == ()
    assert labels_of([]) == ()


def test_answers_of_several_lines_are_no_labels() -> None:
    assert labels_of(rows_of(["yes\nsir", "no"] * 5)) == ()


def test_a_thought_before_an_answer_is_no_part_of_it() -> None:
    thought = "<think>\nperl or web?\n</think>\n\nweb"
    assert said(thought).strip() == "web" and not still_thinking(thought)
    assert said("a </think> is a tag") == "a </think> is a tag"
    assert (
        still_thinking("<think>\nperl or w") and said("<think>\nperl or w") == "<think>\nperl or w"
    )
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": thought}]
    assert (as_row(parse({"messages": turns})).answer or "").strip() == "web"


def test_a_label_counts_in_any_case_and_punctuation_but_not_inside_a_sentence() -> None:
    labels = ("perl", "web", "c++")
    assert named_label(" Perl.\nbecause", labels) == "perl"
    assert named_label("**web**", labels) == "web"
    assert named_label("C++", labels) == "c++"
    assert named_label("not perl", labels) is None
    assert named_label("", labels) is None


@pytest.mark.parametrize("labels", [("1", "-1", "0"), ("AA", "AA-", "AA+"), ("C", "C++", "C#")])
def test_labels_that_differ_in_edge_punctuation_are_told_apart(labels: tuple[str, ...]) -> None:
    assert [named_label(f"{label}\n", labels) for label in labels] == list(labels)
    assert named_label(f"*{labels[0]}*", labels) is None  # any of them may be meant
    assert named_label("c", ("C", "C++")) is None and named_label("c", ("C", "D")) == "C"


def test_exact_match_forgives_white_space_at_the_ends_only() -> None:
    assert exact(" perl\n", "perl")
    assert not exact("Perl", "perl")
    assert not exact("per l", "perl")


def test_rows_are_drawn_by_the_seed_without_repeats() -> None:
    drawn = choose(100, limit=10, seed=1)
    assert drawn == choose(100, limit=10, seed=1) != choose(100, limit=10, seed=2)
    assert len(set(drawn)) == 10 and drawn == sorted(drawn)
    assert choose(5, limit=0, seed=0) == choose(5, limit=9, seed=0) == [0, 1, 2, 3, 4]


def test_the_baseline_learns_what_words_tell() -> None:
    pytest.importorskip("sklearn")
    learnt = [(f"module for perl number {i}", "perl") for i in range(20)]
    learnt += [(f"python library number {i}", "python") for i in range(20)]
    questions, answers = zip(*learnt, strict=True)
    asked = ["a new perl module", "another python library"]
    assert baseline.predict(questions, answers, asked=asked) == ["perl", "python"]


def test_the_baseline_learns_from_characters_where_no_word_comes_twice() -> None:
    pytest.importorskip("sklearn")
    assert baseline.predict(["1", "2"] * 2, ["a", "b"] * 2, asked=["2", "1"]) == ["b", "a"]
    many = [f"{'nm'[i % 2] * 3}{i}x{i * 7}" for i in range(1200)]  # 1,200 words, each once
    assert baseline.predict(many, ["n", "m"] * 600, asked=["nnn9", "mmm8"]) == ["n", "m"]


def test_texts_that_have_nothing_in_common_are_no_baseline() -> None:
    pytest.importorskip("sklearn")
    texts = [chr(0x4E00 + i) for i in range(1200)]
    with pytest.raises(DataError, match="1200 texts: no word or part of one stands in 3 of them"):
        baseline.predict(texts, ["a", "b"] * 600, asked=texts[:1])
