"""`tuneloom ingest launch=ray`: the dataset of one process, to the byte, by tasks of Ray Data."""

import gzip
import json
import os
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneloom import cli

ROOT = Path(__file__).parent.parent.parent
RECIPE = [
    "data.name=d", "source=raw", "data.privacy.actions={email: pseudonym}", "data.near.action=drop",
    "data.against.sets=[{name: seen, path: seen.jsonl}]", "data.json_schema=schema.json",
    "data.max_rejected=0.5", "data.rows_per_shard=1000",
]  # fmt: skip


def lines(name: str, count: int) -> bytes:
    """Rows of their own with 1 KB of text, 50 that stand in every file, and one that is none."""
    texts = (" ".join(f"{i}{name}{j}" for j in range(150)) for i in range(count))
    rows = [
        {"prompt": f"question {i} of {name}", "completion": f"mail {name}{i}@example.com {text}"}
        for i, text in enumerate(texts)
    ]
    rows += [{"prompt": f"asked {i} often", "completion": f"{i}"} for i in range(50)]
    return "\n".join(map(json.dumps, rows)).encode() + b"\n{\n"


@pytest.fixture
def exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of five kinds, the largest of several blocks, and what the recipe refers to."""
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines("a", 7_500))
    assert (folder / "a.jsonl").stat().st_size > 2 * 4 * 2**20
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines("b", 300)))
    (folder / "c.csv").write_text("prompt,completion\nx,y\ntoo,many,cells\n")
    with zipfile.ZipFile(folder / "d.zip", "w") as archive:
        archive.writestr("one.jsonl", lines("d", 100))
        archive.writestr("deeper/two.jsonl", lines("e", 100))
    pq.write_table(pa.table({"text": [f"paragraph {i}" for i in range(400)]}), folder / "f.parquet")
    (tmp_path / "seen.jsonl").write_text('{"prompt": "question 3 of a", "completion": "x"}\n')
    (tmp_path / "schema.json").write_text('{"required": ["prompt"]}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNELOOM_PSEUDONYM_KEY", "0123456789abcdef")
    return tmp_path


def dataset(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "timing.json"}


def start(*words: str) -> subprocess.Popen[str]:
    """The command on a Ray that it starts itself."""
    outer = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-m", "tuneloom", "ingest", *words, "launch=ray"], text=True,
        env=outer | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def token_of(process: psutil.Process) -> Path:
    """The file that the started Ray takes its token from."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        for child in process.children(recursive=True):
            # Right after its exec a process has its name and not yet an environment.
            if child.name() == "gcs_server" and (environment := child.environ()):
                assert environment["RAY_AUTH_MODE"] == "token"
                return Path(environment["RAY_AUTH_TOKEN_PATH"])
        time.sleep(0.05)
    raise AssertionError("no Ray was started")


def test_ray_makes_the_bytes_of_one_process_behind_a_token(exports: Path) -> None:
    running = start(*RECIPE, "root=ray", "workers=2")
    token = token_of(psutil.Process(running.pid))
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert cli.main(["ingest", *RECIPE, "root=one"]) == 0
    said, errors = running.communicate(timeout=200)
    assert running.returncode == 0, said + errors
    assert "RAY_ADDRESS is unset, so a Ray is started here" in said
    made = dataset(exports / "one/d")
    assert dataset(exports / "ray/d") == made
    counts = json.loads(made["manifest.json"])["counts"]
    assert counts["deduplicated"]["exact"] == 150
    assert set(counts["rejected"]) == {"invalid_csv", "invalid_json", "schema"}
    assert counts["quarantined"] == {"leak_seen:question": 1}


def test_an_error_in_a_task_is_one_sentence_and_its_exit_code(exports: Path) -> None:
    torn = exports / "torn"
    torn.mkdir()
    (torn / "b.jsonl.gz").write_bytes(gzip.compress(lines("b", 300))[:-2000])
    running = start("data.name=d", "source=torn")
    said, errors = running.communicate(timeout=200)
    assert running.returncode == 3, said + errors
    assert "b.jsonl.gz: cannot be uncompressed" in errors
    assert "Traceback" not in said + errors
