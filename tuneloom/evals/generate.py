"""`tuneloom generate run=runs/ID prompt="..."`: stream the answer to a prompt, or answer a file.

With `data.path=` each record's last answer is left out, rendered as in training, and answered; one
JSON line a record goes to `out`, or to the terminal.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from tuneloom.config import Config, OutFile, write_out
from tuneloom.data.records import Format
from tuneloom.errors import DONE, ConfigError, DataError
from tuneloom.evals.model import Device, Dtype, Loaded, load
from tuneloom.evals.runs import open_run, weights_of
from tuneloom.registry.adapters import is_adapter


class GenerateModel(Config):
    path: str | None = None
    """Base, or whole model: a folder or hub id; not needed with `run`."""
    revision: str | None = None
    dtype: Dtype = "auto"
    """`auto`: that of training, else that of the stored weights."""


class GenerateData(Config):
    path: str | None = None
    """Dataset folder or JSONL whose records are answered."""
    split: str = "test"
    format: Format = "auto"


class GenerateConfig(Config):
    """Answer with a base, a base and an adapter, or what a run exported."""

    run: str | None = None
    """Run folder: its base and its export."""
    model: GenerateModel = GenerateModel()
    adapter: str | None = None
    """Folder that `tuneloom export` wrote; refused on a base with another digest."""
    prompt: str | None = None
    """One user message; `-` reads it from standard input."""
    system: str | None = None
    """System message before `prompt`."""
    data: GenerateData = GenerateData()
    limit: Annotated[int, Field(ge=0)] = 0
    """Answer at most this many records; 0 is all."""
    out: OutFile | None = None
    """JSONL file for the answers to `data.path`; none writes to the terminal."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 256
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the likeliest token each time."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of sampling, at a temperature above 0."""
    device: Device = "auto"

    @model_validator(mode="after")
    def one_source_one_question(self) -> "GenerateConfig":
        if (self.run is None) == (self.model.path is None):
            raise ValueError("run, model.path: expected exactly one; set run=runs/ID")
        if self.run is not None and (self.adapter or self.model.revision):
            raise ValueError(
                "run, adapter, model.revision: a run brings its own base and export; drop them"
            )
        if (self.prompt is None) == (self.data.path is None):
            raise ValueError("prompt, data.path: expected exactly one of the two")
        if self.prompt is None and self.system is not None:
            raise ValueError("system: goes with prompt; records of data.path bring their own")
        return self


CONFIG = GenerateConfig
TEXT_KEYS = ("prompt", "system")
"""Overrides that the command takes as they are typed, commas and colons and all."""


def main(config: GenerateConfig) -> int:
    """Load, answer, exit code."""
    loaded = open_model(config)
    if config.temperature > 0:
        import torch

        torch.manual_seed(config.seed)
    if config.prompt is not None:
        answer_prompt(loaded, config)
    else:
        answer_records(loaded, config)
    return DONE


def open_model(config: GenerateConfig) -> Loaded:
    """The model that the config names, checked against its contract."""
    options: dict[str, Any] = {"device": config.device, "dtype": config.model.dtype}
    if config.run is None:
        assert config.model.path is not None, "validated by the config"
        revision = config.model.revision
        return load(config.model.path, adapter=config.adapter, revision=revision, **options)
    folder, trained = open_run(config.run)
    left = weights_of(folder, trained)
    if not is_adapter(left.folder):
        return load(str(left.folder), **options)
    return load(
        trained["model"]["path"],
        adapter=str(left.folder),
        revision=trained["model"]["revision"],
        contract=left.contract,
        **options,
    )


def answer_prompt(loaded: Loaded, config: GenerateConfig) -> str:
    """Stream the answer to one prompt to the terminal."""
    from tuneloom.data.records import parse
    from tuneloom.evals.decode import stream

    text = sys.stdin.read().rstrip("\n") if config.prompt == "-" else config.prompt
    messages = [{"role": "system", "content": config.system}] if config.system else []
    # The last answer is what prompt_ids leaves out, so a record needs one.
    turns = [*messages, {"role": "user", "content": text}, {"role": "assistant", "content": "?"}]
    ids = loaded.renderer.prompt_ids(parse({"messages": turns}))
    _fits(loaded, len(ids), config.max_new_tokens)

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    answer = stream(
        loaded,
        ids,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        write=write,
    )
    write("\n")
    return answer


def answer_records(loaded: Loaded, config: GenerateConfig) -> list[dict[str, Any]]:
    """Answer each record of a file or dataset; one JSON object a record, in the file's order."""
    from tuneloom.data.rows import open_rows
    from tuneloom.evals.decode import answers

    assert config.data.path is not None, "validated by the config"
    rows = open_rows(config.data.path, split=config.data.split, format=config.data.format)
    count = min(len(rows), config.limit or len(rows))
    if count == 0:
        raise DataError(f"{config.data.path}: no rows to answer in split {config.data.split}")
    renderer = loaded.renderer
    records = [rows[i] for i in range(count)]
    prompts = [list(renderer.prompt_ids(record)) for record in records]
    _fits(loaded, max(len(prompt) for prompt in prompts), config.max_new_tokens)
    texts = answers(
        loaded, prompts, max_new_tokens=config.max_new_tokens, temperature=config.temperature
    )
    found = [
        {"id": record.id, "prompt_tokens": len(prompt), "answer": text}
        for record, prompt, text in zip(records, prompts, texts, strict=True)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    if config.out is None:
        sys.stdout.write(lines)
    else:
        write_out(Path(config.out), lines)
        print(f"{len(found)} answers in {config.out}")
    return found


def _fits(loaded: Loaded, prompt_tokens: int, max_new_tokens: int) -> None:
    """Refuse a prompt that leaves no room for an answer."""
    if prompt_tokens + max_new_tokens > loaded.context_length():
        raise ConfigError(
            f"max_new_tokens: a prompt of {prompt_tokens} tokens and {max_new_tokens} new ones "
            f"pass the model's {loaded.context_length()}; lower max_new_tokens or cut the prompt"
        )
