"""Golden rows go to Argilla's own SDK and come back with what its users answered."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tuneloom.config import build
from tuneloom.data.review import GoldenConfig, main
from tuneloom.errors import DataError

BOB, CARLA = "3f0f3c2e-0000-4000-8000-000000000001", "3f0f3c2e-0000-4000-8000-000000000002"


class Me(BaseHTTPRequestHandler):
    """The one answer that the SDK asks a server for before it makes anything."""

    def do_GET(self) -> None:
        now = "2026-01-01T00:00:00"
        said = {"id": BOB, "username": "bob", "role": "owner", "first_name": "Bob",
                "last_name": None, "inserted_at": now, "updated_at": now}  # fmt: skip
        body = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *ignored: object) -> None: ...


@pytest.fixture
def rg() -> Iterator[Any]:
    import argilla

    server = HTTPServer(("127.0.0.1", 0), Me)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    argilla.Argilla(api_url=f"http://127.0.0.1:{server.server_port}", api_key="any")
    yield argilla
    server.shutdown()


def act(tmp_path: Path, action: str, **config: Any) -> None:
    where = {"action": action, "name": "g", "root": str(tmp_path), **config}
    assert main(build(GoldenConfig, where)) == 0


def test_rows_go_to_argilla_and_its_answers_make_them_golden(
    tmp_path: Path, rg: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    act(tmp_path, "propose", source=str(tmp_path / "rows.jsonl"), by="anna")
    act(tmp_path, "queue")
    folder = tmp_path / "g" / "argilla"

    settings = rg.Settings.from_json(folder / "settings.json")
    assert [field.name for field in settings.fields] == ["text"]
    assert settings.questions["decision"].labels == ["approve", "refuse"]
    assert settings.questions["note"].required is False
    assert settings.distribution.min_submitted == 2
    assert [prop.name for prop in settings.metadata] == ["source", "proposed_by"]

    records = [rg.Record.from_dict(r) for r in json.loads((folder / "records.json").read_text())]
    answered = []
    for record, words in zip(records, (("approve", "approve"), ("approve", "refuse"), ("approve",)),
                             strict=True):  # fmt: skip
        assert record.fields["text"].startswith("prompt: question")
        for user, word in zip((BOB, CARLA), words, strict=False):
            record.responses.add(rg.Response("decision", word, user_id=user))
            if word == "refuse":
                record.responses.add(rg.Response("note", "not so", user_id=user))
        complete = "completed" if len(words) == 2 else "pending"  # the server says which
        answered.append(record.to_dict() | {"status": complete})
    exported = tmp_path / "exported.json"
    exported.write_text(json.dumps(answered))

    with pytest.raises(DataError, match=f"user {BOB} has no name; set 'people="):
        act(tmp_path, "decide", decisions=str(exported))
    people = {BOB: "bob", CARLA: "carla"}
    act(tmp_path, "decide", decisions=str(exported), people=people)
    said = capsys.readouterr().out
    assert "1 records still wait for answers in Argilla" in said
    assert said.splitlines()[-1] == "draft 1  reviewed 0  golden 1  refused 1  retired 0"
    events = (tmp_path / "g" / "events.jsonl").read_text()
    assert '"by":"carla"' in events and '"note":"not so"' in events
