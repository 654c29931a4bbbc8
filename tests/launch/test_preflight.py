"""Preflight: each check broken once, each with a reason of its own."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tuneloom.config import build
from tuneloom.launch import preflight
from tuneloom.launch.preflight import (
    GIB,
    Facts,
    all_reduce_words,
    examine,
    slow_links,
    unseen_by,
    verdict,
)
from tuneloom.testing import small_config
from tuneloom.train.config import TrainConfig

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture()
def config(lab: Path, tmp_path: Path) -> TrainConfig:
    return build(TrainConfig, small_config(lab, "checked", run__root=str(tmp_path / "runs")))


@pytest.fixture()
def pair(config: TrainConfig) -> list[Facts]:
    """What two ranks on two sound hosts say."""
    return [examine(config, rank, f"n{rank + 1}") for rank in (0, 1)]


def reasons(pair: list[Facts], gpus: int = 0, **broken: Any) -> list[str]:
    """The verdict when rank 1 differs in `broken`."""
    return verdict(
        [pair[0], dataclasses.replace(pair[1], **broken)], gpus_per_rank=gpus, need_bytes=1
    )


def test_two_sound_hosts_may_start(pair: list[Facts], config: TrainConfig) -> None:
    assert reasons(pair) == []
    assert unseen_by(config, 2) == ()


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"code": "0" * 64}, "code: rank 1 on n2 runs 000000000000"),
        ({"config": "0" * 64}, "config: rank 1 on n2 was given another config"),
        ({"packages": {"torch": "2.9.0"}}, "environment: torch is 2.9.0 for rank 1 on n2"),
        ({"unseen": (0,)}, "shared file system: rank 1 on n2 cannot read what rank(s) 0 wrote"),
        ({"free_bytes": 0}, "free space: 0.00 GiB for rank 1 on n2"),
        ({"shared_memory_bytes": 64 * 2**20}, "/dev/shm: 64 MiB free for rank 1 on n2"),
        ({"ecc_errors": 3}, "ECC: 3 uncorrected memory errors for rank 1 on n2"),
        ({"gpu_processes": ["4242, 71000"]}, "GPU in use: rank 1 on n2 shares it with process 42"),
        ({"clock_skew": -7.5}, "clock: rank 1 on n2 is -7.5 s off"),
        ({"base": [("model.safetensors", 1)]}, "inputs: rank 1 on n2 has another base"),
        (
            {"incomplete": {"class": "DataError", "message": "data.path: no rows.jsonl"}},
            "inputs: rank 1 on n2: data.path: no rows.jsonl",
        ),
    ],
)
def test_each_fault_is_the_one_reason_given(
    pair: list[Facts], broken: dict[str, Any], said: str
) -> None:
    (reason,) = reasons(pair, **broken)
    assert reason.startswith(said)


def test_inputs_that_only_rank_0_lacks_are_a_reason(pair: list[Facts]) -> None:
    why = {"class": "DataError", "message": "data.path: no rows.jsonl"}
    first, second = (dataclasses.replace(facts, incomplete=why) for facts in pair)
    (reason,) = verdict([first, pair[1]], gpus_per_rank=0, need_bytes=1)
    assert reason == "inputs: rank 0 on n1: data.path: no rows.jsonl"
    assert verdict([first, second], gpus_per_rank=0, need_bytes=1) == []  # the run's own error


def test_a_hub_that_is_offline_by_any_word_is_not_asked_for_a_base(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # as from `true`
    model = config.model.model_copy(update={"path": "nobody/nothing"})
    facts = examine(config.model_copy(update={"model": model}), 0, "n1")
    assert facts.incomplete is not None and "nobody/nothing" in facts.incomplete["message"]


def test_a_missing_gpu_and_another_kind_of_gpu_are_told_apart(pair: list[Facts]) -> None:
    gpu = [dataclasses.replace(facts, gpus=[H100]) for facts in pair]
    assert reasons(gpu, gpus=1) == []
    (missing,) = verdict([gpu[0], pair[1]], gpus_per_rank=1, need_bytes=1)
    assert missing.startswith("GPU count: rank 1 on n2 sees 0, 1 expected")
    (mixed,) = verdict(
        [gpu[0], dataclasses.replace(gpu[1], gpus=["NVIDIA L4"])], gpus_per_rank=1, need_bytes=1
    )
    assert mixed.startswith("GPU kind: rank 1 on n2 has ['NVIDIA L4']")


def test_a_run_folder_that_is_not_shared_is_noticed(config: TrainConfig) -> None:
    examine(config, 0, "n1")
    assert unseen_by(config, 2) == (1,)
    (preflight.probe_folder(config) / "1").write_text("stale", encoding="utf-8")
    assert unseen_by(config, 2) == (1,)


def test_a_base_without_one_of_its_shards_is_incomplete(lab: Path, tmp_path: Path) -> None:
    shutil.copytree(lab / "base", tmp_path / "base")
    index = {"weight_map": {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}}
    base = tmp_path / "base"
    (base / "model.safetensors").rename(base / "model-00001.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    broken = small_config(lab, "x", run__root=str(tmp_path / "runs"))
    broken["model"] = {"path": str(tmp_path / "base")}
    facts = examine(build(TrainConfig, broken), 0, "n1")
    assert facts.incomplete is not None
    assert "model-00002.safetensors: not there" in facts.incomplete["message"]


def test_nvidia_smi_is_asked_for_kind_errors_and_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\ncase $1 in\n"
        f"--query-gpu=*) echo '{H100}, 2';;\n--query-compute-apps=*) echo '77, 1024';;\nesac\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert preflight.gpu_facts() == ([H100], 2)
    assert preflight.gpu_processes() == ["77, 1024"]


@pytest.mark.parametrize("smi", [None, "exit 9"])
def test_where_nvidia_smi_cannot_be_asked_torch_counts_and_what_is_unknown_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair: list[Facts], smi: str | None
) -> None:
    if smi:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{smi}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: H100)
    gpus, errors = preflight.gpu_facts()
    assert (gpus, errors, preflight.gpu_processes()) == ([H100], None, [])
    known = [dataclasses.replace(pair[0], gpus=[H100], ecc_errors=0), pair[1]]
    assert preflight.unasked(known) is None
    known[1] = dataclasses.replace(pair[1], gpus=gpus, ecc_errors=errors)
    assert verdict(known, gpus_per_rank=1, need_bytes=1) == []
    assert str(preflight.unasked(known)).startswith(
        "nvidia-smi could not be asked by rank 1 on n2: memory errors and "
    )


def test_the_slowest_link_is_named_and_refused_when_far_below_the_others(
    pair: list[Facts],
) -> None:
    four = [dataclasses.replace(pair[0], rank=r, host=f"n{r + 1}") for r in range(4)]
    words, none = slow_links(four, [0.010, 0.011, 0.012, 0.010], size=1e8)
    assert words.startswith("slowest link 1 (n2) -> 2 (n3) 8.33 GB/s")
    assert none == []
    _, (reason,) = slow_links(four, [0.010, 0.011, 0.012, 1.0], size=1e8)
    assert reason == "link: 2 (n3) -> 3 (n4) runs at 0.10 GB/s, the median is 9.09 GB/s"


def test_the_slowest_and_the_fastest_rank_of_an_all_reduce_are_named(pair: list[Facts]) -> None:
    words = all_reduce_words(pair, [0.02, 0.05], size=2**24)
    assert words == (
        "all-reduce of 16 MiB: slowest rank 1 on n2 336 MB/s, fastest rank 0 on n1 839 MB/s"
    )


def test_free_space_must_hold_a_checkpoint(config: TrainConfig, pair: list[Facts]) -> None:
    rich = [dataclasses.replace(facts, base=[("model.safetensors", 10 * GIB)]) for facts in pair]
    full = config.model_copy(update={"method": config.method.model_copy(update={"kind": "full"})})
    assert preflight.needed_bytes(full, rich[0]) == 70 * GIB + GIB // 2
    assert preflight.needed_bytes(config, rich[0]) == GIB // 2  # no weight of a frozen base
