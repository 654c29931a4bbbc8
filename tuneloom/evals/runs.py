"""A run folder as evaluation sees it: its config, and the weights it left, exported or not yet."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneloom.data.golden import goldens
from tuneloom.data.render import Renderer
from tuneloom.data.tokenizer import load_tokenizer
from tuneloom.errors import ConfigError, RefusedError
from tuneloom.registry import contract as contracts
from tuneloom.registry.adapters import is_adapter, model_folder
from tuneloom.registry.contract import Base, Contract
from tuneloom.registry.digests import template_digest, tokenizer_digest, weights_digest
from tuneloom.registry.record import refuse_unfinished
from tuneloom.yaml_guard import read_mapping

READ = (
    "run.id", "model.path", "model.revision", "model.init", "model.dtype", "data.path",
    "data.split", "method.kind", "method.double_quantisation", "batch.max_length",
    "batch.over_length", "objective.kind",
)  # fmt: skip
"""Keys of a run's config.yaml that evaluation and report read."""


@dataclass(frozen=True)
class Tuned:
    """Weights of a run; `contract` where the folder has none of its own."""

    folder: Path
    contract: Contract | None


def open_run(run: str) -> tuple[Path, dict[str, Any]]:
    """A run folder and its resolved config; raises ConfigError where it is not one."""
    folder = Path(run)
    if not (folder / "config.yaml").exists():
        raise ConfigError(f"run: {run} has no config.yaml; give a run folder such as runs/RUN_ID")
    config = read_mapping(folder / "config.yaml")
    for key in READ:
        section, _, name = key.partition(".")
        inner = config.get(section)
        if not isinstance(inner, dict) or name not in inner:
            raise ConfigError(
                f"run: {run}/config.yaml lacks {key}, so it is not what `tuneloom train` wrote; "
                "put that back"
            )
    return folder, config


def weights_of(run: Path, config: dict[str, Any]) -> Tuned:
    """The exported adapter or model, else the adapter as the trainer left it.

    Raises ConfigError for a run that left no weights, or a whole model that is not exported,
    RefusedError for a run that has not ended well, and for what was exported before it went on.
    """
    refuse_unfinished(run)
    weights = run / "weights"
    for folder in (run / "export" / "adapter", run / "export" / "model"):
        if folder.is_dir():
            _refuse_older(folder, weights, dtype=config["model"]["dtype"])
            return Tuned(folder, None)
    if not is_adapter(weights):
        way = f"tuneloom export run={run}" if weights.is_dir() else "train it to its end"
        raise ConfigError(f"run: {run} has no exported weights; {way}")
    return Tuned(weights, contract_of(run, config, weights))


def _refuse_older(exported: Path, weights: Path, *, dtype: str) -> None:
    """What was exported before the run was taken up again is not what the run is now."""
    held = contracts.read(exported)
    if held is None or not weights.is_dir():
        return
    unchanged = held.kind == "adapter" or (held.method == "full" and held.dtype == dtype)
    source = held.source or (held.weights if unchanged else None)
    if source is not None and source != weights_digest(weights):
        raise RefusedError(
            f"run: {exported} was exported before {weights} was written anew; export it again"
        )


def contract_of(run: Path, config: dict[str, Any], weights: Path) -> Contract:
    """What an export would promise of the adapter, from the record made before step 0."""
    if not (run / "run.json").exists():
        raise ConfigError(f"run: {run} has no run.json, so its base is unknown; export it instead")
    facts = json.loads((run / "run.json").read_text("utf-8"))
    base = model_folder(config["model"]["path"], revision=config["model"]["revision"])
    method, batch = config["method"], config["batch"]
    objective = config["objective"]["kind"]
    return Contract(
        kind="adapter",
        run=facts["run_id"],
        method=method["kind"],
        base=Base(
            path=config["model"]["path"],
            revision=config["model"]["revision"],
            digest=facts["base"]["digest"],
        ),
        weights=weights_digest(weights),
        dtype=config["model"]["dtype"],
        double_quantisation=method["double_quantisation"] if method["kind"] == "qlora" else None,
        tokenizer=tokenizer_digest(base),
        template=template_digest(base),
        renderer=facts["dataset"]["renderer"],
        max_length=batch["max_length"],
        over_length=batch["over_length"],
        objective=objective,
        golden=goldens(Renderer(load_tokenizer(str(base)), objective)),
    )
