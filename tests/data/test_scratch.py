"""Numbers kept in files, a chunk at a time: the same answers as with all of them in one piece."""

import json
import random
import resource
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tuneloom.config import build
from tuneloom.data import scratch
from tuneloom.data.ingest import ingest
from tuneloom.data.recipe import IngestConfig, SplitConfig
from tuneloom.data.scratch import Column, Lowest, Scratch, buckets
from tuneloom.data.splits import assign, mixed, place
from tuneloom.errors import DataError, RefusedError

WORDS = [f"w{i}" for i in range(500)]
RECORD = {"messages": [{"role": "user", "content": "{q}"}, {"role": "assistant", "content": "{a}"}]}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "conflicts": {"label": "{l}", "key": "{who}", "conflicts": "quarantine"},
    "few_keys": {"label": "{l}", "key": "{file}"},
    "near": {"near": {"action": "drop"}, "licence_action": "drop"},
    "group": {"near": {"action": "group"}, "label": "{l}", "key": "{who}"},
}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Three files whose rows repeat, contradict and nearly repeat each other."""
    rng, folder = random.Random(1), tmp_path / "raw"
    folder.mkdir()
    for number in range(3):
        lines = []
        for i in range(500):
            q = " ".join(rng.choices(WORDS, k=rng.choice([6, 40])))
            if i % 7 == 0:
                q = f"the same question {rng.randrange(30)}"
            if i % 11 == 0:
                q = " ".join([f"base{i % 5}", *WORDS[:60], f"end{rng.randrange(100)}"])
            lines.append({"q": q, "a": rng.choice(["yes", "no"]), "l": rng.choice("abcde"),
                          "who": f"user{rng.randrange(200)}", "file": str(number)})  # fmt: skip
        (folder / f"f{number}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def make(raw: Path, root: Path, **data: Any) -> dict[str, bytes]:
    """Every file of the dataset, of the fifth case's derived one too."""
    terms = [{"match": f"f{n}*", "trust": 10 * n, "licence": licence}
             for n, licence in enumerate(("MIT", "CC-BY-NC-4.0", "MIT"))]  # fmt: skip
    recipe = {"name": "d", "record": RECORD, "provenance": terms, **data}
    mapping = {"data": recipe, "source": str(raw), "root": str(root)}
    folder = ingest(build(IngestConfig, mapping))
    left = {p.name.split("-")[0] for p in root.iterdir() if p.name.startswith(".")}
    assert left == {".lock"}, "nothing of the scratch folder is left"
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "timing.json"}
    return files | {"name": folder.name.encode()}


