"""What only a GPU can show: pytest -m gpu tests/gpu. None of it has run yet; README, honest limits.

Each run is a process of its own through `python -m tuneloom.train`, so Ray is not needed.
"""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.cpu_graphs import PACKS, build, pack
from tuneloom.kernels.attention import flash, has_varlen
from tuneloom.testing import free_port, metrics, tiny_model
from tuneloom.train import graphed
from tuneloom.train.loss import loss_sum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
needs_varlen = pytest.mark.skipif(not has_varlen(), reason="needs torch 2.12")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"
)
LLAMA3_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip


def train(lab: Path, run_id: str, *overrides: str, gpu: bool = True) -> None:
    environment = os.environ | {"MASTER_PORT": str(free_port())}
    environment.pop("DS_ACCELERATOR", None)
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-m", "tuneloom.train", f"run.root={lab}/runs", f"run.id={run_id}",
         f"model.path={lab}/base", f"data.path={lab}/rows.jsonl", "data.validation=null",
         "batch.max_length=128", "batch.tokens=512", "batch.window=64", "optim.warmup_steps=2",
         "optim.lr=5e-3", "tracker=off", "epochs=100", "steps=20", "zero=stage0", *overrides],
        capture_output=True, text=True, env=environment, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def effects(lab: Path, run_id: str) -> dict[str, dict[str, object]]:
    found = json.loads((lab / "runs" / run_id / "effects.json").read_text())["receipts"]
    return {receipt["option"]: receipt["evidence"] for receipt in found}


@pytest.fixture(scope="module")
def curve(lab: Path) -> list[float]:
    """The same run in fp32 on the CPU."""
    train(lab, "cpu", "model.dtype=fp32", gpu=False)
    return metrics(lab, "cpu")


@pytest.mark.parametrize(
    ("dtype", "stage"),
    [*itertools.product(["bf16"], range(4)), *itertools.product(["fp16"], range(1, 4))],
)
def test_half_precision_on_the_gpu_follows_fp32_on_the_cpu(
    lab: Path, curve: list[float], dtype: str, stage: int
) -> None:
    run_id = f"{dtype}-{stage}"
    train(lab, run_id, f"model.dtype={dtype}", f"zero=stage{stage}")
    assert metrics(lab, run_id) == pytest.approx(curve, rel=2e-2)


@pytest.mark.parametrize("backend", [pytest.param("varlen", marks=needs_varlen), "sdpa", "flash"])
def test_the_backend_asked_for_is_the_one_that_ran(lab: Path, backend: str) -> None:
    if backend == "flash" and flash(head_dim=16) is None:
        pytest.skip("flash-attn is not installed")
    train(lab, backend, "model.dtype=bf16", f"model.attention={backend}")
    assert list(effects(lab, backend)[f"model.attention={backend}"]["calls"]) == [backend]  # type: ignore[call-overload]


@needs_bitsandbytes
def test_qlora_and_the_8_bit_optimizer_train(lab: Path) -> None:
    tiny_model(lab / "wide", hidden=128)
    train(lab, "nf4", f"model.path={lab}/wide", "method=qlora", "optim=adamw8bit")
    assert metrics(lab, "nf4")[-1] < metrics(lab, "nf4")[0]


@needs_bitsandbytes
def test_nf4_unpacked_on_a_side_stream_gives_the_same_bits() -> None:
    """Weights so large that unpacking one outlasts a launch, products so small that they wait."""
    from bitsandbytes.nn import Linear4bit

    from tuneloom.kernels import nf4
    from tuneloom.kernels.lora_linear import linear_of, lora_linears

    torch.manual_seed(0)
    sides = [(4096, 4096), (4096, 14336), (14336, 4096)] * 4
    layers: list[Any] = []
    for depth, out in sides:
        four: Any = Linear4bit(
            depth, out, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16
        )
        weight = torch.randn(out, depth, device="cuda") / depth**0.5
        four.load_state_dict({"weight": weight.bfloat16().cpu()})
        layers.append(four.to("cuda"))
    x = torch.randn(64, 4096, dtype=torch.bfloat16, device="cuda")

    def passes() -> list[torch.Tensor]:
        found = []
        for index in range(20):
            rows = y = x.roll(index, 0).requires_grad_()
            with torch.set_grad_enabled(index % 5 != 4):  # every fifth is a validation
                for layer in layers:
                    (y,) = lora_linears(y, (linear_of(layer),))
            if y.requires_grad:
                y.float().square().sum().backward()
                assert rows.grad is not None
                found.append(rows.grad)
            found.append(y.detach())
        return found

    plain = passes()
    prefetch = nf4.install(torch.nn.ModuleList(layers))
    ahead = passes()
    torch.cuda.synchronize()
    assert all(map(torch.equal, ahead, plain)) and len(ahead) == len(plain) == 36
    assert prefetch.counts["hits"] > 10 * prefetch.counts["misses"]


@needs_bitsandbytes
def test_a_qlora_learns_alike_with_weights_unpacked_ahead(lab: Path) -> None:
    tiny_model(lab / "wide", hidden=128)
    options = (f"model.path={lab}/wide", "method=qlora", "model.kernels=true")
    for ahead in ("false", "true"):
        train(lab, f"nf4-{ahead}", f"method.prefetch={ahead}", "model.attention=eager", *options)
    assert metrics(lab, "nf4-true") == pytest.approx(metrics(lab, "nf4-false"), rel=1e-4)
    assert effects(lab, "nf4-true")["method.prefetch"]["hits"] > 0  # type: ignore[operator]


