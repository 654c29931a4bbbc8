"""`tuneloom export run=runs/ID [merge=true]`: an adapter or a whole model that others can load.

The folder holds safetensors, the base's tokenizer and chat template byte for byte, a model card
stub and contract.json, by which whoever loads it knows the base, the tokenizer and the rendering.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError

from tuneloom.config import Config, build
from tuneloom.data.golden import goldens
from tuneloom.data.render import Renderer
from tuneloom.data.tokenizer import load_tokenizer
from tuneloom.errors import DONE, ConfigError, RefusedError, TrainingError
from tuneloom.registry import contract as contracts
from tuneloom.registry.adapters import ADAPTER_CONFIG, is_adapter, model_folder
from tuneloom.registry.contract import Base, Contract
from tuneloom.registry.digests import (
    INDEX,
    non_finite,
    template_digest,
    tokenizer_digest,
    weight_files,
    weights_digest,
)
from tuneloom.registry.record import record_of, refuse_unfinished
from tuneloom.train.card import card
from tuneloom.train.config import TrainConfig
from tuneloom.train.runs import WEIGHTS
from tuneloom.yaml_guard import read_mapping

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
SHARD = "5GB"


class ExportConfig(Config):
    run: str
    """Run folder, such as runs/RUN_ID."""
    merge: bool = False
    """Add the adapter to its base and write a whole model; a QLoRA base is dequantised first."""
    dtype: Literal["trained", "bf16", "fp16", "fp32"] = "trained"
    """Precision of a whole model's weights, in which a merged update is rounded once; an adapter
    stays as it was trained.
    """
    out: str | None = None
    """Folder to write; by default export/adapter or export/model in the run folder."""


CONFIG = ExportConfig


def main(config: ExportConfig) -> int:
    """Export and say what was written."""
    out = Path(config.out) if config.out else None
    folder = export(Path(config.run), merge=config.merge, dtype=config.dtype, out=out)
    held = contracts.read(folder)
    assert held is not None, "export writes a contract"
    size = sum(file.stat().st_size for file in weight_files(folder))
    print(f"{held.kind} in {folder}: {size / 2**20:,.1f} MiB, base {held.base.digest[:16]}")
    if held.kind == "adapter":
        print(f'use it: tuneloom generate run={config.run} prompt="..."')
    return DONE


def export(
    run: Path, *, merge: bool = False, dtype: str = "trained", out: Path | None = None
) -> Path:
    """Write the run's adapter or model; returns its folder, which appears whole or not at all.

    Raises ConfigError for what is no finished run, RefusedError when the base has changed since the
    run, TrainingError when a weight is not finite or the folder cannot be written.
    """
    config, weights = read_run(run)
    refuse_unfinished(run)
    if merge and not is_adapter(weights):
        raise ConfigError(f"merge: {run} trained every weight, it has no adapter to merge; drop it")
    base = model_folder(config.model.path, revision=config.model.revision)
    digest = base_digest(run, config, base)
    broken = non_finite(weights)
    if broken:
        raise TrainingError(
            f"{weights}: {len(broken)} tensors hold NaN or infinity, {broken[0]} first; "
            f"take up an earlier checkpoint under another run.id (resume=CHECKPOINT, from "
            f"{run}/checkpoints) and export that run"
        )
    kind = "adapter" if is_adapter(weights) and not merge else "model"
    if kind == "adapter" and dtype != "trained":
        raise ConfigError(
            f"dtype: an adapter stays as it was trained, got {dtype!r}; drop it, or set merge=true"
        )
    folder = out or run / "export" / kind
    _refuse_occupied(folder)
    held = contract_of(run, config, base, digest=digest, kind=kind)
    if dtype != "trained":
        held = held.model_copy(update={"dtype": dtype})
    try:
        write_whole(folder, lambda aside: _fill(aside, config, base, weights, held))
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"out: {folder} could not be written ({error}); free some space there, or set out to "
            "another folder"
        ) from error
    return folder


def read_run(run: Path) -> tuple[TrainConfig, Path]:
    """A run's resolved config and its folder of trained weights."""
    path = run / "config.yaml"
    if not path.exists():
        raise ConfigError(f"run: {run} has no config.yaml; give a run folder such as runs/RUN_ID")
    config = build(TrainConfig, read_mapping(path))
    weights = run / WEIGHTS
    if not weights.is_dir():
        raise ConfigError(f"run: {run} has no {WEIGHTS}/, so it has not ended; train it to the end")
    return config, weights


