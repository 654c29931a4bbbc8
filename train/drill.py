"""`python -m tuneloom.train.drill FOLDER`: open a run's weights afresh, compare logits.

FOLDER holds weights (a PEFT adapter or a whole model), probe.safetensors with token ids (1, S) and
the live model's logits (S, V) fp32, and probe.json that names base, dtype and method. A fresh
process loads base and adapter through PEFT, then merged, and prints one JSON verdict; exit 0 or 5.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneloom.errors import DONE, TRAINING, DataError
from tuneloom.registry.adapters import is_adapter
from tuneloom.registry.digests import weight_files

if TYPE_CHECKING:
    from torch import Tensor

VERDICT = "drill.json"
TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 6e-2, "fp8": 0.5}
"""Largest |difference| in standard deviations of the live logits: bf16 keeps 8 bits, so a logit
of 8 standard deviations is rounded by 3 %, and other kernels than the trainer's round elsewhere.
FP8 keeps 4 bits of each product's operands: it moves the logits of the shipped base by 0.18."""
MERGED_FACTOR = 2.0
"""Merging rounds W + BA once more, in the base's precision."""


@dataclass(frozen=True)
class Verdict:
    """Differences are in standard deviations of the live logits; merged is null without adapter."""

    ok: bool
    peft_max_diff: float
    merged_max_diff: float | None
    tolerance: float
    same_next_token: float
    """Share of positions whose likeliest next token is the live model's."""
    adapter_effect: float | None
    """How far the adapter moves the base's logits; null for a whole model."""
    conclusive: bool
    """False when the adapter moves logits by less than the tolerance: then leaving it out would
    have passed as well."""
    bytes: int
    """Of the weights on disk."""


def main(argv: list[str] | None = None) -> int:
    """Drill the folder, print and store the verdict."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        print("usage: python -m tuneloom.train.drill FOLDER", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    verdict = drill(folder)
    text = json.dumps(asdict(verdict))
    (folder / VERDICT).write_text(text + "\n", encoding="utf-8")
    print(text)
    return DONE if verdict.ok else TRAINING


def drill(folder: Path) -> Verdict:
    """Load the weights afresh and hold their logits against the live model's."""
    import torch

    facts, ids, live = read_probe(folder)
    with torch.inference_mode():
        if is_adapter(folder):
            base, loaded, merged = adapter_logits(folder, facts, ids)
        else:
            base, loaded, merged = None, model_logits(folder, facts, ids), None
    tolerance = TOLERANCE["fp8" if facts.get("fp8") else facts["dtype"]]
    opened = distance(loaded, live)
    after = None if merged is None else distance(merged, live)
    effect = None if base is None else distance(base, live)
    close = opened <= tolerance and (after is None or after <= MERGED_FACTOR * tolerance)
    return Verdict(
        ok=close,
        peft_max_diff=opened,
        merged_max_diff=after,
        tolerance=tolerance,
        same_next_token=float((loaded.argmax(-1) == live.argmax(-1)).float().mean()),
        adapter_effect=effect,
        conclusive=effect is None or effect > tolerance,
        bytes=sum(file.stat().st_size for file in weight_files(folder)),
    )


def read_probe(folder: Path) -> "tuple[dict[str, Any], Tensor, Tensor]":
    """probe.json, token ids (1, S) int64, live logits (S, V) fp32; DataError where they are not."""
    from safetensors.torch import load_file

    try:
        facts = json.loads((folder / "probe.json").read_text("utf-8"))
        tensors = load_file(folder / "probe.safetensors")
        return facts, tensors["ids"].long(), tensors["logits"].float()
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: no probe to drill with ({error}); set train.drill") from error


def adapter_logits(
    folder: Path, facts: dict[str, Any], ids: "Tensor"
) -> "tuple[Tensor, Tensor, Tensor]":
    """(S, V) logits of the base, of base + adapter through PEFT, and of the two merged."""
    from peft import PeftModel

    from tuneloom.train.export import load_base

    quantised = facts.get("method") == "qlora"
    base = load_base(
        Path(facts["base"]),
        dtype=facts["dtype"],
        quantised=quantised,
        double_quantisation=bool(facts.get("double_quantisation")),
    )
    if facts.get("fp8"):
        from tuneloom.train.fp8 import hold_linears

        hold_linears(base, facts["extra_modules"])
    bare = logits(base, ids)
    model: Any = PeftModel.from_pretrained(base, folder)
    through_peft = logits(model, ids)
    if quantised:
        model = PeftModel.from_pretrained(model.unload().dequantize(), folder)
    if facts.get("fp8"):  # merging takes the base as it is on disk
        options = {"quantised": False, "double_quantisation": False}
        whole = load_base(Path(facts["base"]), dtype=facts["dtype"], **options)
        model = PeftModel.from_pretrained(whole, folder)
    return bare, through_peft, logits(model.merge_and_unload(safe_merge=True), ids)


def model_logits(folder: Path, facts: dict[str, Any], ids: "Tensor") -> "Tensor":
    """(S, V) logits of a whole model."""
    from tuneloom.train.export import load_base

    model = load_base(folder, dtype=facts["dtype"], quantised=False, double_quantisation=False)
    return logits(model, ids)


def logits(model: Any, ids: "Tensor") -> "Tensor":
    """(S, V) fp32 on the CPU, of (1, S) ids."""
    device = next(model.parameters()).device
    found: Tensor = model.eval()(input_ids=ids.to(device), use_cache=False).logits[0]
    return found.float().cpu()


def distance(one: "Tensor", other: "Tensor") -> float:
    """Largest |one - other| in standard deviations of `other`."""
    return float((one - other).abs().max() / other.std().clamp_min(1e-12))


if __name__ == "__main__":
    sys.exit(main())
