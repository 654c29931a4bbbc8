"""Layers as CUDA graphs train as layers do, on packs of one shape; what a CPU can show of it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train import cpu_graphs
from tests.train.cpu_graphs import PACKS, WAYS, build, pack
from tuneloom.errors import ConfigError, RefusedError
from tuneloom.kernels import attention
from tuneloom.testing import Gang, cut_back, metrics, small_config, went_on
from tuneloom.train import graphed
from tuneloom.train.batches import Frame, MicroBatch
from tuneloom.train.config import ModelConfig
from tuneloom.train.loss import loss_sum


@pytest.fixture(scope="module")
def graphed_two() -> Iterator[Gang]:
    gang = Gang(2, setup=cpu_graphs.install)
    yield gang
    gang.close()


def evidence(lab: Path, run_id: str) -> dict[str, Any]:
    effects = json.loads((lab / "runs" / run_id / "effects.json").read_text())
    (receipt,) = [r for r in effects["receipts"] if r["option"] == "model.cuda_graphs"]
    assert receipt["acted"]
    found: dict[str, Any] = receipt["evidence"]
    return found


def adapter(lab: Path, run_id: str) -> dict[str, torch.Tensor]:
    return load_file(lab / "runs" / run_id / "weights" / "adapter_model.safetensors")


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_graphed_layers_give_the_curve_and_weights_of_plain_ones(
    lab: Path, two: Gang, graphed_two: Gang, stage: int, accumulation: int
) -> None:
    settings: dict[str, Any] = {"zero__stage": stage, "batch__accumulation": accumulation,
                                "batch__documents": 16}  # fmt: skip
    runs = [f"{name}-{stage}-{accumulation}" for name in ("ungraphed", "graphed")]
    two.fit(small_config(lab, runs[0], **settings))
    graphed_two.fit(small_config(lab, runs[1], model__cuda_graphs=True, **settings))
    plain, replayed = (metrics(lab, run) for run in runs)
    assert replayed == pytest.approx(plain, rel=1e-6)
    before, after = (adapter(lab, run) for run in runs)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-4, atol=2e-5)
    found = evidence(lab, runs[1])
    assert found["layers_captured"] == 2 and found["replayed_forwards"] == 2 * 2 * accumulation


def gradients(network: Any, micro: MicroBatch) -> list[torch.Tensor]:
    """The loss and every gradient of one micro-batch."""
    network.zero_grad()
    loss = loss_sum(network, micro)
    loss.backward()
    trained = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    return [loss.detach(), *trained]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_graphs.install(monkeypatch.setattr)
    cpu_graphs.CAPTURES.clear()


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("method", "kernels"), WAYS)
def test_replays_give_every_bit_of_the_layers_own_loss_and_gradients(
    method: str, kernels: bool
) -> None:
    plain, replayed = (build(method, kernels=kernels) for _ in range(2))
    graphed.SEEN.clear()
    graphs = graphed.capture(replayed, pack(()).model_inputs())
    for lengths in PACKS:
        for mine, theirs in zip(
            gradients(replayed, pack(lengths)), gradients(plain, pack(lengths)), strict=True
        ):
            assert torch.equal(mine, theirs)
    assert cpu_graphs.CAPTURES == [3] and len(graphs.captured) == 3
    assert graphed.SEEN["replays"] == 3 * len(PACKS)


@pytest.mark.usefixtures("fake")
def test_summed_micro_batches_do_not_share_a_gradients_memory() -> None:
    plain, replayed = (build() for _ in range(2))
    graphed.capture(replayed, pack(()).model_inputs(), accumulation=2)
    for network in (plain, replayed):
        for lengths in PACKS[:3]:
            loss_sum(network, pack(lengths)).backward()
    for mine, theirs in zip(replayed.parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.usefixtures("fake")
def test_weights_that_an_optimizer_moves_are_those_of_the_next_replay() -> None:
    plain, replayed = (build() for _ in range(2))
    graphed.capture(replayed, pack(()).model_inputs())
    for network in (plain, replayed):
        with torch.no_grad():
            for index, parameter in enumerate(network.parameters()):
                if parameter.requires_grad and index % 2:
                    parameter.mul_(1.5)  # in place
                elif parameter.requires_grad:
                    parameter.data = parameter.data * 1.5  # to another place
    mine, theirs = gradients(replayed, pack(PACKS[0])), gradients(plain, pack(PACKS[0]))
    assert all(map(torch.equal, mine, theirs))


@pytest.mark.usefixtures("fake")
def test_only_training_replays() -> None:
    network = build()
    graphed.capture(network, pack(()).model_inputs())
    graphed.SEEN.clear()
    with torch.no_grad():
        loss_sum(network, pack((5, 6), frame=None))
    network.eval()
    loss_sum(network, pack((5, 6), frame=None)).backward()
    assert not graphed.SEEN
    loss_sum(network.train(), pack((5, 6)))
    assert graphed.SEEN["replays"] == 3


@pytest.mark.usefixtures("fake")
def test_a_replay_counts_the_calls_that_its_capture_made() -> None:
    network = build(kernels=True)
    for counter in graphed.COUNTERS:
        counter.clear()
    graphs = graphed.capture(network, pack(()).model_inputs())
    rehearsed = attention.CALLS["sdpa"]
    loss_sum(network, pack(PACKS[0]))
    assert attention.CALLS["sdpa"] == rehearsed + len(graphs.captured)
    assert graphs.captured[0].counts[1]["activation_diet"] == 1


@pytest.mark.usefixtures("fake")
def test_a_pack_that_no_graph_fits_is_an_error_and_not_run_uncaptured() -> None:
    network = build()
    graphs = graphed.capture(network, pack(()).model_inputs())
    with pytest.raises(AssertionError, match="was captured"):
        loss_sum(network, pack(PACKS[0], frame=None))
    wider = Frame(tokens=64, max_length=64, documents=7)  # as many tokens and places
    with pytest.raises(AssertionError, match="64 where 32 was captured"):
        loss_sum(network, pack(PACKS[0], frame=wider))
    hidden = graphs.captured[1].hidden[0]
    with pytest.raises(AssertionError, match="layer 1 runs where 0 was captured"):
        graphs._next = 0
        graphs.captured[1].layer(hidden)


def test_padding_is_counted_carries_no_label_and_changes_no_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_by_document", cpu_graphs.dense)
    tight, framed = pack(PACKS[0], frame=None), pack(PACKS[0])
    assert framed.cu_seqlens is not None and framed.max_length == 32
    assert framed.cu_seqlens.tolist() == [0, 20, 29, 32, 64, 64, 64, 64, 64]
    assert (framed.tokens, framed.padded, tight.padded) == (32, 32, 0)
    assert framed.target_tokens == tight.target_tokens == int((framed.labels != -100).sum())
    network = build()
    for mine, theirs in zip(gradients(network, framed), gradients(network, tight), strict=True):
        torch.testing.assert_close(mine, theirs)


# refusals that need a model


def refused(network: Any, device: str = "cuda", **model: Any) -> str:
    config = ModelConfig(path="base", **{"dtype": "fp32", **model})
    with pytest.raises((ConfigError, RefusedError)) as caught:
        graphed.refuse(network, config, torch.device(device))
    message = str(caught.value)
    assert message.startswith("model.cuda_graphs: ") and "model.cuda_graphs=false" in message
    return message


def test_a_device_without_cuda_is_refused() -> None:
    assert "need an NVIDIA GPU, this is cpu" in refused(build(), "cpu")


def test_attention_that_resolves_to_variable_shapes_is_refused() -> None:
    assert "model.attention=auto is sdpa here" in refused(build())


@pytest.mark.usefixtures("fake")
def test_models_whose_layers_cannot_be_captured_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import transformers

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61}  # fmt: skip
    experts = transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape))
    assert "routes tokens to experts" in refused(experts)
    dropping = transformers.PhiForCausalLM(transformers.PhiConfig(**shape, resid_pdrop=0.1))
    assert "drop activations out" in refused(dropping)
    graphed.refuse(build(), ModelConfig(path="base", dtype="fp32"), torch.device("cpu"))


def test_a_run_without_cuda_ends_before_its_first_step(lab: Path, one: Gang) -> None:
    with pytest.raises(RefusedError, match=r"model\.cuda_graphs: CUDA graphs need an NVIDIA GPU"):
        one.fit(small_config(lab, "no-cuda", model__cuda_graphs=True))


def test_a_resumed_run_captures_again_and_goes_on_exactly(lab: Path, graphed_two: Gang) -> None:
    config = small_config(lab, "graphs-resumed", model__cuda_graphs=True, zero__stage=2,
                          checkpoint__every=3, checkpoint__keep=9)  # fmt: skip
    graphed_two.fit(config)
    whole, weights = metrics(lab, "graphs-resumed"), adapter(lab, "graphs-resumed")
    cut_back(lab, "graphs-resumed", 3)
    graphed_two.fit(config)
    assert went_on(lab, "graphs-resumed", 3)
    assert metrics(lab, "graphs-resumed") == whole and len(whole) == 6
    for name, tensor in adapter(lab, "graphs-resumed").items():
        assert torch.equal(tensor, weights[name])


def test_validation_and_samples_run_the_layers_own_code(lab: Path, graphed_two: Gang) -> None:
    often = {"train__validate_every": 1, "train__sample_every": 1, "train__samples": 1}
    rows = str(lab / "validation.jsonl")
    graphed_two.fit(small_config(lab, "graphs-validated", data__validation=rows,
                                 model__cuda_graphs=True, **often))  # fmt: skip
    assert evidence(lab, "graphs-validated")["replayed_forwards"] == 4
    assert len(metrics(lab, "graphs-validated", "eval/loss")) == 6
