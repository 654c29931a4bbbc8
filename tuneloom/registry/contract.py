"""contract.json: what an export was made for, and the checks that hold whoever loads it to that.

PEFT loads an adapter onto the wrong base without a word, and a tokenizer that adds no BOS costs
seven points of accuracy in silence. So an export carries the digests of its base, tokenizer and
template, and golden renderings as token ids; whoever loads it checks them first.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from tuneloom.config import Config
from tuneloom.errors import DataError, RefusedError
from tuneloom.registry.digests import template_digest, tokenizer_digest

FILE = "contract.json"
RANDOM = "random"
"""Base digest of a model that was trained from random weights."""


class Base(Config):
    path: str
    """Folder or hub id, as the run was given it; only a hint, the digest is what counts."""
    revision: str | None = None
    digest: str


class Golden(Config):
    """A conversation and the ids that it rendered to when the weights were trained."""

    record: dict[str, Any]
    prompt_ids: list[int]
    """Before the last answer, with the generation prompt: what the model is asked."""
    ids: list[int]
    """The whole conversation, as trained."""
    targets: list[list[int]]
    """Half-open [from, to) ranges of `ids` that carry loss."""


class Contract(Config):
    version: Literal[1] = 1
    kind: Literal["adapter", "model"]
    run: str
    """Id of the run that trained the weights."""
    method: Literal["full", "lora", "qlora"]
    base: Base
    weights: str
    """Digest of the exported tensors."""
    source: str | None = None
    """Digest of the run's own tensors, which a merge or another precision changes; None in older
    exports.
    """
    dtype: str
    """Of the model while it was trained."""
    double_quantisation: bool | None = None
    """How a QLoRA base was quantised; None where it was not."""
    dequantised: bool = False
    """A merged QLoRA: its base went through NF4 before the adapter was added."""
    tokenizer: str
    template: str
    renderer: str
    """Digest of the renderer that trained: template, masks, length limit."""
    max_length: int
    over_length: str
    objective: Literal["sft", "pretrain"]
    golden: list[Golden]


def write(folder: str | Path, contract: Contract) -> Path:
    """Write contract.json into a folder, in one move."""
    path = Path(folder, FILE)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(contract.model_dump(), indent=1, ensure_ascii=False) + "\n")
    partial.replace(path)
    return path


def read(folder: str | Path) -> Contract | None:
    """A folder's contract, None where it has none; raises DataError for one that cannot be read."""
    path = Path(folder, FILE)
    if not path.exists():
        return None
    try:
        return Contract.model_validate(json.loads(path.read_text("utf-8")))
    except (ValueError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise DataError(f"{path}: not a contract ({first}); export the run again") from error


def check_base(contract: Contract, folder: str | Path, *, digest: str, given: str) -> None:
    """Refuse a base other than the one that adapter or model were trained on, naming both."""
    if contract.base.digest not in (RANDOM, digest):
        raise RefusedError(
            f"{folder}: this {contract.kind} was trained on {contract.base.path} with digest "
            f"{contract.base.digest[:16]}, but {given} has digest {digest[:16]}; "
            "give the base that it was trained on, or train on this one"
        )


def check_weights(contract: Contract, folder: str | Path, *, digest: str) -> None:
    """Refuse a folder whose tensors are not the ones that were exported."""
    if contract.weights != digest:
        raise RefusedError(
            f"{folder}: the weights have digest {digest[:16]}, but {FILE} says "
            f"{contract.weights[:16]}; copy the folder again, or export the run again"
        )


def check_tokenizer(contract: Contract, folder: str | Path, *, holder: str | Path) -> None:
    """Refuse a tokenizer or template in `folder` other than those the weights were trained with."""
    found = {"tokenizer": tokenizer_digest(folder), "template": template_digest(folder)}
    for part, digest in found.items():
        expected = getattr(contract, part)
        if digest != expected:
            raise RefusedError(
                f"{holder}: trained with a {part} of digest {expected[:16]}, but {folder} has one "
                f"of digest {digest[:16]}; use the {part} that was exported with the weights"
            )


def check_renderings(
    contract: Contract,
    folder: str | Path,
    *,
    render: Callable[[dict[str, Any]], tuple[list[int], list[int]]],
) -> None:
    """Render the golden conversations again and refuse when any token differs.

    `render` gives a record's prompt ids and its whole ids, as in `Golden`.
    """
    for number, golden in enumerate(contract.golden):
        for trained, now in zip(
            (golden.prompt_ids, golden.ids), render(golden.record), strict=True
        ):
            if now != trained:
                at = _first_difference(now, trained)
                raise RefusedError(
                    f"{folder}: golden rendering {number} differs from token {at} on "
                    f"({trained[at : at + 4]} when trained, {now[at : at + 4]} now); "
                    "the tokenizer or template is not the one that trained these weights"
                )


def _first_difference(one: list[int], other: list[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
