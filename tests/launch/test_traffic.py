"""What `plan` and the simulator say a step sends, against the collectives of real steps."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launch.measure_traffic import RANKS, configured
from tuneloom.launch.anatomy import anatomy
from tuneloom.launch.memory import MAX_LIVE
from tuneloom.launch.simulate import Work, traffic_bytes
from tuneloom.launch.traffic import traffic, zero_elements

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("measure_traffic.py")
SHAPE = {
    "model_type": "llama", "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 448,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}  # fmt: skip
LIVE = 300_000
"""To this model what DeepSpeed's 1e9 live parameters are to one of 4.6 B."""
SCALED = {
    "stage3_max_live_parameters": LIVE, "stage3_max_reuse_distance": LIVE,
    "stage3_prefetch_bucket_size": LIVE // 20, "stage3_param_persistence_threshold": 100,
}  # fmt: skip
PLAIN = {"kind": "full", "dtype": "bf16", "accumulation": 1, "checkpointing": "off", "zero": {}}
REPLICATED = {
    f"zero {stage}, {kind}, {dtype}, {micros} micro-batches": PLAIN
    | {"stage": stage, "kind": kind, "dtype": dtype, "accumulation": micros}
    for stage, (kind, dtype, micros) in itertools.product(
        (0, 1, 2), (("full", "bf16", 1), ("full", "fp32", 3), ("lora", "bf16", 2))
    )
}
SHARDED = {
    "small enough to stay": PLAIN | {"stage": 3},
    "three micro-batches": PLAIN | {"stage": 3, "accumulation": 3, "zero": SCALED},
    "recomputed": PLAIN | {"stage": 3, "checkpointing": "on", "zero": SCALED},
    "frozen": PLAIN | {"stage": 3, "kind": "lora", "zero": SCALED},
    "frozen, recomputed": PLAIN
    | {"stage": 3, "kind": "lora", "checkpointing": "on", "zero": SCALED},
}
OWNERS = PLAIN | {"stage": 2, "zero": {"use_multi_rank_bucket_allreduce": False}}
CASES: dict[str, dict[str, Any]] = REPLICATED | SHARDED | {"owners": OWNERS}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traffic")
    (folder / "config.json").write_text(json.dumps(SHAPE), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def counted(base: Path) -> dict[str, dict[str, int]]:
    """`sent` and `messages` of each case, from a process: DeepSpeed keeps global state."""
    quiet = os.environ | {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "RANK": "0", "WORLD_SIZE": str(RANKS),
        "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, str(SCRIPT), str(base), json.dumps(list(CASES.values()))]
    ran = subprocess.run(command, capture_output=True, text=True, env=quiet, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return dict(zip(CASES, json.loads(ran.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", REPLICATED)
def test_a_step_with_whole_weights_sends_what_plan_and_simulator_say(
    counted: dict[str, dict[str, int]], base: Path, name: str
) -> None:
    """But for norms and the overflow flag: 18 bytes."""
    case = CASES[name]
    config = configured(base, case)
    parts = anatomy(config)
    sent = counted[name]["sent"] * (RANKS - 1) / RANKS
    assert traffic(config, parts, ranks=RANKS).this == pytest.approx(sent, abs=18)
    work = Work(
        layers=4, width=128, linear=0, parameters=parts.base, length=16, tokens=16,
        accumulation=case["accumulation"], recompute=False, frozen=case["kind"] == "lora",
        adapters=parts.trainable, stage=case["stage"],
    )  # fmt: skip
    width = {"bf16": 2, "fp32": 4}[case["dtype"]]
    simulated = case["accumulation"] * traffic_bytes(work, ranks=RANKS, width=width)
    assert simulated == pytest.approx(sent, abs=18)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("small enough to stay", 1e-5), ("three micro-batches", 0.01), ("recomputed", 0.01),
     ("frozen", 0.1), ("frozen, recomputed", 0.01)],
)  # fmt: skip
def test_under_zero_3_a_step_gathers_and_scatters_as_planned(
    counted: dict[str, dict[str, int]], base: Path, name: str, tolerance: float
) -> None:
    """What stays gathered is whole modules, and a frozen embedding, a sixth of this model, is not
    gathered for backward.
    """
    case = CASES[name]
    config = configured(base, case)
    parts = anatomy(config)
    frozen = case["kind"] == "lora"
    elements = zero_elements(
        3, parameters=parts.base + (parts.trainable if frozen else 0), trained=parts.trainable,
        accumulation=case["accumulation"],
        again=parts.linear if frozen and case["checkpointing"] == "on" else 0,
        live=case["zero"].get("stage3_max_live_parameters", MAX_LIVE),
    )  # fmt: skip
    assert 2 * elements == pytest.approx(counted[name]["sent"], rel=tolerance)
    if not case["zero"]:
        sent = counted[name]["sent"] * (RANKS - 1) / RANKS
        assert traffic(config, parts, ranks=RANKS).this == pytest.approx(sent, rel=tolerance)


def test_a_reduce_to_each_owner_sends_half_of_an_all_reduce_in_a_message_a_rank(
    counted: dict[str, dict[str, int]], base: Path
) -> None:
    """Not set in train/zero.py: docs/performance.md says why."""
    parameters = anatomy(configured(base, OWNERS)).base
    usual, owners = counted["zero 2, full, bf16, 1 micro-batches"], counted["owners"]
    assert usual["sent"] - owners["sent"] == 2 * parameters
    assert (usual["messages"], owners["messages"]) == (1 + 2, RANKS + 2)  # 2 all-gathers: groups
