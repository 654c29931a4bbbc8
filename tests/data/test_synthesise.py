"""Synthetic rows, against a small endpoint on this machine that answers as OpenAI's API does."""

import hashlib
import json
import re
import resource
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tuneloom.config import build
from tuneloom.data.ingest import ingest
from tuneloom.data.recipe import IngestConfig
from tuneloom.data.records import content_id
from tuneloom.data.synthesise import SynthesiseConfig, score_in, synthesise
from tuneloom.errors import ConfigError, DataError

SEEDS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(20)]


class Endpoint(BaseHTTPRequestHandler):
    asked: list[dict[str, Any]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Endpoint.asked.append(body)
        content = body["messages"][-1]["content"]  # a text, or a list of parts
        said = self.say(content if isinstance(content, str) else content[0]["text"])
        if said is None:
            self.send_error(400)
            return
        answer = json.dumps(
            {"choices": [{"message": {"role": "assistant", "content": said}}]}
        ).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def say(self, prompt: str) -> str | None:
        if prompt.startswith("Score"):
            return "Score: 3" if "question 1 " in prompt else "I give it 9 of 10."
        if prompt.startswith("Triage"):
            return '{"urgent": true}'
        if prompt.startswith("Refuse") or "question 6 in" in prompt:
            return None
        number = prompt.removeprefix("Rephrase: question ").split(" ")[0]
        return {"2": "", "3": "question 4"}.get(number, f"what of {number}?")

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def url() -> Iterator[str]:
    Endpoint.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def config(tmp_path: Path, url: str, **more: Any) -> SynthesiseConfig:
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SEEDS))
    mapping = {
        "name": "more", "seeds": str(tmp_path / "seeds.jsonl"), "prompt": "Rephrase: {prompt}",
        "record": {"prompt": "{answer}", "completion": "{completion}"},
        "out": str(tmp_path / "raw"),
        "teacher": {"url": url, "model": "teacher-1", "licence": "Apache-2.0"},
        "judge": "Score {prompt} as {answer}", "max_share": 0.3,
    }  # fmt: skip
    return build(SynthesiseConfig, mapping | more)


def test_each_row_names_its_teacher_prompt_and_seed_through_ingest(
    tmp_path: Path, url: str
) -> None:
    path, counts = synthesise(config(tmp_path, url))
    # 8 of 28 rows are 0.3; seed 1 is judged too low, seed 2 answers nothing.
    assert counts == {"over max_share": 12, "asked": 8, "empty": 1, "no record": 0,
                      "judged too low": 1, "a copy": 0, "written": 6}  # fmt: skip
    split = {"train": 1, "validation": 0, "test": 0}
    mapping = {
        "data": {"name": "d", "split": split},
        "source": str(path),
        "root": str(tmp_path / "ds"),
    }
    rows = pq.read_table(ingest(build(IngestConfig, mapping)) / "train-00000.parquet").to_pylist()
    assert len(rows) == 6
    seeds = {content_id(seed) for seed in SEEDS}
    for row in rows:
        origin = json.loads(row["meta"])["synthetic"]
        assert origin["teacher"] == "teacher-1" and origin["teacher_licence"] == "Apache-2.0"
        assert (
            origin["seed"] in seeds and origin["score"] == 9 and len(origin["prompt_digest"]) == 64
        )


def test_an_answer_that_copies_a_seed_is_left_out(tmp_path: Path, url: str) -> None:
    record = {"prompt": "{answer}", "completion": "answer 4"}
    _, counts = synthesise(config(tmp_path, url, record=record, judge=None))
    assert counts["a copy"] == 1
    answered = sum(n for what, n in counts.items() if what not in ("asked", "over max_share"))
    assert counts["asked"] == answered


@pytest.mark.parametrize(("share", "over"), [(0.3, 32), (0.5, 20), (0.6, 10), (0.8, 0)])
def test_answers_over_the_share_are_counted(
    tmp_path: Path, url: str, share: float, over: int
) -> None:
    _, counts = synthesise(config(tmp_path, url, judge=None, per_seed=2, max_share=share))
    assert (counts["over max_share"], counts["asked"]) == (over, 40 - over)