def _refuse_occupied(folder: Path) -> None:
    """Only an export is replaced by one."""
    if not folder.exists() or (folder / contracts.FILE).exists():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise ConfigError(
            f"out: {folder} holds something else than an export; give a new or an empty folder"
        )


def base_digest(run: Path, config: TrainConfig, base: Path) -> str:
    """Digest of the base as it lies there now; refused when the run started from another.

    A model trained from random weights has none.
    """
    if config.model.init == "random":
        return contracts.RANDOM
    digest = weights_digest(base)
    trained_on = recorded_base(run)
    if trained_on is not None and trained_on != digest:
        raise RefusedError(
            f"{base}: has digest {digest[:16]} now, but {run} was trained on {trained_on[:16]}; "
            "put the base of the run back, or train again"
        )
    return digest


def recorded_base(run: Path) -> str | None:
    """The base digest that run.json holds since before step 0."""
    base = record_of(run).get("base")
    return base.get("digest") if isinstance(base, dict) else None


def contract_of(run: Path, config: TrainConfig, base: Path, *, digest: str, kind: Any) -> Contract:
    """The contract without the digest of the weights, which stand when they are written."""
    tokenizer = load_tokenizer(str(base))
    length, policy = config.batch.max_length, config.batch.over_length
    renderer = Renderer(tokenizer, config.objective.kind, length, policy)
    trained = (record_of(run).get("dataset") or {}).get("renderer", renderer.digest)
    if renderer.digest != trained:
        raise RefusedError(
            f"{base}: its tokenizer or chat template is not the one that {run} was trained with; "
            "put it back, or train again"
        )
    qlora = config.method.kind == "qlora"
    return Contract(
        kind=kind,
        run=config.run.id or run.name,
        method=config.method.kind,
        base=Base(path=config.model.path, revision=config.model.revision, digest=digest),
        weights="",
        dtype=config.model.dtype,
        double_quantisation=config.method.double_quantisation if qlora else None,
        dequantised=qlora and kind == "model",
        tokenizer=tokenizer_digest(base),
        template=template_digest(base),
        renderer=renderer.digest,
        max_length=length,
        over_length=policy,
        objective=config.objective.kind,
        golden=goldens(Renderer(tokenizer, config.objective.kind)),
    )


