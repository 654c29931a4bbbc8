"""The GPU benchmarks' code at tiny sizes on the CPU: every contender runs and passes its gate."""

from __future__ import annotations

import pytest

from benchmarks.gpu import lora_block, lora_step, loss_head, trainers
from benchmarks.gpu.timing import Plan
from tests.train import cpu_graphs

ONCE = Plan(blocks=1, warm_up=0, timed=1)


def test_the_lora_step_runs_and_ours_agrees_with_float32() -> None:
    found = lora_step.run_step(ONCE, dry=True)
    assert set(found["rows"]) >= {"ours", "ours, augmented", "PEFT, kept activations"}
    assert all(gate["passed"] for gate in found["parity"].values()), found["parity"]
    assert set(found["not_run"]) == {"PEFT, Liger"}  # it needs a GPU


def test_the_small_models_run_and_name_what_needs_a_gpu() -> None:
    found = lora_step.run_small(ONCE, dry=True)
    graphs, peers = "ours, CUDA graphs", {"PEFT, Liger", "PEFT, torch.compile"}
    assert set(found["not_run"]) == {graphs, *peers}
    assert found["not_run"][graphs] == "needs a GPU"


def test_a_captured_step_passes_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_graphs.install(monkeypatch.setattr)
    way = lora_step.SMALL_WAYS["ours, CUDA graphs"]
    truth = lora_step._first_step(lora_step.TINY, lora_step.Way(exact=True))
    assert lora_step.agreement(lora_step._first_step(lora_step.TINY, way), truth)["passed"]
    with lora_step._built(lora_step.TINY, way) as step:
        step(lora_step._ids(lora_step.TINY, lora_step.TINY.rows, lora_step.TINY.length))


def test_the_gate_fails_a_wrong_loss() -> None:
    truth = lora_step._first_step(lora_step.TINY, lora_step.Way(exact=True))
    wrong = {**truth, "loss": truth["loss"] * 1.02}
    assert not lora_step.agreement(wrong, truth)["passed"]
    turned = {name: value * (-1 if "lora_A" in name else 1) for name, value in truth.items()}
    assert not lora_step.agreement(turned, truth)["passed"]


def test_every_loss_head_agrees_with_float32() -> None:
    for shape in loss_head.run(ONCE, dry=True)["shapes"]:
        assert all(gate["passed"] for gate in shape["parity"].values()), shape
        assert "limit: products alone" in shape["times"]


def test_the_lora_block_and_the_low_precision_step_run() -> None:
    pytest.importorskip("bitsandbytes")
    block = lora_block.run(ONCE, dry=True)
    assert {"PEFT", "ours", "ours, augmented"} <= set(block["linears"][0]["overhead"])
    assert set(block["elementwise"][0]["times"]) == {"rms_norm", "add_rms_norm", "rope", "swiglu"}
    low = lora_step.run_low_precision(ONCE, dry=True)
    assert {"ours, NF4", "ours, NF4, prefetch", "ours, FP8"} <= set(low["rows"])
    assert low["parity"]["ours, FP8"]["passed"], low["parity"]


def test_reach_finds_the_largest_micro_batch_that_fits() -> None:
    assert set(lora_step.run_reach(ONCE, dry=True)["tokens"].values()) == {64}


def test_whole_trainers_run_and_name_those_that_cannot() -> None:
    found = trainers.run(Plan(blocks=1, warm_up=1, timed=2), dry=True)
    assert set(found["rows"]) == {"ours", "TRL, its defaults"}, found["not_run"]
    assert all(row["range"][0] > 0 for row in found["rows"].values())
    assert found["ratios"].keys() == {"ours / TRL, its defaults"}
    assert found["not_run"].keys() == trainers.TRL.keys() - {"TRL, its defaults"}
