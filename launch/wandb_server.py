"""As much of W&B's server as its client needs to upload a run's history, on this machine; it can
fail. For drills and tests.
"""

import gzip
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Mode = Literal["answers", "fails", "hangs"]
"""`fails`: with 500; `hangs`: takes requests and says nothing."""


class Server(ThreadingHTTPServer):
    """Keeps the rows that are uploaded to it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        """Rows by run id and line number, as uploaded."""
        self.names: list[str] = []
        """Run ids that were opened, in order."""
        self.mode: Mode = "answers"
        self.after_rows: Mode = "answers"
        """What it does from the moment on that it has taken rows."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        run = str(variables.get("name") or variables.get("run") or "")
        project = {"id": "P", "name": "tuneloom", "entity": {"id": "E", "name": "someone"}}
        rows = self.history.get(run, {})
        bucket = {
            "id": run, "name": run, "displayName": run, "config": "{}", "project": project,
            "historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0,
            "summaryMetrics": json.dumps(rows[max(rows)]) if rows else "{}", "eventsTail": "[]",
            "historyTail": json.dumps([json.dumps(rows[max(rows)])]) if rows else "[]",
            "tags": [], "wandbConfig": '{"t": 1}',
        }  # fmt: skip
        if operation == "Viewer":
            return {"viewer": {"id": "U", "entity": "someone", "username": "someone"}}
        if operation == "RunResumeStatus":
            known = run in self.names
            return {"model": {"id": "P", "name": "tuneloom", "bucket": bucket if known else None}}
        if operation == "UpsertBucket":
            self.names.append(run)
            return {"upsertBucket": {"bucket": bucket, "inserted": not rows}}
        if operation == "CreateRunFiles":
            files = [{"name": n, "uploadUrl": f"{self.url}/put/{n}"} for n in variables["files"]]
            return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}
        return {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        """The page of the server itself, where a run asks whether it answers."""
        self._respond(b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer: dict[str, Any] = {}
        if self.server.mode != "answers":
            pass
        elif self.path == "/graphql":
            asked = json.loads(body)
            found = self.server.answer(asked["operationName"], asked.get("variables") or {})
            answer = {"data": found}
        elif self.path.endswith("/file_stream"):
            self._take(json.loads(body).get("files", {}).get("wandb-history.jsonl"))
        self._respond(json.dumps(answer).encode())

    def _take(self, stream: dict[str, Any] | None) -> None:
        rows = self.server.history.setdefault(self.path.split("/")[-2], {})
        for number, line in enumerate(stream["content"] if stream else []):
            rows[stream["offset"] + number] = json.loads(line)  # type: ignore[index]
            self.server.mode = self.server.after_rows

    def _respond(self, content: bytes) -> None:
        while self.server.mode == "hangs":
            time.sleep(0.05)
        self.send_response(500 if self.server.mode == "fails" else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_PUT = do_POST

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet."""


@contextmanager
def serving() -> Iterator[Server]:
    """A server at work, until the end of the block."""
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.mode = "fails"  # what hangs is answered
        server.shutdown()
        server.server_close()
