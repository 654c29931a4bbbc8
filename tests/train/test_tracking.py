"""W&B offline is read back from its own file; a resumed run goes on in the same W&B run."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuneloom.testing import Gang, metrics, small_config


def records(path: Path) -> Iterator[bytes]:
    """Records of a .wandb file: a 7-byte head, then LevelDB's log format in blocks of 32 KiB."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        if kind == 0:
            return
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # full, last
            yield parts
            parts = b""


def history(run: Path) -> list[dict[str, Any]]:
    """Rows of every offline file of a run, parsed with W&B's own message types."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for path in sorted(run.glob("wandb/**/*.wandb")):
        for data in records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append(
                    {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
                )
    return rows


def test_offline_wandb_holds_the_numbers_of_metrics_jsonl(lab: Path, one: Gang) -> None:
    one.fit(small_config(lab, "tracked", steps=4, tracker__mode="offline"))
    rows = [row for row in history(lab / "runs/tracked") if "train/loss" in row]
    assert [row["train/loss"] for row in rows] == metrics(lab, "tracked")
    assert [row["_step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["speed/tokens_per_second"] > 0 and row["memory/peak_gib"] > 0 for row in rows)


def test_a_resumed_run_is_one_wandb_run(lab: Path, one: Gang) -> None:
    folder = lab / "runs/continued"
    folder.mkdir(parents=True)
    (folder / "stop").touch()
    config = small_config(lab, "continued", steps=4, tracker__mode="offline")
    try:
        one.fit(config)
    except Exception as error:
        assert "the same command resumes" in str(error)
    one.fit(config)
    files = list(folder.glob("wandb/**/*.wandb"))
    assert {path.name for path in files} == {"run-continued.wandb"} and len(files) == 2
    assert [row["_step"] for row in history(folder) if "train/loss" in row] == [1, 2, 3, 4]


def test_without_a_key_auto_is_offline_and_the_record_says_so(lab: Path, one: Gang) -> None:
    one.fit(small_config(lab, "auto", steps=1, tracker__mode="auto"))
    tracker = json.loads((lab / "runs/auto/run.json").read_text())["tracker"]
    assert tracker["mode"] == "offline" and "no key was found" in tracker["reason"]
    assert history(lab / "runs/auto")
