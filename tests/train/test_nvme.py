"""NVMe offload: the same curve as in memory, bytes on the drive, and a resume that holds."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tuneloom.errors import TrainingError
from tuneloom.testing import Gang, cut_back, metrics, small_config, tiny_model, went_on

STEPS, CUT = 6, 3


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory, lab: Path) -> Path:
    """A lab whose base is 512 wide: what is under 1 MiB a rank is never swapped."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        required = os.environ.get("TUNELOOM_REQUIRE_NVME")
        (pytest.fail if required else pytest.skip)("libaio is missing: apt-get install libaio-dev")
    build = (  # three minutes on two cores, once a machine
        "from tuneloom.train.config import ZeroConfig; from tuneloom.train.ops import build_ops;"
        "build_ops(ZeroConfig(stage=3, offload='nvme'))"
    )
    subprocess.run([sys.executable, "-c", build], check=True)
    folder = tmp_path_factory.mktemp("drive")
    tiny_model(folder / "base", hidden=512, layers=1)
    shutil.copyfile(lab / "rows.jsonl", folder / "rows.jsonl")
    return folder


def config(drive: Path, run_id: str, **dotted: object) -> dict[str, object]:
    shared: dict[str, object] = {
        "steps": STEPS, "method__kind": "full", "optim__lr": 1e-3, "zero__stage": 3,
        "checkpoint__every": 3, "zero__nvme_path": str(drive / "nvme"),
    }  # fmt: skip
    return small_config(drive, run_id, **(shared | dotted))


PLACES = [("nvme", "none"), ("nvme", "nvme"), ("cpu", "nvme")]


@pytest.mark.parametrize(("state", "parameters"), PLACES)
def test_a_drive_gives_the_bits_of_memory_also_after_a_resume(
    drive: Path, two: Gang, state: str, parameters: str
) -> None:
    if not (drive / "runs/memory").exists():
        two.fit(config(drive, "memory", zero__offload="cpu"))
    run_id = f"{state}-{parameters}"
    places = {"zero__offload": state, "zero__offload_parameters": parameters}
    two.fit(config(drive, run_id, **places))
    assert metrics(drive, run_id) == metrics(drive, "memory")
    assert not list((drive / "nvme").rglob("*.swp"))
    cut_back(drive, run_id, CUT)
    two.fit(config(drive, run_id, **places))
    assert went_on(drive, run_id, CUT)
    assert metrics(drive, run_id) == metrics(drive, "memory")


def test_a_run_moves_from_the_drive_to_one_rank_in_memory_without_zero(
    drive: Path, one: Gang, two: Gang
) -> None:
    settings: dict[str, object] = {"zero__offload": "nvme", "zero__offload_parameters": "nvme"}
    two.fit(config(drive, "moved", **settings))
    cut_back(drive, "moved", CUT)
    one.fit(config(drive, "moved", zero__stage=0, batch__accumulation=2))
    assert went_on(drive, "moved", CUT)
    assert metrics(drive, "moved") == pytest.approx(metrics(drive, "memory"), rel=1e-5)


def test_offload_to_a_drive_that_moved_nothing_ends_the_run_by_name(
    lab: Path, drive: Path, two: Gang
) -> None:
    places = {"zero__offload": "nvme", "zero__nvme_path": str(drive / "empty")}
    with pytest.raises(TrainingError, match=r"options that did nothing: zero\.offload=nvme"):
        two.fit(small_config(lab, "too-small", zero__stage=3, **places))
