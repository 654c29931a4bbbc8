"""The GPU benchmarks' code at tiny sizes on the CPU: every contender runs and passes its gate."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import record
from benchmarks.gpu import __main__ as command
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


def test_the_compiled_peer_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", eager)  # what Dynamo traces, without a C++ compiler
    deep = replace(lora_step.TINY, layers=10)  # more than Dynamo's limit of 8 graphs
    way = lora_step.SMALL_WAYS["PEFT, torch.compile"]
    few = lora_step._block(deep, way, replace(ONCE, timed=1))["graphs"]
    assert few == lora_step._block(deep, way, replace(ONCE, timed=9))["graphs"] > 0


def test_what_fails_or_disagrees_has_no_row_and_a_peer_that_breaks_costs_only_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(loss: loss_head.Loss) -> loss_head.Loss:
        return lambda *args: 1.1 * loss(*args)

    def broken(*_: Any) -> Any:
        raise RuntimeError("no kernel\nfor this GPU")

    found = loss_head.contenders
    monkeypatch.setattr(
        loss_head, "contenders",
        lambda y: {n: wrong(x) for n, x in found(y).items()} | {"Liger": broken},
    )  # fmt: skip
    shape = loss_head.run(ONCE, dry=True)["shapes"][0]
    assert set(shape["times"]) == {"limit: products alone"}
    assert shape["not_run"]["ours"] == "failed its parity gate"
    assert shape["not_run"]["Liger"] == "failed: RuntimeError: no kernel"

    gate = lora_step._gate
    ways = {"ours": lora_step.Way(ours=True), "a": lora_step.Way(), "b": lora_step.Way(liger=True)}
    monkeypatch.setattr(lora_step, "_missing", lambda way: "")
    monkeypatch.setattr(lora_step, "_gate", lambda s, w, t: gate(s, w, t) | {"passed": not w.ours})
    step = lora_step._compare(lora_step.TINY, ways, ONCE)
    assert set(step["rows"]) == {"a"} and step["ratios"] == {}
    assert step["not_run"]["ours"] == "failed its parity gate"
    assert step["not_run"]["b"].startswith("failed: ")  # Liger has nothing to run here


def test_a_way_of_ours_that_breaks_leaves_the_others_their_figures_and_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no capture")

    found = loss_head.contenders
    monkeypatch.setattr(loss_head, "contenders", lambda y: found(y) | {"ours": broken})
    shape = loss_head.run(ONCE, dry=True)["shapes"][0]
    assert shape["not_run"]["ours"] == "failed: RuntimeError: no capture"
    assert {"transformers", "ours, positions found"} < set(shape["times"])
    assert command.inside("loss_head", True) == 1
    assert "loss_head: ours failed; the others" in capsys.readouterr().out


def test_speeds_are_compared_within_a_precision() -> None:
    speeds = {
        "ours, bf16": 10.0, "ours, FP8": 30.0, "ours, NF4": 8.0, "ours, NF4, prefetch": 9.0,
        "PEFT, NF4 (recompute)": 4.0, "PEFT, kept activations": 5.0,
    }  # fmt: skip
    assert lora_step.ratios(speeds, lora_step.LOW_WAYS | lora_step.STEP_WAYS) == {
        "ours / PEFT, NF4 (recompute)": 2.25, "ours / PEFT, kept activations": 2.0,
        "ours FP8 / ours bf16": 3.0, "ours NF4 / ours bf16": 0.9,
    }  # fmt: skip


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
        assert set(shape["not_run"]) == set(loss_head.PEERS) - {"transformers"}


def test_the_lora_block_and_the_low_precision_step_run() -> None:
    pytest.importorskip("bitsandbytes")
    block = lora_block.run(ONCE, dry=True)
    assert {"PEFT", "ours", "ours, augmented"} <= set(block["linears"][0]["overhead"])
    assert set(block["elementwise"][0]["times"]) == {"rms_norm", "add_rms_norm", "rope", "swiglu"}
    gates = [part["parity"] for part in (*block["linears"], *block["elementwise"])]
    assert all(gate["passed"] for found in gates for gate in found.values()), gates
    assert command.faults(block) == []
    low = lora_step.run_low_precision(ONCE, dry=True)
    assert {"ours, NF4", "ours, NF4, prefetch", "ours, FP8"} <= set(low["rows"])
    assert all(gate["passed"] for gate in low["parity"].values()), low["parity"]
    assert "ours NF4 / ours bf16" in low["ratios"]


def test_an_op_that_turns_the_wrong_way_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = lora_block.rope
    monkeypatch.setattr(lora_block, "rope", lambda q, k, cos, sin: turn(q, k, cos, -sin))
    block = lora_block.run(ONCE, dry=True)
    assert set(block["elementwise"][0]["times"]) == {"rms_norm", "add_rms_norm", "swiglu"}
    assert command.faults(block) == ["rope"]


def test_reach_finds_the_largest_micro_batch_that_fits() -> None:
    assert set(lora_step.run_reach(ONCE, dry=True)["tokens"].values()) == {64}


WITHOUT_RAY_AND_WANDB = """
import runpy, sys
sys.modules |= {"ray": None, "wandb": None}
runpy.run_module("benchmarks.gpu.trainers", run_name="__main__", alter_sys=True)
"""


def test_our_trainer_runs_where_there_is_neither_ray_nor_wandb(tmp_path: Path) -> None:
    trainers.write_model(tmp_path / "base", trainers.TINY)
    trainers.write_documents(tmp_path / "rows.jsonl", trainers.TINY, count=64)
    command = [sys.executable, "-c", WITHOUT_RAY_AND_WANDB, trainers.OURS, str(tmp_path), "2"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert len(json.loads(ran.stdout.splitlines()[-1])["speeds"]) == 2


def test_whole_trainers_run_and_name_those_that_cannot() -> None:
    found = trainers.run(Plan(blocks=1, warm_up=1, timed=2), dry=True)
    assert set(found["rows"]) == {"ours", "TRL, its defaults"}, found["not_run"]
    assert all(row["range"][0] > 0 for row in found["rows"].values())
    assert found["ratios"].keys() == {"ours / TRL, its defaults"}
    assert found["not_run"].keys() == trainers.TRL.keys() - {"TRL, its defaults"}
    assert {row["attention"] for row in found["rows"].values()} == {"sdpa"}


@pytest.mark.parametrize("name", ["TRL at its best", "TRL at its best, no packing"])
def test_trl_at_its_best_runs_without_flash_attn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    keys = trainers.TRL[name] | {"use_liger_kernel": False}  # Liger needs a GPU
    monkeypatch.setitem(trainers.TRL, name, keys)
    trainers.write_model(tmp_path / "base", lora_step.TINY)
    trainers.write_documents(tmp_path / "rows.jsonl", lora_step.TINY, count=64)
    found = trainers.theirs(name, tmp_path, lora_step.TINY, 2)
    assert len(found["speeds"]) == 2 and min(found["speeds"]) > 0
    assert found["attention"] == "sdpa"


def test_trl_packs_on_the_newest_flash_attn_that_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    there: set[str] = set()
    monkeypatch.setattr(trainers.importlib.util, "find_spec", lambda name: name in there)
    packed = {"packing": True}
    assert trainers.attention_of(packed) == "sdpa"
    there.add("flash_attn")
    assert trainers.attention_of(packed) == "flash_attention_2"
    there.add("flash_attn_interface")
    assert trainers.attention_of(packed) == "flash_attention_3"
    assert trainers.attention_of({}) == "sdpa"


def test_what_has_a_result_of_this_code_is_not_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[str, bool]] = []
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "code", lambda: "abc1234")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "child", lambda name, dry: ran.append((name, dry)) or 0)
    for name, made in (("loss_head", "abc1234"), ("reach", "0ther00")):
        path = tmp_path / f"gpu_{name}.json"
        path.write_text(json.dumps({"made": {"code": made}}), encoding="utf-8")

    def run(*arguments: str) -> int:
        ran.clear()
        monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", *arguments])
        return command.main()

    assert run("loss_head", "reach", "lora_block") == 0
    assert ran == [("reach", False), ("lora_block", False)]
    assert "loss_head: has a result for this code" in capsys.readouterr().out
    assert run("loss_head", "--again") == 0 and ran == [("loss_head", False)]
    assert run("loss_head", "--dry-run") == 0 and ran == [("loss_head", True)]
    assert run() == 0
    assert [name for name, _ in ran] == [n for n in command.BENCHMARKS if n != "loss_head"]
    monkeypatch.setattr(command, "child", lambda name, dry: 137 if name == "reach" else 0)
    assert run("reach", "lora_block") == 1


def test_a_benchmark_runs_in_a_process_of_its_own_until_its_limit(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(record.RESULTS.iterdir())
    assert command.child("loss_head", True) == 0
    assert "loss_head (B7): dry run" in capfd.readouterr().out
    monkeypatch.setattr(command, "LIMIT_SECONDS", 0.5)
    assert command.child("loss_head", True) == 1
    assert "loss_head: stopped after 0.5 s, no result" in capfd.readouterr().out
    assert sorted(record.RESULTS.iterdir()) == before


def test_past_its_limit_a_benchmark_leaves_neither_processes_nor_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/sh\nsleep 60 & echo $! $TMPDIR > {tmp_path}/said\ntouch $TMPDIR/model\nwait\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(command, "LIMIT_SECONDS", 2)
    assert command.child("trainers", True) == 1
    pid, folder = (tmp_path / "said").read_text().split()
    deadline = time.monotonic() + 10
    while not ended(int(pid)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not Path(folder).exists()


def ended(pid: int) -> bool:
    """Gone, or a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
