"""Shared by all tests: quiet, offline, one tiny model, one gang of each size."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "WANDB_MODE": "offline",
               "DO_NOT_TRACK": "1",
               "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}  # fmt: skip

from tuneloom.testing import Gang, chat_rows, tiny_model


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base/ (tiny Llama), rows.jsonl (48 chats) and validation.jsonl (8)."""
    folder = tmp_path_factory.mktemp("lab")
    tiny_model(folder / "base")
    chat_rows(folder / "rows.jsonl", 48)
    chat_rows(folder / "validation.jsonl", 8, seed=1)
    return folder


@pytest.fixture(scope="session")
def one() -> Iterator[Gang]:
    gang = Gang(1)
    yield gang
    gang.close()


@pytest.fixture(scope="session")
def two() -> Iterator[Gang]:
    gang = Gang(2)
    yield gang
    gang.close()