@pytest.mark.parametrize(("seeds", "enough"), [(1, 0.5), (2, 0.334)])
def test_a_share_of_less_than_a_row_is_refused_with_one_that_is_enough(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, seeds: int, enough: float
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SEEDS", SEEDS[:seeds])
    why = rf"max_share: 0\.3 leaves no room .* \({seeds}\); raise it to {enough} "
    with pytest.raises(ConfigError, match=why):
        synthesise(config(tmp_path, url))
    assert not list((tmp_path / "raw").glob("*.jsonl*"))
    given = config(tmp_path, url, judge=None, max_share=enough)
    assert synthesise(given)[1]["written"] == 1


def test_what_was_answered_is_not_asked_again(tmp_path: Path, url: str) -> None:
    first, _ = synthesise(config(tmp_path, url))
    text, asked = first.read_text(), len(Endpoint.asked)
    second, _ = synthesise(config(tmp_path, url))
    assert second.read_text() == text
    assert len(Endpoint.asked) == asked == 8 + 7


def test_an_answer_from_disk_is_the_one_that_was_given(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Endpoint, "say", lambda *_: "one\r\ntwo \udc80")
    path, counts = synthesise(config(tmp_path, url, judge=None))
    text, asked = path.read_bytes(), len(Endpoint.asked)
    assert json.loads(text.splitlines()[0])["prompt"] == "one\r\ntwo ?" and counts["written"] == 8
    assert synthesise(config(tmp_path, url, judge=None))[0].read_bytes() == text
    assert len(Endpoint.asked) == asked


def test_an_answer_that_could_not_be_kept_whole_is_asked_again(tmp_path: Path, url: str) -> None:
    wanted, (_, most) = config(tmp_path, url), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, most))  # the disk is full after 5 bytes
    try:
        with pytest.raises(OSError, match="too large"):
            synthesise(wanted)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    path, counts = synthesise(wanted)
    prompts = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    assert counts["written"] == 6 and prompts[0] == "what of 0?"


def test_equal_questions_to_the_judge_at_once_are_one_answer(tmp_path: Path, url: str) -> None:
    _, counts = synthesise(config(tmp_path, url, judge="Score all", parallel=8, max_share=0.5))
    assert counts["judged too low"] == 0 and counts["written"] == 19