@pytest.mark.parametrize("case", CASES)
def test_small_chunks_give_the_same_dataset_to_the_byte(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    whole = make(raw, tmp_path / "whole", **CASES[case])
    monkeypatch.setattr(scratch, "CHUNK", 50)
    assert make(raw, tmp_path / "chunks", **CASES[case]) == whole


def test_keys_of_another_dataset_are_looked_up_in_chunks(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "datasets"
    make(raw, root, key="{who}", name="task")
    within = {"dataset": str(root / "task"), "split": "train"}
    text = {"name": "text", "record": {"text": "{q} {a}"}, "key": "{who}", "within": within}
    whole = make(raw, root, **text)
    monkeypatch.setattr(scratch, "CHUNK", 50)
    assert make(raw, root, **text) == whole


@pytest.mark.parametrize("different", [1, 40, 3000])
def test_rows_of_one_hash_share_a_bucket_and_every_wanted_row_comes_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, different: int
) -> None:
    monkeypatch.setattr(scratch, "CHUNK", 64)
    rng = np.random.default_rng(0)
    hashes = rng.integers(1 << 64, size=different, dtype=np.uint64)[np.arange(3000) % different]
    wanted, more = rng.random(3000) < 0.7, np.arange(3000, dtype=np.int32) * 2
    found: list[int] = []
    bucket_of: dict[int, int] = {}
    for number, bucket in enumerate(buckets(Scratch(tmp_path), hashes, wanted, more)):
        for rows, own, carried in bucket:
            assert len(rows) <= 64 and (np.diff(rows) > 0).all()
            assert (hashes[rows] == own).all() and (carried == rows * 2).all()
            assert all(bucket_of.setdefault(h, number) == number for h in own.tolist())
            found += rows.tolist()
    assert sorted(found) == np.flatnonzero(wanted).tolist()


def test_the_least_number_of_each_key_is_known_after_any_number_of_chunks() -> None:
    rng = np.random.default_rng(0)
    keys, numbers = rng.integers(50, size=900, dtype=np.uint64), rng.integers(-99, 99, size=900)
    lowest = Lowest("i8")
    for start in range(0, 900, 70):
        lowest.add(keys[start : start + 70], numbers[start : start + 70])
    expected: dict[int, int] = defaultdict(lambda: 100)
    for key, number in zip(keys.tolist(), numbers.tolist(), strict=True):
        expected[key] = min(expected[key], number)
    assert lowest.of(keys).tolist() == [expected[key] for key in keys.tolist()]


def test_every_label_is_cut_at_its_shares_in_the_order_of_its_keys_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "CHUNK", 64)
    rng, split = np.random.default_rng(0), SplitConfig(train=0.8, validation=0.1, test=0.1)
    keys = rng.integers(1 << 64, size=400, dtype=np.uint64)[rng.integers(400, size=2000)]
    labels, kept = rng.integers(4, size=2000, dtype=np.int32), rng.random(2000) < 0.9
    label_of: dict[int, int] = {}
    for key, label in zip(keys[kept].tolist(), labels[kept].tolist(), strict=True):
        label_of[key] = min(label, label_of.get(key, label))
    expected = {}
    for label in range(4):
        mine = np.array([key for key, own in label_of.items() if own == label], np.uint64)
        ordered = mine[np.argsort(place(mixed(mine, split)))].tolist()
        for rank, key in enumerate(ordered):
            share = (rank + 0.5) / len(ordered)
            expected[key] = 2 if share < 0.1 else 1 if share < 0.2 else 0
    found = assign(Scratch(tmp_path), keys, labels, kept, split)
    assert found.tolist() == [
        expected[k] if wanted else -1 for k, wanted in zip(keys.tolist(), kept, strict=True)
    ]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    column, before = Column(Scratch(tmp_path), "i8"), resource.getrlimit(resource.RLIMIT_FSIZE)
    column.add(np.arange(10))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(RefusedError, match="no room for the numbers of 100,010 rows"):
            column.add(np.arange(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_labels_that_are_no_classes_are_refused(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneloom.data.decide.MOST_LABELS", 100)
    with pytest.raises(DataError, match=r"data\.label: over 100 different labels"):
        make(raw, tmp_path / "datasets", label="{who}")


def test_more_labels_than_fit_in_memory_are_not_judged(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneloom.data.labels.MOST_ROWS", 1000)
    doubt = {"label": "{l}", "label_issues": {"action": "list"}}
    with pytest.raises(DataError, match=r"data\.label_issues\.action: 1,\d+ labelled rows, at mo"):
        make(raw, tmp_path / "datasets", **doubt)


MEASURED = """
import json, sys, threading, time
from pathlib import Path
from tuneloom.config import build
from tuneloom.data import gather, ingest, readers, scratch, store
from tuneloom.data.recipe import IngestConfig

scratch.CHUNK, gather.RANGE_BYTES, readers.BLOCK_BYTES = 4096, 1 << 20, 1 << 18
store.ROWS_PER_GROUP = 1000
peak, done = 0, False

def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
ingest.ingest(build(IngestConfig, json.loads(sys.argv[1])))
done = True
thread.join()
print(peak)
"""


def peak_of(folder: Path, rows: int, **data: Any) -> int:
    """The most anonymous memory, in bytes, that an ingest of short rows held, its pieces small."""
    rng, raw = random.Random(0), folder / f"{rows}.jsonl"
    with raw.open("w") as file:
        for i in range(rows):
            row = {"prompt": f"question {i if i % 50 else 1}", "completion": f"{rng.random()}"}
            file.write(json.dumps(row | {"l": f"{i % 20}"}) + "\n")
    recipe = {"name": "d", "privacy": {"default": "keep", "secrets": "off"}, **data}
    mapping = {"data": recipe, "source": str(raw), "root": str(folder / f"ds{rows}")}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, json.dumps(mapping)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", ["conflicts", "group"])
def test_six_times_the_rows_take_no_more_memory(tmp_path: Path, case: str) -> None:
    ways: dict[str, dict[str, Any]] = {
        "conflicts": {"conflicts": "quarantine", "label": "{l}"},
        "group": {"near": {"action": "group"}},
    }
    few, many = 100_000, 600_000
    grown = peak_of(tmp_path, many, **ways[case]) - peak_of(tmp_path, few, **ways[case])
    assert grown < 20 * (many - few), f"{grown / (many - few):.1f} bytes a row"
