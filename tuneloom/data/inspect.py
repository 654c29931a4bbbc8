"""Show rows as the trainer sees them.

`tuneloom inspect data.path=rows.jsonl model.path=examples/tiny-base rows=5 [json=true]`

Green is trained, grey is masked, red is cut by batch.max_length. A larger sample is scanned for
the share of answer tokens that the length limit would lose. Consent for rows of the split that ends
within 30 days, or has ended, is said in a line.
"""

import datetime
import json
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from tuneloom.config import Config
from tuneloom.data.consent import ends_soon
from tuneloom.data.records import Format
from tuneloom.data.render import Example, Objective, OverLength, Renderer
from tuneloom.data.rows import Rows, open_rows
from tuneloom.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from rich.text import Text

State = Literal["trained", "masked", "cut"]
STYLES: dict[State, str] = {"trained": "green", "masked": "grey50", "cut": "red strike"}
SHOWN = {n: f"\\x{n:02x}" for n in (*range(32), *range(127, 160)) if chr(n) not in "\t\n"}
"""Control characters, which could set a terminal's title or hide a line, as Python writes them."""
Positive = Annotated[int, Field(gt=0)]


class InspectDataConfig(Config):
    path: str
    """A dataset folder made by `tuneloom ingest`, or a raw JSONL file."""
    format: Format = "auto"
    """Payload of a raw JSONL; `auto` looks at the keys of each row."""
    split: str = "train"
    """Split of a dataset folder."""


class InspectModelConfig(Config):
    path: str
    """Folder or hub id whose tokenizer and chat template render the rows."""
    revision: str | None = None


class InspectObjectiveConfig(Config):
    kind: Objective = "sft"


class InspectBatchConfig(Config):
    max_length: Annotated[int, Field(ge=2)] = 2048
    over_length: OverLength = "drop"


class InspectConfig(Config):
    data: InspectDataConfig
    model: InspectModelConfig
    objective: InspectObjectiveConfig = InspectObjectiveConfig()
    batch: InspectBatchConfig = InspectBatchConfig()
    rows: Positive = 5
    """Rows shown, from the first."""
    scan: Positive = 1000
    """Rows, spread over the whole, that are tokenised for the shares."""
    as_json: Annotated[bool, Field(alias="json")] = False
    """One JSON object on standard output in place of colours."""


CONFIG = InspectConfig


@dataclass(frozen=True)
class Segment:
    """A run of tokens with one fate."""

    state: State
    tokens: int
    text: str


@dataclass(frozen=True)
class Shown:
    """One row; `cut` counts tokens that batch.max_length takes, `dropped` says why all went."""

    where: str
    id: str
    source: str
    tokens: int
    trained: int
    cut: int
    dropped: str
    segments: list[Segment]


@dataclass(frozen=True)
class Sample:
    """What a scan of rows says about the length limit."""

    rows: int
    over_length: int
    tokens: int
    targets: int
    lost_targets: int


def main(config: InspectConfig) -> int:
    """Print rows and shares; returns the exit code."""
    rows = open_rows(config.data.path, config.data.split, config.data.format)
    tokenizer = load_tokenizer(config.model.path, config.model.revision)
    renderer = Renderer(tokenizer, config.objective.kind)
    shown = [show(rows, i, renderer, config.batch) for i in range(min(config.rows, len(rows)))]
    sample = scan(rows, renderer, config)
    template = _template(renderer, rows[0].kind)
    consent = ends_soon(rows, datetime.datetime.now(datetime.UTC).date())
    if config.as_json:
        whole = {"template": template, "rows": [asdict(s) for s in shown], "scan": asdict(sample),
                 "consent": consent}  # fmt: skip
        print(json.dumps(whole, ensure_ascii=False, indent=2))
    else:
        _print(template, shown, sample, config)
        print("".join(f"{line}\n" for line in consent), end="")
    return 0


