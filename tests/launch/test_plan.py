"""Plans: parameter counts and activations against real models, state against real checkpoints."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tuneloom import cli
from tuneloom.config import build, compose
from tuneloom.errors import ConfigError, DataError, RefusedError
from tuneloom.launch import machine
from tuneloom.launch.anatomy import anatomy, saved_activations
from tuneloom.launch.config import JobConfig, training_of
from tuneloom.launch.memory import nf4_bytes, optimizer_bytes, weight_bytes
from tuneloom.launch.plan import (
    Device,
    PlanConfig,
    alternatives,
    changed,
    check,
    failures,
    memory_problems,
    plan,
    ranks_of,
    refusal,
    surely_fits,
)
from tuneloom.launch.traffic import traffic
from tuneloom.launch.workload import Workload, speed, workload
from tuneloom.testing import Gang, small_config
from tuneloom.train import method as methods
from tuneloom.train import runs
from tuneloom.train.config import MethodConfig
from tuneloom.train.model import DTYPES

# Parameters as their model cards and safetensors indexes count them.
PUBLISHED = {
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-0.6B": 596_049_920,
}
DEVICES = {
    "llama3_2_1b_lora": "rtx4090-24",
    "llama3_8b_lora": "h100-80",
    "llama3_8b_lora_128k": "h100-80",
    "llama3_8b_full": "h100-80",
    "llama3_70b_full_64gpu": "h100-80",
    "qwen3_8b_qlora": "rtx4090-24",
}


def job(*overrides: str) -> JobConfig:
    return build(JobConfig, compose("train", list(overrides)))


def local(lab: Path, **dotted: object) -> JobConfig:
    config = small_config(lab, "planned", **dotted)
    return build(JobConfig, config | {"launch": {"kind": "local", "workers": 2}})


def shaped(path: str, *overrides: str) -> JobConfig:
    return job(f"model.path={path}", "data.path=rows.jsonl", *overrides)


@pytest.mark.parametrize("path", PUBLISHED)
def test_parameters_are_counted_exactly_without_weights(path: str) -> None:
    assert anatomy(shaped(path, "method=full")).base == PUBLISHED[path]


def test_lora_parameters_of_an_8b_model_are_the_sum_of_its_pairs() -> None:
    parts = anatomy(shaped("meta-llama/Meta-Llama-3-8B", "method.rank=16"))
    q, kv, o, mlp = 4096 + 4096, 4096 + 1024, 4096 + 4096, 4096 + 14336
    assert parts.trainable == 32 * 16 * (q + 2 * kv + o + 3 * mlp)


def measured(
    lab: Path, kind: str, dtype: str, length: int, prepare: Callable[[Any], object] = lambda _: None
) -> list[int]:
    """Bytes that each decoder layer of a real model really saves, counted here a second time."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_layers import GradientCheckpointingLayer

    from tuneloom.kernels import attention

    network: Any = AutoModelForCausalLM.from_pretrained(lab / "base", dtype=DTYPES[dtype])
    attention.install(network, attention.Choice("sdpa", "test"))
    prepare(network)
    network = methods.apply(network, MethodConfig(kind=kind, rank=8)).to(DTYPES[dtype]).train()
    parameters = {p.data_ptr() for p in network.parameters()}
    alive: dict[int, torch.Tensor] = {}
    sizes: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            alive[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def total() -> int:
        return sum(t.untyped_storage().nbytes() for t in alive.values())

    for layer in (m for m in network.modules() if isinstance(m, GradientCheckpointingLayer)):
        layer.register_forward_pre_hook(lambda *_: sizes.append(-total()))
        layer.register_forward_hook(lambda *_: sizes.append(total()))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        network(input_ids=torch.zeros(1, length, dtype=torch.int64), use_cache=False)
    return [before + after for before, after in zip(sizes[::2], sizes[1::2], strict=True)]


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_forecast_activations_are_what_a_real_model_saves(lab: Path, kind: str, dtype: str) -> None:
    planned = local(
        lab, method__kind=kind, model__dtype=dtype, batch__max_length=64, batch__tokens=256
    )
    forecast = saved_activations(training_of(planned)).per_layer
    assert forecast == pytest.approx(measured(lab, kind, dtype, 256), rel=0.03)


SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_stacked_experts_are_planned_in_every_dtype_with_what_they_save(
    tmp_path: Path, kind: str, dtype: str
) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = Qwen3MoeConfig(**SIZES, **experts, head_dim=16)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    batch = {"batch__max_length": 64, "batch__tokens": 256, "zero__stage": 1}
    planned = local(tmp_path, method__kind=kind, model__dtype=dtype, **batch)
    forecast = saved_activations(training_of(planned)).per_layer
    assert forecast == pytest.approx(measured(tmp_path, kind, dtype, 256), rel=0.03)


def test_what_a_model_keeps_by_its_data_alone_is_said_to_be_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import JetMoeConfig

    JetMoeConfig(**SIZES, intermediate_size=32, num_local_experts=2).save_pretrained(tmp_path)
    saved = saved_activations(training_of(shaped(str(tmp_path))))
    assert sum(saved.per_layer) == 0 < saved.layer_input
    said = capsys.readouterr().err
    assert "what JetMoeForCausalLM keeps for backward is not estimated and not in the sum" in said


@pytest.mark.parametrize(
    "changes", [{"zero__stage": 3}, {"model__fp8": True, "model__dtype": "bf16"}]
)
def test_where_layers_step_off_the_diet_the_plan_keeps_what_their_own_code_keeps(
    lab: Path, changes: dict[str, object]
) -> None:
    from tuneloom.kernels import fp8
    from tuneloom.kernels.patch import patch, unpatch_module

    base = {"method__kind": "full", "model__kernels": True}
    base |= {"batch__max_length": 64, "batch__tokens": 256}
    planned = training_of(local(lab, **(base | changes)))

    def prepare(network: Any) -> None:
        patch(network)
        if planned.model.fp8:
            fp8.hold_linears(network, trained=True)  # which alone keeps the layers off the diet
            return
        for layer in network.model.layers:  # no shard here to do so
            unpatch_module(layer)

    real = measured(lab, "full", planned.model.dtype, 256, prepare)
    assert saved_activations(planned).per_layer == pytest.approx(real, rel=0.03)
    dieted = training_of(local(lab, **base, model__dtype=planned.model.dtype))
    assert saved_activations(dieted).per_layer[1] < 0.8 * real[1]


@pytest.mark.parametrize(("kind", "kib"), [("full", 196.1), ("lora", 180.4)])
def test_an_8b_layer_saves_the_bytes_measured_elsewhere(kind: str, kib: float) -> None:
    config = shaped("meta-llama/Meta-Llama-3-8B", f"method={kind}", "batch.tokens=4096")
    middle = saved_activations(config).per_layer[1]
    assert middle / 4096 / 1024 == pytest.approx(kib, rel=0.03)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_fused_ops_of_the_project_are_planned_with_what_they_save(kind: str) -> None:
    config = shaped("meta-llama/Meta-Llama-3-8B", f"method={kind}", "model.kernels=true")
    middle = saved_activations(config).per_layer[1]
    assert middle / 8192 / 1024 == pytest.approx(92.1, rel=0.03)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_peak_of_a_real_step_is_the_forecast_of_activations_and_head(
    tmp_path: Path, dtype: str
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tuneloom.kernels import attention

    shape = {
        "vocab_size": 16384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape | {"model_type": "llama"}))
    network = LlamaForCausalLM(LlamaConfig(**shape)).to(DTYPES[dtype]).train()
    attention.install(network, attention.Choice("sdpa", "test"))
    ids = torch.randint(0, 16384, (1, 512))

    def loss() -> torch.Tensor:  # as train/loss.py: the logits' name ends before backward
        logits = network(input_ids=ids, use_cache=False).logits[0]
        return torch.nn.functional.cross_entropy(logits.float(), ids[0], reduction="sum")

    config = shaped(str(tmp_path), "method=full", f"model.dtype={dtype}", "batch.max_length=512",
                    "batch.tokens=512", "launch.gpus_per_worker=0")  # fmt: skip
    memory = plan(config).memory
    assert memory.activations + memory.loss_head == pytest.approx(peak_bytes(loss), rel=0.05)


@pytest.mark.parametrize(("dtype", "checkpointing"), [("fp32", "off"), ("bf16", "on")])
def test_the_peak_of_a_step_in_tiles_is_the_forecast(
    tmp_path: Path, dtype: str, checkpointing: str
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tuneloom.kernels import attention
    from tuneloom.train import model, tiles
    from tuneloom.train.batches import collate
    from tuneloom.train.loss import loss_sum

    shape = {
        "vocab_size": 8192, "hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape | {"model_type": "llama"}))
    config = shaped(str(tmp_path), "method=full", f"model.dtype={dtype}", "batch.max_length=2048",
                    "batch.tokens=2048", "launch.gpus_per_worker=0", "model.tile_tokens=256",
                    f"model.checkpointing={checkpointing}")  # fmt: skip
    network = LlamaForCausalLM(LlamaConfig(**shape)).to(DTYPES[dtype]).train()
    attention.install(network, attention.Choice("sdpa", "test"))
    assert tiles.install(network, config.model, config.batch) == 4
    model.checkpoint_activations(network, config.model)
    ids = np.arange(2048, dtype=np.int32)
    micro = collate([0], [(ids, ids >= 0)], packing=True)
    memory = plan(config).memory
    forecast = memory.activations + memory.loss_head
    assert forecast == pytest.approx(peak_bytes(lambda: loss_sum(network, micro)), rel=0.1)
    whole = plan(changed(config, {"model.tile_tokens": None})).memory
    assert forecast < 0.5 * (whole.activations + whole.loss_head)


@pytest.mark.parametrize(
    ("dtype", "width"), [("fp32", 512), ("fp32", 1024), ("bf16", 1024), ("bf16", 256)]
)
def test_the_peak_of_a_step_with_kernels_is_planned_without_logits(
    tmp_path: Path, dtype: str, width: int
) -> None:
    """Narrow MLPs peak at the loss head, wide ones in backward of the last MLP."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tuneloom.kernels import attention
    from tuneloom.kernels.patch import patch
    from tuneloom.train.batches import collate
    from tuneloom.train.loss import loss_sum

    shape = {
        "vocab_size": 8192, "hidden_size": 128, "intermediate_size": width, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape | {"model_type": "llama"}))
    config = shaped(str(tmp_path), "method=full", f"model.dtype={dtype}", "batch.max_length=2048",
                    "batch.packing=false", "batch.sequences=1", "launch.gpus_per_worker=0",
                    "model.kernels=true")  # fmt: skip
    network = LlamaForCausalLM(LlamaConfig(**shape)).to(DTYPES[dtype]).train()
    attention.install(network, attention.Choice("sdpa", "test"))
    patch(network)
    ids = np.arange(2048, dtype=np.int32)
    micro = collate([0], [(ids, ids >= 0)], packing=False)
    memory = plan(config).memory
    forecast = memory.activations + memory.loss_head
    assert forecast == pytest.approx(peak_bytes(lambda: loss_sum(network, micro)), rel=0.03)
    logits = plan(changed(config, {"model.kernels": False})).memory.loss_head
    assert memory.loss_head < logits / 8


def test_ranks_that_share_packs_hold_a_part_and_send_the_rest() -> None:
    path = "meta-llama/Meta-Llama-3-8B"
    ways = {
        by: shaped(path, "batch.tokens=8192", "launch.workers=8", "model.checkpointing=on",
                   f"batch.sequence_parallel={by}", "model.checkpoint_offload=true")
        for by in (1, 4)
    }  # fmt: skip
    alone, shared = (plan(ways[by], PlanConfig(gpu="h100-80")) for by in (1, 4))
    for part in ("activations", "loss_head", "host"):
        mine = getattr(shared.memory, part)
        assert mine == pytest.approx(getattr(alone.memory, part) / 4, rel=1e-6)
    assert alone.memory.host == 32 * 8192 * 4096 * 2  # layers, tokens, hidden, bf16
    # q, k, v, out of 32 + 8 heads of 128 in bf16; 3/4 of it, forward twice and backward
    assert shared.traffic.this - alone.traffic.this == (
        32 * 2048 * 2 * (32 + 8) * 128 * 2 * 3 // 4 * 3
    )
    assert shared.workload.tokens_per_step == alone.workload.tokens_per_step // 4
    refused = plan(shaped(path, "launch.workers=24", "batch.sequence_parallel=12"))
    assert any("12 ranks cannot share 32 attention heads" in told for told in refused.problems)


def peak_bytes(loss: Any) -> int:
    """Most bytes that tensors on the processor took at once in a forward and backward pass."""
    from torch.profiler import ProfilerActivity, profile

    loss().backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss().backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_recomputation_keeps_an_input_a_layer_and_one_layer_whole() -> None:
    sizes = {
        mode: plan_of("meta-llama/Meta-Llama-3-8B", f"model.checkpointing={mode}").memory
        for mode in ("off", "selective", "on")
    }  # fmt: skip
    layer, inputs = sizes["off"].activations / 32, 8192 * 4096 * 2
    assert sizes["on"].activations == pytest.approx(32 * inputs + layer, rel=0.05)
    assert sizes["selective"].activations == pytest.approx(16 * (layer + inputs) + layer, rel=0.05)


def plan_of(path: str, *overrides: str, gpu: str = "h200-141") -> Any:
    return plan(shaped(path, *overrides), PlanConfig(gpu=gpu))


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_forecast_optimizer_state_is_what_a_checkpoint_holds(
    lab: Path, two: Gang, stage: int, kind: str
) -> None:
    run_id = f"state-{kind}-{stage}"
    two.fit(small_config(lab, run_id, steps=2, method__kind=kind, zero__stage=stage))
    files = list((lab / "runs" / run_id / "checkpoints").rglob("*_optim_states.pt"))
    assert len(files) == 2
    held = sum(tensor_bytes(torch.load(file, weights_only=False)) for file in files)
    config = training_of(local(lab, method__kind=kind, zero__stage=stage))
    assert optimizer_bytes(config, anatomy(config)) == pytest.approx(held, rel=0.03)


def tensor_bytes(state: Any) -> int:
    """Bytes of the fp32 tensors in a nested state, each storage once."""
    found: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.numel() > 1:
            found[value.untyped_storage().data_ptr()] = value.numel() * value.element_size()
        elif isinstance(value, dict):
            for inner in value.values():
                walk(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                walk(inner)

    walk(state)
    return sum(found.values())


@pytest.mark.parametrize("double", [True, False])
def test_nf4_bytes_are_those_bitsandbytes_takes(double: bool) -> None:
    import bitsandbytes

    weight = torch.randn(256, 384)
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=double
    )
    held = [packed, state.absmax, state.code]
    if double:
        held += [state.state2.absmax, state.state2.code, state.offset]
    size = sum(t.numel() * t.element_size() for t in held)
    assert (
        nf4_bytes((weight.numel(),), MethodConfig(kind="qlora", double_quantisation=double)) == size
    )


def test_nf4_unpacked_ahead_takes_the_largest_linear_twice() -> None:
    def held(*overrides: str) -> int:
        keys = ("method=qlora", "model.kernels=true", *overrides)
        return plan_of("meta-llama/Meta-Llama-3-8B", *keys).memory.device

    assert held("method.prefetch=true") - held() == 2 * 2 * 4096 * 14336  # 117 MB each, in bf16


def test_captured_layers_hold_three_hidden_states_and_their_gradients_more() -> None:
    def held(*overrides: str) -> int:
        keys = ("batch.tokens=4096", "batch.max_length=4096", *overrides)
        return plan_of("meta-llama/Meta-Llama-3-8B", *keys).memory.activations

    adapters = 41_943_040  # r=16 on all linears
    more = held("model.cuda_graphs=true") - held()
    assert more == 3 * 32 * 4096 * 4096 * 2 + 2 * adapters


def test_an_8b_base_in_fp8_takes_a_byte_a_weight_of_its_linears() -> None:
    def gigabytes(*overrides: str) -> float:
        config = shaped("meta-llama/Meta-Llama-3-8B", *overrides)
        return weight_bytes(config, anatomy(config)) / 1e9

    assert gigabytes() == pytest.approx(16.14, abs=0.01)
    assert gigabytes("model.fp8=true") == pytest.approx(9.16, abs=0.01)  # embeddings, head: bf16


def test_an_8b_step_moves_a_fifth_of_a_gigabyte_replicated_and_26_under_zero_3() -> None:
    def moved(*overrides: str) -> float:
        config = shaped("meta-llama/Meta-Llama-3-8B", *overrides)
        return traffic(config, anatomy(config), ranks=8).this / 1e9

    adapters, weights = 41_943_040, 8_030_261_248  # bf16, 7 of 8 ranks' parts cross a ring
    assert moved("zero=stage2") == pytest.approx(2 * 3 * adapters * 7 / 8 / 1e9)
    assert moved("zero=stage3") == pytest.approx(26.6, abs=0.05)
    assert moved("zero=stage2", "method=full") == pytest.approx(2 * 3 * weights * 7 / 8 / 1e9)
    assert moved("zero=stage3", "method=full") == pytest.approx(40.4, abs=0.05)
    often = ("batch.accumulation=4", "method=full")
    assert moved("zero=stage1", *often) == pytest.approx(moved("zero=stage2", *often) / 3)


def test_recomputed_experts_are_gathered_again(tmp_path: Path) -> None:
    """They are no linears, but one parameter a layer and projection."""
    shape = {
        "model_type": "mixtral", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "num_local_experts": 4,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape), encoding="utf-8")

    def moved(checkpointing: str) -> int:
        keys = ("zero=stage3", f"model.checkpointing={checkpointing}")
        config = shaped(str(tmp_path), *keys)
        return traffic(config, anatomy(config), ranks=8).this

    attention, experts = 4 * 32 * 32, 4 * 3 * 32 * 48
    assert moved("on") - moved("off") == 2 * 2 * (attention + experts) * 7 // 8


def test_a_head_that_is_trained_whole_is_no_linear_of_a_qlora_base() -> None:
    def linears(*overrides: str) -> tuple[int, ...]:
        path = "meta-llama/Llama-3.2-1B"
        return anatomy(shaped(path, "method=qlora", *overrides)).linears

    assert linears("method.extra_modules=[lm_head]") == linears()


def test_zero_3_under_lora_is_advised_against_where_the_frozen_base_fits() -> None:
    wide = ["zero=stage3", "launch.workers=8"]
    (line,) = plan_of("meta-llama/Meta-Llama-3-8B", *wide, "batch.tokens=4096").advice
    assert "zero=stage2" in line and "0.22 GB" in line and "26.6 GB" in line
    assert plan_of("meta-llama/Meta-Llama-3-70B", *wide, gpu="h100-80").advice == []


@pytest.mark.parametrize(("experiment", "gpu"), DEVICES.items())
def test_a_shipped_experiment_fits_on_the_gpu_it_names(experiment: str, gpu: str) -> None:
    config = job(f"experiment={experiment}")
    assert plan(config, PlanConfig(gpu=gpu)).fits


def test_a_run_that_cannot_fit_is_refused_with_changes_that_fit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = ["model.path=meta-llama/Meta-Llama-3-8B", "data.path=x.jsonl", "method=full",
                 "batch.tokens=2048", "launch.workers=8", "plan.gpu=a100-40"]  # fmt: skip
    assert cli.main(["plan", *overrides]) == 4
    message = capsys.readouterr().err
    assert "a100-40 has 40.0 GiB" in message
    way = message.split("what would fit: ")[1].split(", or ")[0].split(" (")[0]
    fixed = [o for o in overrides if o.split("=")[0] not in way] + way.split()
    assert cli.main(["plan", *fixed]) == 0


def test_every_way_a_refusal_names_is_a_valid_job_that_fits() -> None:
    from tuneloom.launch.plan import device_of, fitting

    config = shaped("meta-llama/Meta-Llama-3-8B", "method=full", "launch.workers=4")
    device = device_of(config, PlanConfig(gpu="l4-24"))
    ways = fitting(config, device)
    assert ways
    for way in ways:
        other = changed(config, way.changes)
        assert other is not None
        assert memory_problems(other, device, plan(other, PlanConfig(gpu="l4-24")).memory) == []


def test_offload_is_refused_where_the_host_is_too_small() -> None:
    config = shaped("meta-llama/Meta-Llama-3-8B", "method=full", "zero.offload=cpu")
    small = plan(config, PlanConfig(gpu="h200-141", host_memory_gib=32))
    assert not small.fits and "host memory" in small.problems[0]
    assert plan(config, PlanConfig(gpu="h200-141", host_memory_gib=256)).fits


def test_copies_of_asynchronous_checkpoints_count_as_host_memory_of_a_node() -> None:
    shared = ("method=full", "zero=stage2", "launch.workers=4", "launch.gpus_per_worker=1")
    config = shaped("meta-llama/Meta-Llama-3-8B", *shared, "checkpoint.asynchronous=true")
    large = plan(config, PlanConfig(gpu="h200-141", host_memory_gib=256))
    assert large.fits and large.memory.host == large.checkpoint // 4
    remembered = shaped("meta-llama/Meta-Llama-3-8B", *shared, "checkpoint.memory_every=1")
    assert plan(remembered, PlanConfig(gpu="h200-141")).memory.host == 3 * (large.checkpoint // 4)
    small = plan(config, PlanConfig(gpu="h200-141", host_memory_gib=64))
    assert small.problems[0].startswith("checkpoint.asynchronous needs 104.7 GiB of host memory")
    assert "checkpoint.asynchronous=false" in refusal(config, small)


def test_a_job_that_fits_this_machine_passes_and_a_huge_one_is_refused(lab: Path) -> None:
    assert check(local(lab)) is None and plan(local(lab)).fits
    huge = shaped("meta-llama/Meta-Llama-3-70B", "method=full", "launch.gpus_per_worker=0")
    with pytest.raises(RefusedError, match="a rank needs"):
        check(huge)


def test_eager_scores_of_a_pack_are_counted_for_documents_padded_to_twice_their_tokens(
    lab: Path,
) -> None:
    def layer(**changes: object) -> int:
        job = local(lab, batch__max_length=128, batch__tokens=512, **changes)
        return saved_activations(job).per_layer[0]

    fused, packed = layer(), layer(model__attention="eager")
    rows = layer(model__attention="eager", batch__packing=False, batch__sequences=4)
    assert packed - fused == 2 * (rows - fused) > 0


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("attention", ["auto", "eager"])
def test_the_bound_that_spares_a_plan_is_above_the_plan(
    lab: Path, kind: str, attention: str
) -> None:
    config = local(lab, method__kind=kind, model__attention=attention)
    needed = plan(config).memory.device
    sizes = [needed * factor // 10 for factor in (10, 15, 19)]
    tight = [Device("test", size, cuda=False, host=size, here=True) for size in sizes]
    assert not any(surely_fits(config, device) for device in tight)


def test_fp16_is_refused_where_there_is_no_gpu(lab: Path) -> None:
    with pytest.raises(RefusedError, match=r"model\.dtype: fp16 needs a GPU"):
        check(local(lab, model__dtype="fp16", zero__stage=1))


def test_under_ray_the_drivers_own_machine_refuses_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head may have no GPU, and little memory; what the config alone decides is still checked."""
    large = ("meta-llama/Meta-Llama-3-70B", "launch=ray", "zero=stage2", "zero.offload=cpu")
    with monkeypatch.context() as inside:
        inside.setenv("SLURM_JOB_ID", "7")  # there the first node speaks for all
        with pytest.raises(RefusedError, match="fp16"):
            check(shaped(*large, "model.dtype=fp16"))
    found = check(shaped(*large, "model.dtype=fp16"))
    assert found is not None and found.fits
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "is not checked here" in said and "preflight" in said
    with pytest.raises(RefusedError, match="3 ranks cannot share 64 attention heads"):
        check(shaped(*large, "launch.workers=3", "batch.sequence_parallel=3"))
    with pytest.raises(RefusedError, match=r"^run\.root: 100000 checkpoints"):
        check(shaped(*large, "method=full", "checkpoint.keep=100000"))


def test_planned_steps_are_the_steps_a_run_takes(lab: Path, two: Gang) -> None:
    settings: dict[str, object] = {"steps": None, "epochs": 2.0, "batch__tokens": 256}
    two.fit(small_config(lab, "whole", **settings))
    lines = (lab / "runs" / "whole" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    taken = max(row["step"] for row in rows)
    planned = workload(training_of(local(lab, **settings)), ranks=2)
    assert planned.rows == 48
    assert planned.steps == pytest.approx(taken, abs=2)


def test_unpacked_steps_count_sequences(lab: Path) -> None:
    padded = local(lab, steps=None, epochs=3.0, batch__packing=False, batch__sequences=4)
    assert workload(training_of(padded), ranks=2).steps == 48 * 3 // (4 * 2)


def test_packed_steps_count_documents_where_those_fill_a_pack_first(lab: Path) -> None:
    def work(**dotted: object) -> Workload:
        config = local(lab, steps=None, epochs=3.0, batch__tokens=4096, **dotted)
        return workload(training_of(config), ranks=2)

    few = work(batch__documents=4)
    assert few.steps == 48 * 3 // (4 * 2) and few.tokens_per_row is not None
    assert few.tokens_per_step == round(few.tokens_per_row * 4 * 2)
    many = work(batch__documents=1000)
    assert (many.steps, many.tokens_per_step) == (work().steps, round(4096 * 0.99 * 2))
    graphs = work(
        model__cuda_graphs=True, model__dtype="bf16", batch__max_length=16,
        batch__over_length="truncate",
    )  # fmt: skip
    assert graphs.tokens_per_row is not None  # and of a pack, a place for every 32 tokens
    assert graphs.tokens_per_step == round(4096 // 32 * graphs.tokens_per_row * 2)


def test_rows_that_are_all_too_long_are_a_data_error(lab: Path) -> None:
    with pytest.raises(DataError, match=r"batch\.max_length"):
        workload(training_of(local(lab, batch__max_length=2)), ranks=1)


def test_time_is_unknown_until_a_speed_is_given_or_measured(lab: Path, tmp_path: Path) -> None:
    config = local(lab, run__root=str(tmp_path))
    assert plan(config).seconds is None
    given = plan(config, PlanConfig(tokens_per_second=1000.0))
    assert given.workload.tokens is not None
    assert given.seconds == given.workload.tokens / 1000

    earlier_run(tmp_path, config, world_size=2, device="cpu")
    found = plan(config).speed
    assert found is not None and (found.tokens_per_second, found.source) == (100, "run earlier")


def earlier_run(root: Path, config: JobConfig, *, world_size: int, device: str) -> Path:
    """A run with this config that took three steps at 100 tokens a second in the middle."""
    folder = root / "earlier"
    folder.mkdir()
    part = {"digest": "", "path": ""}
    training = training_of(config)
    record = {
        "config_digest": runs.digest(training), "config": runs.plain(training), "attempts": [],
        "base": part, "dataset": part, "world_size": world_size, "device": device,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    rows = [{"step": n, "speed/tokens_per_second": rate} for n, rate in enumerate((90, 100, 110))]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("ranks", "measured", "planned", "counts"),
    [
        (2, "NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3", True),
        (2, "NVIDIA H100 80GB HBM3", "h100-80", True),
        (2, "NVIDIA H200", "h200-141", True),
        (2, "NVIDIA GeForce RTX 4090", "rtx4090-24", True),
        (1, "NVIDIA H100 80GB HBM3", "h100-80", False),
        (2, "NVIDIA A100-SXM4-40GB", "a100-80", False),
        (2, "NVIDIA L40S", "l4-24", False),
        (2, "cpu", "h100-80", False),
        (2, "NVIDIA H100 80GB HBM3", "CPU", False),
    ],
)
def test_only_a_run_on_as_many_devices_of_the_kind_gives_a_plan_its_speed(
    lab: Path, tmp_path: Path, ranks: int, measured: str, planned: str, counts: bool
) -> None:
    config = local(lab, run__root=str(tmp_path))
    earlier_run(tmp_path, config, world_size=ranks, device=measured)
    found = speed(training_of(config), given=None, ranks=2, device=planned)
    assert (found is not None) is counts


@pytest.mark.parametrize(
    "other",
    [{"zero__stage": 1}, {"zero__offload": "cpu", "zero__stage": 2}, {"batch__accumulation": 7},
     {"batch__sequence_parallel": 2}, {"debug": True}],
)  # fmt: skip
def test_a_run_that_steps_otherwise_gives_a_plan_no_speed(
    lab: Path, tmp_path: Path, other: dict[str, Any]
) -> None:
    """Its loss, and so its digest, are the same."""
    config = local(lab, run__root=str(tmp_path))
    earlier_run(tmp_path, local(lab, run__root=str(tmp_path), **other), world_size=2, device="cpu")
    assert speed(training_of(config), given=None, ranks=2, device="cpu") is None


@pytest.mark.parametrize("storage", [20.0, 2.0])
def test_what_1024_gpus_lose_by_failures_is_what_the_documentation_says(storage: float) -> None:
    text = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text(encoding="utf-8")
    size = float(re.findall(r"([\d.]+) GiB a checkpoint", text)[0]) * 2**30
    two, ten = (
        failures(round(size), 1024, PlanConfig(storage_gb_s=storage, restart_seconds=seconds))
        for seconds in (120.0, 600.0)
    )
    assert two and ten
    assert f"interrupted every {two.every_hours:.0f} hours" in text
    (row,) = re.findall(rf"^\| {storage:g} GB/s .*$", text, re.MULTILINE)
    assert row.split(" | ")[1:3] == [
        f"{two.save_seconds:.0f} s", f"{two.interval_seconds / 60:.0f} min"
    ]  # fmt: skip
    assert re.findall(r"[\d.]+ %", row) == [f"{100 * one.goodput:.1f} %" for one in (two, ten)]


def test_a_plan_says_what_failures_cost_where_it_knows_the_storage(
    lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"model.path={lab}/base", f"data.path={lab}/rows.jsonl", "plan.gpu=h100-80"]
    assert cli.main(["plan", *words]) == 0
    assert "failures" not in capsys.readouterr().out
    assert cli.main(["plan", *words, "plan.storage_gb_s=1e-3"]) == 0
    assert "with restarts of 120 s" in capsys.readouterr().out


def test_damaged_runs_beside_this_one_stop_no_plan(lab: Path, tmp_path: Path) -> None:
    config = local(lab, run__root=str(tmp_path))
    folder = earlier_run(tmp_path, config, world_size=2, device="cpu")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "speed/tok\xff\nnull\n[1]\n{"step": 5, "speed')
    for name, content in {"half": b'{"config_dig', "bytes": b"\xff\xfe", "list": b"[]"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_bytes(content)
    found = plan(config).speed
    assert found is not None and found.tokens_per_second == 100


def test_checkpoints_of_the_run_itself_count_as_room_for_those_to_come(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is queued again finds two checkpoints of its own, and room for one."""
    config = local(lab, run__root=str(tmp_path), checkpoint__keep=2)
    size = plan(config).checkpoint
    monkeypatch.setattr(machine, "free_disk", lambda _: size)
    with pytest.raises(RefusedError, match=r"^run\.root: 2 checkpoints and the one being written"):
        check(config)
    for step in ("step-000010", "step-000020"):
        shard = tmp_path / "planned/checkpoints" / step / "engine/shard.pt"
        shard.parent.mkdir(parents=True)
        shard.write_bytes(bytes(size))
    found = check(config)
    assert found is not None and found.fits
    monkeypatch.setattr(machine, "free_disk", lambda _: size - 1)
    with pytest.raises(RefusedError, match=r"free beside the .* of this run's own; lower"):
        check(config)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_disk_holds_the_best_validations_weights_too(
    lab: Path, tmp_path: Path, two: Gang, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Twice: while better ones are written the ones before are there. Against those of a run."""
    patient = {"run__id": f"best-{method}", "method__kind": method, "train__patience": 2,
               "train__validate_every": 2, "steps": 4,
               "data__validation": str(lab / "validation.jsonl")}  # fmt: skip
    config = local(lab, run__root=str(tmp_path), checkpoint__keep=2, **patient)
    found = plan(config)
    assert found.checkpoints == 3 * found.checkpoint + found.best
    assert plan(local(lab, **patient | {"train__patience": 0})).best == 0
    settings = small_config(lab, f"best-{method}", **patient)
    two.fit(settings)
    (best,) = (lab / f"runs/best-{method}").glob("best-step-*")
    (file,) = best.glob("*.safetensors")
    assert found.best == 2 * sum(tensor.nbytes for tensor in load_file(file).values())
    monkeypatch.setattr(machine, "free_disk", lambda _: found.checkpoints - 1)
    with pytest.raises(RefusedError, match="with the best validation's weights, take"):
        check(config)


def test_a_plan_is_json_and_writes_nothing(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [f"model.path={lab}/base", f"data.path={lab}/rows.jsonl", "model.dtype=fp32",
                 "batch.max_length=128", "launch.workers=2", "json=true"]  # fmt: skip
    assert cli.main(["plan", *arguments]) == 0
    answer = json.loads(capsys.readouterr().out)
    parts = (
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "loss_head",
        "temporary",
        "context",
    )
    assert sum(answer["memory"][part] for part in parts) == answer["memory"]["device"]
    assert answer["fits"] and answer["workload"]["rows"] == 48
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_model_without_network_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "model.path=Qwen/Qwen3-8C", "data.path=x.jsonl"]) == 2
    assert "did you mean 'Qwen/Qwen3-8B'" in capsys.readouterr().err


def test_inline_is_one_rank_whatever_the_workers_say() -> None:
    config = shaped("Qwen/Qwen3-0.6B", "launch=inline", "launch.workers=4")
    assert ranks_of(config) == 1


def test_more_ranks_than_gpus_here_are_a_problem_of_the_plan(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [machine.Gpu("H100", 80 * machine.GIB, "1")])
    assert "2 ranks need as many GPUs, this machine has 1" in plan(local(lab)).problems[0]
    assert plan(local(lab), PlanConfig(gpu="h100-80")).fits


def test_a_plan_refuses_what_a_run_would(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = [f"model.path={lab}/base", f"data.path={lab}/rows.jsonl"]
    assert cli.main(["plan", *named, "optim.muon_lr=0.1"]) == 2
    assert "optim.muon_lr" in capsys.readouterr().err


def test_a_rate_of_all_weights_is_given_up_with_them() -> None:
    tight = job("experiment=llama3_8b_full", "optim.lr=5e-6", "launch.workers=1", "zero=stage0")
    ways = [way for way in alternatives(tight) if way.get("method") == "lora"]
    assert ways and all(way["optim.lr"] == "null" for way in ways)
    found = changed(tight, ways[0])
    assert found is not None and found.optim.lr == 2e-4


@pytest.mark.parametrize(
    ("text", "said"), [('{"hidden_size": 4', "not JSON"), ('{"hidden_size": 4}', "no model_type")]
)
def test_a_torn_config_of_a_model_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=f"config.json: .*{said}"):
        anatomy(training_of(shaped(str(tmp_path))))


def test_a_nested_config_that_leaves_defaults_out_is_planned_in_full(
    lab: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    content = {"model_type": "gemma3", "text_config": {"hidden_size": 64}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    host = Device("CPU", 2**40, cuda=False, host=None, here=True)
    assert not surely_fits(shaped(str(tmp_path)), host)


def test_the_shape_of_a_hub_model_is_that_of_its_revision(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def fetch(path: str, name: str, *, revision: str | None) -> str:
        asked.append(revision)
        return str(lab / "base" / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    anatomy(training_of(shaped("some-org/some-model", "model.revision=abc")))
    assert asked == ["abc"]
