"""Synthetic rows, against a small endpoint on this machine that answers as OpenAI's API does."""

import json
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
from tuneloom.errors import DataError

SEEDS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(20)]


class Endpoint(BaseHTTPRequestHandler):
    asked: list[dict[str, Any]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Endpoint.asked.append(body)
        said = self.say(body["messages"][0]["content"])
        answer = json.dumps(
            {"choices": [{"message": {"role": "assistant", "content": said}}]}
        ).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def say(self, prompt: str) -> str:
        if prompt.startswith("Score"):
            return "Score: 3" if "question 1 " in prompt else "I give it 9 of 10."
        number = prompt.removeprefix("Rephrase: question ")
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
    assert counts == {"asked": 8, "empty": 1, "judged too low": 1, "a copy": 0, "written": 6}
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
    assert counts["asked"] == sum(n for what, n in counts.items() if what != "asked")


def test_what_was_answered_is_not_asked_again(tmp_path: Path, url: str) -> None:
    first, _ = synthesise(config(tmp_path, url))
    text, asked = first.read_text(), len(Endpoint.asked)
    second, _ = synthesise(config(tmp_path, url))
    assert second.read_text() == text
    assert len(Endpoint.asked) == asked == 8 + 7


def test_a_dead_endpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no answer from http://127\.0\.0\.1:9/v1"):
        synthesise(config(tmp_path, "http://127.0.0.1:9/v1"))


@pytest.mark.parametrize(
    ("text", "score"), [("8/10", 8), ("Score: 10", 10), ("none", None), ("11", None)]
)
def test_a_score_is_the_first_number_up_to_ten(text: str, score: int | None) -> None:
    assert score_in(text) == score
