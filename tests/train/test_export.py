"""What is exported loads elsewhere and says what it is; the drill tells right from wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tuneloom.cli import main
from tuneloom.config import build
from tuneloom.errors import RefusedError
from tuneloom.evals.runs import weights_of
from tuneloom.registry import contract as contracts
from tuneloom.registry.digests import weights_digest
from tuneloom.testing import cramped_files, tiny_model
from tuneloom.train import drill
from tuneloom.train.config import TrainConfig
from tuneloom.train.export import export, load_base
from tuneloom.train.model import DTYPES

IDS = torch.arange(10, 42)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("export") / "base", hidden=128)


def adapted(base: Path, *, nf4: bool = False, **options: Any) -> Any:
    """Base with an adapter whose B is not zero, as after training."""
    from peft import LoraConfig, get_peft_model

    model = load_base(base, dtype="fp32", quantised=nf4, double_quantisation=True)
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **options)
    torch.manual_seed(1)
    model = get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model.eval()


def make_run(
    folder: Path, base: Path, model: Any, /, *, kind: str = "lora", **changes: Any
) -> Path:
    """A run folder as the trainer leaves it: config.yaml, run.json, weights."""
    mapping: dict[str, Any] = {
        "epochs": 1,
        "run": {"id": folder.name},
        "model": {"path": str(base), "dtype": "fp32"},
        "method": {"kind": kind, "rank": 4},
        "objective": {"kind": "sft"},
        "data": {"path": "rows.jsonl"},
    }
    resolved = build(TrainConfig, {**mapping, **changes}).model_dump(mode="json")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved), encoding="utf-8")
    facts = {"run_id": folder.name, "base": {"digest": weights_digest(base)}}
    (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    model.save_pretrained(folder / "weights")
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS).logits[0]
    return found.float()


def write_probe(folder: Path, base: Path, live: torch.Tensor, **facts: Any) -> None:
    save_file({"ids": IDS, "logits": live.contiguous()}, folder / "probe.safetensors")
    content = {"base": str(base), "dtype": "fp32", "method": "lora", **facts}
    (folder / "probe.json").write_text(json.dumps(content))


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "lora-1", base, adapted(base))


def test_an_exported_adapter_opens_through_peft_with_the_same_logits(run: Path, base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = export(run)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    assert torch.equal(logits(model), logits(adapted(base)))
    AutoTokenizer.from_pretrained(folder).apply_chat_template([{"role": "user", "content": "hi"}])
    assert load_file(folder / "adapter_model.safetensors").keys()


def test_the_contract_holds_digests_and_golden_ids(run: Path, base: Path) -> None:
    held = contracts.read(export(run))
    assert held is not None
    assert held.base.digest == weights_digest(base)
    assert held.weights == weights_digest(run / "export" / "adapter")
    assert (held.kind, held.method, held.run) == ("adapter", "lora", "lora-1")
    assert len(held.golden) == 3  # text belongs to pretraining
    for golden in held.golden:
        assert golden.ids[: len(golden.prompt_ids)] == golden.prompt_ids
        assert golden.targets[-1][0] == len(golden.prompt_ids)


def test_a_merged_model_needs_no_peft_and_answers_as_the_adapter(run: Path, base: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = export(run, merge=True)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(merged), logits(adapted(base)), rtol=1e-4, atol=1e-5)
    held = contracts.read(folder)
    assert held is not None and held.kind == "model" and not held.dequantised
    assert held.weights == weights_digest(folder) != held.base.digest


def test_a_merged_model_generates_through_the_command(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", f"run={run}", "merge=true"]) == 0
    assert "model in" in capsys.readouterr().out
    folder = run / "export" / "model"
    arguments = [f"model.path={folder}", "prompt=hi", "max_new_tokens=2", "device=cpu"]
    assert main(["generate", *arguments]) == 0


def test_a_qlora_is_merged_into_the_dequantised_base(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    live = adapted(base, nf4=True)
    method = {"kind": "qlora", "rank": 4}
    run = make_run(tmp_path / "qlora-1", base, live, kind="qlora", method=method)
    folder = export(run, merge=True)
    held = contracts.read(folder)
    assert held is not None and held.dequantised and held.double_quantisation
    merged = logits(AutoModelForCausalLM.from_pretrained(folder))
    near = drill.distance(merged, logits(live))
    far = drill.distance(logits(adapted(base)), logits(live))
    assert near < 0.02 < far


@pytest.mark.parametrize(
    ("kind", "trained", "dtype"),
    [("lora", "bf16", "fp32"), ("qlora", "bf16", "fp32"), ("lora", "bf16", "trained"),
     ("lora", "fp32", "bf16")],
)  # fmt: skip
def test_an_update_is_added_in_fp32_and_rounded_once(
    base: Path, tmp_path: Path, kind: str, trained: str, dtype: str
) -> None:
    live = adapted(base)
    method = {"kind": kind, "rank": 4}
    model = {"path": str(base), "dtype": trained}
    run = make_run(tmp_path / "run", base, live, kind=kind, method=method, model=model)
    started = load_base(base, dtype=trained, quantised=kind == "qlora", double_quantisation=True)
    started = (started.dequantize() if kind == "qlora" else started).state_dict()
    found = load_file(export(run, merge=True, dtype=dtype) / "model.safetensors")
    wanted = DTYPES[trained if dtype == "trained" else dtype]
    layers = [(n, m) for n, m in live.base_model.model.named_modules() if hasattr(m, "lora_A")]
    assert len(layers) == 14 and {tensor.dtype for tensor in found.values()} == {wanted}
    for name, layer in layers:
        exact = started[f"{name}.weight"].float() + layer.get_delta_weight("default")
        assert torch.equal(found[f"{name}.weight"], exact.to(wanted)), name
    other = "model.embed_tokens.weight"
    assert torch.equal(found[other], started[other].to(wanted))


def test_a_full_fine_tune_is_exported_as_a_model(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)
    run = make_run(tmp_path / "full-1", base, model, kind="full", method={"kind": "full"})
    folder = export(run)
    assert folder.name == "model"
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))
    assert main(["export", f"run={run}", "merge=true"]) == 2


def test_a_base_that_changed_since_the_run_is_refused(
    run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"base": {"digest": "0" * 64}}
    (run / "run.json").write_text(json.dumps(facts))
    assert main(["export", f"run={run}"]) == 4
    message = capsys.readouterr().err
    assert "0" * 16 in message and weights_digest(base)[:16] in message
    assert not (run / "export").exists()


def test_weights_that_are_not_finite_are_refused_with_exit_5(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "weights" / "adapter_model.safetensors"
    content = load_file(file)
    name = sorted(content)[0]
    content[name][0, 0] = torch.nan
    save_file(content, file)
    assert main(["export", f"run={run}"]) == 5
    message = capsys.readouterr().err
    assert name in message and "another run.id (resume=CHECKPOINT" in message
    assert not (run / "export").exists()


def test_an_export_that_cannot_be_written_is_one_sentence_and_leaves_nothing(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with cramped_files(1000):
        assert main(["export", f"run={run}"]) == 5
    assert "export/adapter could not be written" in capsys.readouterr().err
    assert list((run / "export").iterdir()) == []


@pytest.mark.parametrize(
    ("missing", "message"), [("config.yaml", "run folder"), ("weights", "end")]
)
def test_what_is_no_finished_run_is_refused_with_exit_2(
    run: Path, missing: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(["export", f"run={run}"]) == 2
    assert message in capsys.readouterr().err


def test_exporting_again_replaces_the_folder_and_leaves_nothing_beside_it(run: Path) -> None:
    first = export(run)
    (first / "stale").write_text("of an earlier export")
    assert export(run) == first
    assert not (first / "stale").exists()
    assert [path.name for path in first.parent.iterdir()] == ["adapter"]


def test_a_fresh_process_passes_the_drill_on_a_good_adapter(run: Path, base: Path) -> None:
    weights = run / "weights"
    write_probe(weights, base, logits(adapted(base)))
    done = subprocess.run(
        [sys.executable, "-m", "tuneloom.train.drill", str(weights)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout.splitlines()[-1])
    assert verdict == json.loads((weights / "drill.json").read_text())
    assert verdict["ok"] and verdict["conclusive"] and verdict["same_next_token"] == 1.0
    assert verdict["peft_max_diff"] < 1e-5 and verdict["merged_max_diff"] < 1e-3
    assert verdict["bytes"] == (weights / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("fault", ["half the tensors", "another base", "no adapter"])
def test_the_drill_fails_on_wrong_weights(
    run: Path, base: Path, tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = run / "weights"
    live, on = logits(adapted(base)), base
    file = weights / "adapter_model.safetensors"
    content = load_file(file)
    if fault == "another base":
        on = tiny_model(tmp_path / "other", hidden=128, seed=3)
    elif fault == "no adapter":
        save_file({name: torch.zeros_like(t) for name, t in content.items()}, file)
    else:
        save_file({n: t for n, t in content.items() if "layers.0" in n}, file)
    write_probe(weights, on, live)
    assert drill.main([str(weights)]) == 5
    assert not json.loads(capsys.readouterr().out.splitlines()[-1])["ok"]


@pytest.mark.parametrize("kind", ["dora", "rslora", "qlora"])
def test_the_drill_passes_for_other_adapters(base: Path, tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {}
    if kind != "qlora":
        options[f"use_{kind}"] = True
    live = adapted(base, nf4=kind == "qlora", **options)
    live.save_pretrained(tmp_path)
    method = "qlora" if kind == "qlora" else "lora"
    write_probe(tmp_path, base, logits(live), method=method, double_quantisation=True)
    verdict = drill.drill(tmp_path)
    assert verdict.ok and verdict.conclusive


def test_the_drill_opens_a_full_model(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_probe(base, base, logits(AutoModelForCausalLM.from_pretrained(base)))
    verdict = drill.drill(base)
    assert verdict.ok and verdict.merged_max_diff is None and verdict.adapter_effect is None


def test_a_drill_without_probe_is_a_data_error(tmp_path: Path) -> None:
    from tuneloom.errors import DataError

    with pytest.raises(DataError, match="no probe"):
        drill.drill(tmp_path)


def test_an_evaluation_between_steps_does_not_change_a_qloras_gradients(base: Path) -> None:
    def gradients(*, evaluate: bool) -> float:
        model = adapted(base, nf4=True).train()
        if evaluate:
            logits(model.eval())
        model.train()(input_ids=IDS).logits.sum().backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        return sum(float(gradient.abs().sum()) for gradient in found)

    assert gradients(evaluate=True) == gradients(evaluate=False) > 0


def test_a_failed_runs_weights_are_not_exported(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "run.json").write_text(json.dumps({"state": "failed", "error": ["train.drill: other"]}))
    assert main(["export", f"run={run}"]) == 4
    assert "the run failed (train.drill: other)" in capsys.readouterr().err


def test_a_run_of_another_chat_template_is_not_exported(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = json.loads((run / "run.json").read_text()) | {"dataset": {"renderer": "0" * 64}}
    (run / "run.json").write_text(json.dumps(facts))
    assert main(["export", f"run={run}"]) == 4
    assert "chat template is not the one that" in capsys.readouterr().err
    assert not (run / "export").exists()


@pytest.mark.parametrize("state", ["running", "stopped"])
def test_weights_that_a_run_goes_on_from_are_not_exported(
    run: Path, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | {"state": state}))
    assert main(["export", f"run={run}"]) == 4
    assert f"taken up again and is {state}" in capsys.readouterr().err


def test_only_an_export_or_an_empty_folder_is_written_over(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    occupied = tmp_path / "models"
    occupied.mkdir()
    (occupied / "another").write_text("model")
    for out in (occupied, run, occupied / "another"):
        assert main(["export", f"run={run}", f"out={out}"]) == 2
        assert "holds something else than an export" in capsys.readouterr().err
    assert (occupied / "another").read_text() == "model" and (run / "weights").is_dir()
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        assert main(["export", f"run={run}", f"out={tmp_path}/empty"]) == 0


@pytest.mark.parametrize(
    ("kind", "options"),
    [("lora", {}), ("lora", {"merge": True}), ("full", {}), ("full", {"dtype": "bf16"})],
)
def test_what_was_exported_before_its_run_went_on_is_not_evaluated(
    base: Path, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    model = adapted(base) if kind == "lora" else LlamaForCausalLM.from_pretrained(base)
    run = make_run(tmp_path / "went-on", base, model, kind=kind)
    config = yaml.safe_load((run / "config.yaml").read_text())
    exported = export(run, **options)
    assert weights_of(run, config).folder == exported
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"state": "running"}))
    with pytest.raises(RefusedError, match="taken up again and is running"):
        weights_of(run, config)
    (run / "run.json").write_text(json.dumps(record | {"state": "done"}))
    (weights,) = (run / "weights").glob("*.safetensors")
    shifted = {name: tensor + 1 for name, tensor in load_file(weights).items()}
    save_file(shifted, weights, metadata={"format": "pt"})
    with pytest.raises(RefusedError, match="was exported before"):
        weights_of(run, config)
    export(run, **options)
    assert weights_of(run, config).folder == exported
