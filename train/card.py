"""The model card stub of an export: what the run knows, and blanks for what only people know."""

import json

from tuneloom.registry.contract import Contract
from tuneloom.train.config import TrainConfig

TEXT = """---
{header}---

# {name}

{what} Trained by Tuneloom in the run `{run}`.

| | |
|---|---|
| base | `{base}` |
| base digest (sha256 of its tensors) | `{digest}` |
| weights digest | `{weights}` |
| method | {method} |
| objective | {objective} |
| data | `{data}` |
| longest example | {max_length} tokens |
| seed | {seed} |

## Use

{use}

## To be filled in by its owner

- Licence of the weights, which the base's licence and the data's licences allow:
- What it is for, and what it is not for:
- Figures: `tuneloom evaluate run=RUN`, base and tuned on the same held-out rows:
"""


def card(config: TrainConfig, contract: Contract) -> str:
    """README.md of an export."""
    adapter = contract.kind == "adapter"
    based = {"base_model": config.model.path} if config.model.init == "pretrained" else {}
    header = based | {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tuneloom", config.method.kind, config.objective.kind],
    }
    command = f"tuneloom generate model.path={config.model.path} adapter=FOLDER prompt='...'"
    return TEXT.format(
        header="".join(f"{key}: {json.dumps(value)}\n" for key, value in header.items()),
        name=contract.run,
        what="A PEFT adapter for the base below." if adapter else _whole(contract),
        run=contract.run,
        base=config.model.path,
        digest=contract.base.digest,
        weights=contract.weights,
        method=_method(config),
        objective=config.objective.kind,
        data=config.data.path,
        max_length=config.batch.max_length,
        seed=config.seed,
        use=f"    {command}" if adapter else "    tuneloom generate model.path=FOLDER prompt='...'",
    )


def _whole(contract: Contract) -> str:
    """How a whole model came about."""
    if contract.method == "full":
        return "A whole model, every weight trained."
    how = "dequantised from NF4 first" if contract.dequantised else "in the base's precision"
    return f"A whole model: an adapter merged into its base, {how}."


def _method(config: TrainConfig) -> str:
    method = config.method
    if method.kind == "full":
        return "full"
    kinds = [name for name, on in (("DoRA", method.dora), ("rsLoRA", method.rslora)) if on]
    extra = f" ({', '.join(kinds)})" if kinds else ""
    return f"{method.kind}{extra}, rank {method.rank}, alpha {method.alpha}"