@pytest.mark.parametrize("body", ['{"choices": null}', '{"choices": [', "[]", '{"choices": ["a"]}'])
def test_an_endpoint_that_answers_something_else_or_half_is_named(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    def answer(self: Endpoint) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(100 if body.endswith("[") else len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    monkeypatch.setattr(Endpoint, "do_POST", answer)
    with pytest.raises(DataError, match=r"teacher\.url: no answer from http://127"):
        synthesise(config(tmp_path, url))


LABELLED = {"input": "{prompt}", "label": "{answer}", "labels": ["good", "bad"]}
CHOSEN = {"prompt": "{prompt}",
          "completion": {"choose": "{answer}", "among": {"good": "yes", "bad": "no"}}}  # fmt: skip


@pytest.mark.parametrize("record", [LABELLED, CHOSEN])
def test_an_answer_that_makes_no_record_is_counted_and_the_others_are_written(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, record: dict[str, Any]
) -> None:
    monkeypatch.setattr(
        Endpoint, "say", lambda _, prompt: "Positive." if "question 3" in prompt else "good"
    )
    path, counts = synthesise(config(tmp_path, url, record=record, judge=None))
    assert (counts["no record"], counts["written"], counts["asked"]) == (1, 7, 8)
    assert len(path.read_text().splitlines()) == 7


def test_a_record_that_no_answer_makes_is_named(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Endpoint, "say", lambda *_: "Positive.")
    with pytest.raises(DataError, match=r"record: no answer of the teacher .*label: is none of"):
        synthesise(config(tmp_path, url, record=LABELLED, judge=None))
    assert not list((tmp_path / "raw").glob("*.jsonl*"))


def test_a_dead_endpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no answer from http://127\.0\.0\.1:9/v1"):
        synthesise(config(tmp_path, "http://127.0.0.1:9/v1"))


DESIGN = """
columns:
- {name: tone, column_type: sampler, sampler_type: category, params: {values: [formal]}}
- {name: text, column_type: llm-text, prompt: "Rephrase: {{ prompt }} in a {{ tone }} tone"}
- name: judged
  column_type: llm-structured
  prompt: "Triage: {{ text }}"
  output_format: {type: object, properties: {urgent: {type: boolean}}, required: [urgent]}
"""
DESIGNED = {"prompt": "{text}", "completion": "{tone} {completion} {judged.urgent}"}


def designed(tmp_path: Path, url: str, design: str = DESIGN, **more: Any) -> SynthesiseConfig:
    (tmp_path / "design.yaml").write_text(design)
    given = {"prompt": None, "design": str(tmp_path / "design.yaml"), "record": DESIGNED,
             "judge": "Score {prompt} as {text}"}  # fmt: skip
    return config(tmp_path, url, **given | more)


def test_a_design_of_data_designer_fills_rows_and_speaks_to_the_teacher_only(
    tmp_path: Path, url: str
) -> None:
    reached: set[str] = set()

    def hear(event: str, given: tuple[Any, ...]) -> None:
        if event == "socket.connect" and isinstance(given[1], tuple):
            reached.add(f"http://{given[1][0]}:{given[1][1]}/v1")
        if event == "socket.getaddrinfo":
            reached.add(f"http://{given[0]}:{given[1]}/v1")

    sys.addaudithook(hear)
    path, counts = synthesise(designed(tmp_path, url))
    assert reached == {url}
    assert counts == {"over max_share": 12, "asked": 8, "empty": 2, "no record": 0,
                      "judged too low": 1, "a copy": 0, "written": 5}  # fmt: skip
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0]["prompt"] == "what of 0?" and rows[0]["completion"] == "formal answer 0 true"
    for row in rows:
        origin = row["meta"]["synthetic"]
        assert origin["prompt_digest"] == hashlib.sha256(DESIGN.encode()).hexdigest()
        assert (origin["teacher"], origin["teacher_licence"]) == ("teacher-1", "Apache-2.0")
        seed = next(s for s in SEEDS if content_id(s) == origin["seed"])
        assert row["completion"] == f"formal {seed['completion']} true"


def test_a_design_that_was_answered_is_not_asked_again(tmp_path: Path, url: str) -> None:
    first, _ = synthesise(designed(tmp_path, url))
    text, asked = first.read_text(), len(Endpoint.asked)
    second, _ = synthesise(designed(tmp_path, url))
    assert second.read_text() == text and len(Endpoint.asked) == asked


@pytest.mark.parametrize(
    ("design", "why"),
    [
        ("columns: []\nmodel_configs: []", "has 'model_configs'; only columns and constraints"),
        ("seeds: x", "has no list `columns`"),
        ("columns: [{name: a, column_type: custom}]", "column of type 'custom'; use one of"),
        ("columns: [{name: a, column_type: validation}]", "column of type 'validation'"),
        ("columns: [{name: a, column_type: llm-text, prompt: p, model_alias: big}]", "model_alias"),
        ("columns: [{name: a, column_type: llm-text, prompt: p, tool_alias: t}]", "no tools"),
        ("columns: [{name: a, column_type: llm-text}]", "prompt"),
        (
            "columns: [{name: a, column_type: llm-text, prompt: '{{ nothing }}'}]",
            "the reasons above",
        ),
    ],
)
def test_a_design_that_could_do_more_is_refused(
    tmp_path: Path, url: str, design: str, why: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        synthesise(designed(tmp_path, url, design))
    assert not Endpoint.asked and not list((tmp_path / "raw").glob("*.jsonl*"))


def test_a_teacher_that_refuses_a_design_is_named_and_leaves_no_file(
    tmp_path: Path, url: str
) -> None:
    with pytest.raises(DataError, match="Data Designer made no rows"):
        synthesise(designed(tmp_path, url, DESIGN.replace("Rephrase", "Refuse")))
    assert not list((tmp_path / "raw").glob("*.jsonl*"))


@pytest.mark.parametrize("key", ["prompt", "judge", "record"])
def test_a_field_that_no_seed_has_is_named(tmp_path: Path, url: str, key: str) -> None:
    template = "of {nothing}"
    given = {"prompt": template, "completion": "x"} if key == "record" else template
    with pytest.raises(ConfigError, match=rf"{key}: no field 'nothing' among prompt, completion"):
        synthesise(config(tmp_path, url, **{key: given}))


def test_prompt_and_design_exclude_each_other(tmp_path: Path, url: str) -> None:
    for given in ({"design": "design.yaml"}, {"prompt": None}):
        with pytest.raises(ConfigError, match="set either prompt or design"):
            config(tmp_path, url, **given)


@pytest.mark.parametrize(
    ("text", "score"), [("8/10", 8), ("Score: 10", 10), ("none", None), ("11", None)]
)
def test_a_score_is_the_first_number_up_to_ten(text: str, score: int | None) -> None:
    assert score_in(text) == score
