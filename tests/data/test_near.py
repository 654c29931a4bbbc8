"""Near-duplicates: planted clusters are found whole, by any engine, order and number of workers."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tuneloom.config import build
from tuneloom.data.dedupe import NearConfig, clusters, shingles, signature
from tuneloom.data.ingest import ingest
from tuneloom.data.recipe import IngestConfig
from tuneloom.data.scratch import Scratch

WORDS = [f"w{i}" for i in range(2000)]


def planted(singles: int, groups: int, size: int) -> list[dict[str, str]]:
    """`singles` texts of their own, and `groups` of `size` texts that differ in their last word."""
    rng = random.Random(5)
    texts = [" ".join(rng.choices(WORDS, k=80)) for _ in range(singles)]
    for _ in range(groups):
        base = " ".join(rng.choices(WORDS, k=80))
        texts += [f"{base} ending{i}" for i in range(size)]
    rng.shuffle(texts)
    return [{"text": text} for text in texts]


def run(
    tmp_path: Path, lines: list[Any], workers: int = 1, root: str = "ds", conflicts: str = "list",
    **near: Any,
) -> Path:  # fmt: skip
    raw = tmp_path / "raw.jsonl"
    raw.write_text("".join(json.dumps(x) + "\n" for x in lines))
    mapping = {
        "data": {"name": "d", "near": {"action": "drop"} | near, "conflicts": conflicts},
        "source": str(raw),
        "workers": workers,
    }
    return ingest(build(IngestConfig, mapping | {"root": str(tmp_path / root)}))


def counts(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text())["counts"])


@pytest.mark.parametrize("engine", ["rensa", "datasketch"])
def test_one_row_of_each_planted_cluster_is_kept(tmp_path: Path, engine: str) -> None:
    pytest.importorskip(engine)
    folder = run(tmp_path, planted(300, 20, 6), engine=engine)
    assert counts(folder)["deduplicated"] == {"near": 100}
    assert counts(folder)["kept"] == 320
    aside = pq.read_table(folder / "set_aside.parquet").to_pylist()
    kept = {row["id"] for split in ("train", "validation", "test")
            for row in pq.read_table(folder / f"{split}-00000.parquet").to_pylist()}  # fmt: skip
    assert all(row["kept"] in kept and row["id"] not in kept for row in aside)


def test_grouped_near_duplicates_share_a_split_and_all_stay(tmp_path: Path) -> None:
    folder = run(tmp_path, planted(300, 60, 4), action="group")
    assert counts(folder)["kept"] == 540
    side: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        for row in pq.read_table(folder / f"{split}-00000.parquet").to_pylist():
            text = json.loads(row["record"])["text"]
            if "ending" in text:
                side.setdefault(text.split(" ending")[0], set()).add(split)
    assert len(side) == 60
    assert all(len(splits) == 1 for splits in side.values())


@pytest.mark.parametrize(("conflicts", "kept"), [("list", 3), ("quarantine", 1)])
def test_two_answers_to_one_question_are_a_conflict_and_no_near_duplicates(
    tmp_path: Path, conflicts: str, kept: int
) -> None:
    question = " ".join(random.Random(6).choices(WORDS, k=80))
    lines = [{"prompt": question, "completion": answer} for answer in ("yes", "no")]
    folder = run(tmp_path, [*lines, {"text": "another row"}], conflicts=conflicts)
    assert counts(folder)["kept"] == kept
    assert counts(folder)["deduplicated"] == {}


def test_pairs_below_the_threshold_are_left_alone(tmp_path: Path) -> None:
    config = NearConfig(action="drop", threshold=0.8)
    rng = random.Random(2)
    base = rng.choices(WORDS, k=100)
    half = base[:50] + rng.choices(WORDS, k=50)
    shared = set(shingles(" ".join(base), 5)) & set(shingles(" ".join(half), 5))
    assert len(shared) > 40, "the pair does share half its shingles"
    signatures = np.array(
        [np.frombuffer(signature(" ".join(t), config), "<u4") for t in (base, half)]
    )
    assert clusters(
        Scratch(tmp_path), signatures, np.zeros(2, int), np.ones(2, bool), config
    ).tolist() == [0, 1]


def test_the_most_trusted_row_stands_for_its_cluster(tmp_path: Path) -> None:
    config, scratch = NearConfig(action="drop"), Scratch(tmp_path)
    signatures, kept = np.tile(np.arange(128, dtype=np.uint32), (3, 1)), np.ones(3, bool)
    rank = np.array([-10, -90, -90])
    assert clusters(scratch, signatures, rank, kept, config).tolist() == [1, 1, 1]
    kept = np.array([True, False, True])
    assert clusters(scratch, signatures, rank, kept, config).tolist() == [2, 1, 2]
    none = np.empty((0, 128), np.uint32)
    assert clusters(scratch, none, rank[:0], kept[:0], config).tolist() == []