def write_whole(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder aside and move it into place: a reader sees the old one or the new one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside, before = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    for leftover in (aside, before):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir()
    try:
        fill(aside)
    except BaseException:  # what fills the disk must not stay
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(before)
    aside.rename(folder)
    shutil.rmtree(before, ignore_errors=True)


def _fill(aside: Path, config: TrainConfig, base: Path, weights: Path, held: Contract) -> None:
    """Weights, tokenizer, card, contract."""
    if held.kind == "adapter":
        _copy_adapter(weights, aside, config)
    elif is_adapter(weights):
        merge_into(aside, config, base, weights, dtype=held.dtype)
    else:
        _copy_model(weights, aside, base)
    for name in TOKENIZER_FILES:
        if (base / name).exists():
            shutil.copyfile(base / name, aside / name)
    if held.kind == "model" and held.dtype != config.model.dtype:
        cast(aside, held.dtype)
    digests = {"weights": weights_digest(aside), "source": weights_digest(weights)}
    complete = held.model_copy(update=digests)
    contracts.write(aside, complete)
    (aside / "README.md").write_text(card(config, complete), encoding="utf-8")


def cast(folder: Path, dtype: str) -> None:
    """Rewrite a model's safetensors and its config in another precision, one file at a time."""
    import torch
    from safetensors.torch import load_file, save_file

    precision = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    for file in weight_files(folder):
        state = {
            name: tensor.to(precision) if tensor.is_floating_point() else tensor
            for name, tensor in load_file(file).items()
        }
        save_file(state, file, metadata={"format": "pt"})
    path = folder / "config.json"
    described = json.loads(path.read_text("utf-8")) | {
        "dtype": str(precision).removeprefix("torch.")
    }
    path.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _copy_adapter(weights: Path, aside: Path, config: TrainConfig) -> None:
    """The adapter's two files; the base is named as the user named it, not by a cache path."""
    description = json.loads((weights / ADAPTER_CONFIG).read_text("utf-8"))
    description["base_model_name_or_path"] = config.model.path
    description["revision"] = config.model.revision
    (aside / ADAPTER_CONFIG).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    for file in weight_files(weights):
        shutil.copyfile(file, aside / file.name)


def _copy_model(weights: Path, aside: Path, base: Path) -> None:
    """A fully trained model's safetensors and configs."""
    for file in weight_files(weights):
        shutil.copyfile(file, aside / file.name)
    for name in ("config.json", "generation_config.json"):
        source = next((f / name for f in (weights, base) if (f / name).exists()), None)
        if source is not None:
            shutil.copyfile(source, aside / name)
    if (weights / INDEX).exists():
        shutil.copyfile(weights / INDEX, aside / INDEX)


def merge_into(
    aside: Path, config: TrainConfig, base: Path, weights: Path, *, dtype: str
) -> None:  # fmt: skip
    """Base plus adapter as one model, the base as the run held it, what the adapter changes in
    `dtype`; raises TrainingError for a number that is not finite.
    """
    from peft import PeftModel

    from tuneloom.train.model import DTYPES

    model = load_base(
        base,
        dtype=config.model.dtype,
        quantised=config.method.kind == "qlora",
        double_quantisation=config.method.double_quantisation,
    )
    if config.method.kind == "qlora":
        print("export: the base goes from NF4 to full precision first, then the adapter is added")
        model = model.dequantize()
    merged = _merged(PeftModel.from_pretrained(model, weights), weights, DTYPES[dtype])
    merged.config.use_cache = True
    merged.save_pretrained(aside, max_shard_size=SHARD)


def _merged(adapted: Any, weights: Path, dtype: "torch.dtype") -> Any:
    """The model without PEFT's layers: each weight and its update are added in fp32, one weight at
    a time, and rounded to `dtype` once. PEFT rounds the update first: in bf16 small ones are lost.
    """
    for name, layer in adapted.named_modules():
        if hasattr(layer, "lora_A"):
            stacked = hasattr(layer, "get_param")
            weight = layer.get_param() if stacked else layer.get_base_layer().weight
            weight.data = weight.data.float()
            layer.merge()
            weight.data = weight.data.to(dtype)
            if not weight.data.isfinite().all():
                raise TrainingError(f"{weights}: merging gives non-finite weights in {name}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        return adapted.merge_and_unload()


def load_base(folder: Path, *, dtype: str, quantised: bool, double_quantisation: bool) -> Any:
    """A causal LM on the CPU, or on the GPU where there is one, in NF4 if it was trained so."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    from tuneloom.train.model import keep_unpacked

    logging.disable_progress_bar()
    # DeepSpeed, which save_pretrained imports, picks its accelerator from this.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    options: dict[str, Any] = {"dtype": precision, "use_safetensors": True}
    if quantised:
        options["device_map"] = {"": "cuda" if torch.cuda.is_available() else "cpu"}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quantisation,
            bnb_4bit_compute_dtype=precision,
        )
    network = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **options)
    keep_unpacked(network)
    return network