@pytest.mark.parametrize("kernels", ["false", "true"])
def test_a_base_in_fp8_gives_the_curve_of_bf16(lab: Path, kernels: str) -> None:
    options = ("model.dtype=bf16", "optim.lr=1e-3", f"model.kernels={kernels}")
    train(lab, f"whole-{kernels}", *options)
    train(lab, f"fp8-{kernels}", "model.fp8=true", *options)
    assert metrics(lab, f"fp8-{kernels}") == pytest.approx(
        metrics(lab, f"whole-{kernels}"), rel=1e-2
    )
    assert effects(lab, f"fp8-{kernels}")["model.fp8"]["linears"] == 14


def test_full_weights_train_in_fp8_as_in_bf16(lab: Path) -> None:
    options = ("method=full", "model.dtype=bf16", "optim.lr=1e-3")
    train(lab, "full-bf16", *options)
    train(lab, "full-fp8", "model.fp8=true", *options)
    assert metrics(lab, "full-fp8") == pytest.approx(metrics(lab, "full-bf16"), rel=1e-2)
    assert effects(lab, "full-fp8")["model.fp8"]["linears"] == 14


def test_fp8_rounds_and_multiplies_on_the_gpu_as_on_the_cpu() -> None:
    from tuneloom.kernels import fp8

    torch.manual_seed(0)
    x, w, dy = (torch.randn(shape).bfloat16() for shape in ((300, 1024), (512, 1024), (300, 512)))
    here, there = fp8.hold(w), fp8.hold(w.cuda())
    for mine, theirs in zip(fp8.quantise(x), fp8.quantise(x.cuda()), strict=True):
        assert torch.equal(mine.float(), theirs.cpu().float())
    for op, operand in ((fp8.product, x), (fp8.product_backward, dy)):
        mine, theirs = op(operand, here).float(), op(operand.cuda(), there).cpu().float()
        assert (mine - theirs).norm() <= 1e-2 * mine.norm()


def test_the_fused_ops_give_the_curve_of_the_plain_ones(lab: Path) -> None:
    train(lab, "plain", "model.dtype=bf16")
    train(lab, "fused", "model.dtype=bf16", "model.kernels=true")
    assert metrics(lab, "fused") == pytest.approx(metrics(lab, "plain"), rel=1e-2)


@needs_varlen
@pytest.mark.parametrize("kernels", ["false", "true"])
def test_layers_as_cuda_graphs_give_the_curve_of_plain_ones(lab: Path, kernels: str) -> None:
    options = ("model.dtype=bf16", "batch.documents=16", f"model.kernels={kernels}")
    train(lab, f"ungraphed-{kernels}", *options)
    train(lab, f"graphed-{kernels}", "model.cuda_graphs=true", *options)
    plain, replayed = (metrics(lab, f"{name}-{kernels}") for name in ("ungraphed", "graphed"))
    assert len(replayed) == 20 and replayed == pytest.approx(plain, rel=1e-2)
    found = effects(lab, f"graphed-{kernels}")["model.cuda_graphs"]
    assert (found["layers_captured"], found["replayed_forwards"]) == (2, 4)


@needs_varlen
@pytest.mark.parametrize("kernels", [False, True])
def test_replays_follow_the_layers_own_steps_and_never_wait(
    kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty steps over three packs, one capture; a wait for the GPU inside one is an error."""
    captures: list[int] = []
    make = torch.cuda.make_graphed_callables

    def counted(functions: Any, samples: Any) -> Any:
        captures.append(len(functions))
        return make(functions, samples)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", counted)
    device = torch.device("cuda")
    losses: list[list[float]] = []
    for replays in (False, True):
        network = build(kernels=kernels, backend="varlen", device="cuda")
        if replays:
            graphed.capture(network, pack(()).to(device).model_inputs())
        adapters = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(adapters, lr=1e-3, fused=True)
        found: list[float] = []
        for step in range(20):
            micro = pack(PACKS[step % 3]).to(device)
            torch.cuda.set_sync_debug_mode("error")
            try:
                loss = loss_sum(network, micro)
                loss.backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss))
        losses.append(found)
    assert losses[1] == pytest.approx(losses[0], rel=1e-2) and captures == [3]


@needs_bitsandbytes
def test_an_8b_shape_with_random_weights_takes_steps(lab: Path) -> None:
    base = lab / "llama3-8b"
    tiny_model(base)  # its tokenizer; the weights are drawn, not read
    for file in base.glob("*.safetensors"):
        file.unlink()
    (base / "config.json").write_text(json.dumps(LLAMA3_8B))
    train(
        lab, "8b", f"model.path={base}", "model.init=random", "method=full", "optim=adamw8bit",
        "model.dtype=bf16", "model.checkpointing=on", "steps=3", "train.drill=false",
        "checkpoint.every=0",
    )  # fmt: skip
    assert metrics(lab, "8b", "speed/mfu")[-1] > 0
