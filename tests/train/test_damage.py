"""Damage to a checkpoint of real ranks: whatever is flipped, cut or swapped is found before use."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tuneloom.testing import Gang, small_config
from tuneloom.train import checkpoint

SEED = 20261122


@pytest.fixture(scope="module", params=[2, 3], ids=["zero2", "zero3"])
def root(
    request: pytest.FixtureRequest, lab: Path, two: Gang, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """checkpoints/ of a two-rank run, with steps 2 and 4."""
    run_id = f"damage{request.param}"
    two.fit(
        small_config(lab, run_id, steps=4, zero__stage=request.param, checkpoint__every=2,
                     checkpoint__keep=9, method__rank=1)
    )  # fmt: skip
    copy = tmp_path_factory.mktemp(run_id) / "checkpoints"
    shutil.copytree(lab / "runs" / run_id / "checkpoints", copy)
    assert [checkpoint.verify(folder) for folder in checkpoint.ordered(copy)] == [None, None]
    yield copy
    assert [checkpoint.verify(folder) for folder in checkpoint.ordered(copy)] == [None, None]


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_thousand_flipped_bits_are_all_found(root: Path) -> None:
    """Half of them anywhere by size, half in a file drawn first, so that control files are hit."""
    rng, folder = random.Random(SEED), root / checkpoint.name(4)
    files = files_of(folder)
    by_size = rng.choices(files, [path.stat().st_size for path in files], k=500)
    for path in by_size + rng.choices(files, k=500):
        offset, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        flip(path, offset, bit)
        assert checkpoint.verify(folder) is not None, f"{path.name}, byte {offset}, bit {bit}"
        flip(path, offset, bit)


def flip(path: Path, offset: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def test_every_bit_of_the_manifest_is_guarded(root: Path) -> None:
    folder = root / checkpoint.name(4)
    text = (folder / checkpoint.MANIFEST).read_bytes()
    for offset in range(0, len(text), 7):
        for bit in range(8):
            flip(folder / checkpoint.MANIFEST, offset, bit)
            found = checkpoint.verify(folder)
            flip(folder / checkpoint.MANIFEST, offset, bit)
            assert found is not None, (offset, bit)


def test_two_hundred_truncations_are_all_found(root: Path) -> None:
    rng, folder = random.Random(SEED), root / checkpoint.name(4)
    for path in rng.choices(files_of(folder), k=200):
        content = path.read_bytes()
        path.write_bytes(content[: rng.randrange(len(content))])
        assert checkpoint.verify(folder) is not None, path.name
        path.write_bytes(content)


def test_fifty_swapped_shards_between_ranks_and_steps_are_all_found(root: Path) -> None:
    rng, folder = random.Random(SEED), root / checkpoint.name(4)
    shards = [p for p in files_of(folder) if p.name != "zero_to_fp32.py" and "rng" not in p.name]
    others = [p for f in checkpoint.ordered(root) for p in files_of(f)]
    done = 0
    while done < 50:
        here, there = rng.choice(shards), rng.choice(others)
        contents = here.read_bytes(), there.read_bytes()
        if contents[0] == contents[1] or here.suffix != there.suffix:
            continue
        here.write_bytes(contents[1])
        there.write_bytes(contents[0])
        assert checkpoint.verify(folder) is not None, (here, there)
        here.write_bytes(contents[0])
        there.write_bytes(contents[1])
        done += 1


def test_a_file_that_no_manifest_lists_is_found(root: Path) -> None:
    folder = root / checkpoint.name(4)
    stray = folder / checkpoint.ENGINE / "zero_pp_rank_9_mp_rank_00_optim_states.pt"
    stray.write_bytes(b"payload")
    assert checkpoint.verify(folder) == f"engine/{stray.name} is not in the manifest"
    stray.unlink()


def test_a_checkpoint_under_another_steps_name_is_found(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / checkpoint.name(2), tmp_path / checkpoint.name(4))
    assert checkpoint.verify(tmp_path / checkpoint.name(4)) == "it holds step 2"


SHAPES = {
    "empty": b"", "half": None, "nulls": b"\0" * 400, "a list": b"[]", "a number": b"8",
    "no keys": b"{}", "not UTF-8": b"\xff\xfe{}", "deep": b"[" * 100_000,
    "huge": b'{"files": "' + b"x" * 1_000_000 + b'"}', "files as a list": b'{"files": [1]}',
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_a_manifest_in_any_wrong_shape_costs_one_interval_and_never_the_run(
    root: Path, tmp_path: Path, shape: str
) -> None:
    copy = tmp_path / "checkpoints"
    shutil.copytree(root, copy)
    manifest = copy / checkpoint.name(4) / checkpoint.MANIFEST
    content = SHAPES[shape]
    manifest.write_bytes(manifest.read_bytes()[:200] if content is None else content)
    said: list[str] = []
    found = checkpoint.newest(copy, say=said.append)
    assert found is not None and found.step == 2
    assert len(said) == 1 and "damaged" in said[0]


def test_a_seven_digit_step_is_newer_than_a_six_digit_one(root: Path, tmp_path: Path) -> None:
    """Folders sorted by name put step 1,000,000 first: resumed from the old, deleted the new."""
    copy = tmp_path / "checkpoints"
    for step in (999_999, 1_000_000):
        folder = copy / checkpoint.name(step)
        shutil.copytree(root / checkpoint.name(4), folder)
        manifest = checkpoint.unsealed((folder / checkpoint.MANIFEST).read_text())
        (folder / checkpoint.MANIFEST).write_text(checkpoint.sealed(manifest | {"step": step}))
    found = checkpoint.newest(copy)
    assert found is not None and found.step == 1_000_000
    checkpoint.prune(copy, 1)
    assert [folder.name for folder in copy.iterdir()] == ["step-1000000"]


def test_the_manifest_stays_readable_json(root: Path) -> None:
    manifest = json.loads((root / checkpoint.name(4) / checkpoint.MANIFEST).read_text())
    assert manifest["step"] == 4 and manifest["world_size"] == 2