def show(rows: Rows, index: int, renderer: Renderer, batch: InspectBatchConfig) -> Shown:
    """One row with the fate of each token under the length limit."""
    record = rows[index]
    example = renderer.render_many([record], [rows.where(index)])[0]
    kept, reason = _kept(example, batch)
    states = np.where(example.target, "trained", "masked").astype(object)
    states[kept:] = "cut"
    return Shown(
        where=rows.where(index),
        id=record.id,
        source=record.source,
        tokens=len(example.ids),
        trained=int(example.target[:kept].sum()),
        cut=len(example.ids) - kept,
        dropped=reason,
        segments=_segments(example.ids, states.tolist(), renderer),
    )


def scan(rows: Rows, renderer: Renderer, config: InspectConfig) -> Sample:
    """Lengths of up to `config.scan` rows at even distances."""
    picked = np.unique(np.linspace(0, len(rows) - 1, min(config.scan, len(rows))).astype(np.int64))
    over = tokens = targets = lost = 0
    for start in range(0, len(picked), 256):
        part = picked[start : start + 256].tolist()
        examples = renderer.render_many([rows[i] for i in part], [rows.where(i) for i in part])
        for example in examples:
            kept, _ = _kept(example, config.batch)
            over += len(example.ids) > config.batch.max_length
            tokens += example.tokens
            targets += example.targets
            lost += int(example.target[kept:].sum())
    return Sample(len(picked), over, tokens, targets, lost)


def _kept(example: Example, batch: InspectBatchConfig) -> tuple[int, str]:
    """Tokens of an uncut example that the policy keeps, and why none are."""
    if example.tokens <= batch.max_length:
        return example.tokens, ""
    if batch.over_length == "truncate" and example.target[: batch.max_length].any():
        return batch.max_length, ""
    return 0, "no_answer_left" if batch.over_length == "truncate" else "over_length"


def _segments(ids: np.ndarray, states: list[State], renderer: Renderer) -> list[Segment]:
    segments, start = [], 0
    for state, group in groupby(states):
        size = len(list(group))
        text = renderer.tokenizer.decode(ids[start : start + size].tolist())
        segments.append(Segment(state, size, str(text)))
        start += size
    return segments


def _template(renderer: Renderer, kind: str) -> dict[str, Any]:
    """How masks are found; `end_of_turn` None means that the model will not learn to stop."""
    found: dict[str, Any] = {"kind": kind, "name": None, "serves_what_it_trains": True}
    if kind != "messages":
        return {**found, "end_of_turn": renderer.tokenizer.eos_token}
    template = renderer.template
    return {
        "kind": template.kind,
        "name": template.name,
        "serves_what_it_trains": template.serves_what_it_trains,
        "end_of_turn": template.end_of_turn,
    }


def _print(
    template: dict[str, Any], shown: list[Shown], sample: Sample, config: InspectConfig
) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"mask: {template['kind']}; end of turn: {template['end_of_turn']!r}", markup=False
    )
    if not template["serves_what_it_trains"]:
        console.print(
            "warning: the generation prompt is not how rendered answers start, so what is served "
            "differs from what is trained",
            style="yellow",
        )
    for row in shown:
        cut = f", {row.cut:,} cut" if row.cut else ""
        fate = f", dropped: {row.dropped}" if row.dropped else ""
        console.print(
            f"\n{row.where}  {row.id[:12]}  {row.tokens:,} tokens, "
            f"{row.trained:,} trained{cut}{fate}",
            style="bold",
            markup=False,
        )
        console.print(_coloured(row.segments))
    limit = config.batch.max_length
    share, lost = sample.over_length / sample.rows, sample.lost_targets / sample.targets
    console.print(
        f"\n{sample.rows:,} rows scanned: {sample.tokens / sample.rows:,.0f} tokens a row, "
        f"{sample.targets / sample.tokens:.1%} trained; {share:.2%} longer than {limit:,} tokens, "
        f"{lost:.2%} of answer tokens lost by batch.over_length={config.batch.over_length}"
    )


def _coloured(segments: list[Segment]) -> "Text":
    from rich.text import Text

    return Text.assemble(*((s.text.translate(SHOWN), STYLES[s.state]) for s in segments))
