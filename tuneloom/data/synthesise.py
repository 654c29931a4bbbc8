"""`tuneloom synthesise name=.. seeds=.. teacher.model=..`: rows by a teacher, each on the record.

A teacher behind any OpenAI-style endpoint answers a prompt template filled with a seed row, or
fills the columns of a design by NeMo Data Designer; a judge, if one is named, scores the answer.
What comes out is raw JSONL for `tuneloom ingest`, each row with its teacher, the teacher's licence,
the digest of the prompt or design, the seed's id and the judge's score. The share of synthetic rows
is capped, and a request that was answered is not made again.
"""

import http.client
import json
import math
import os
import re
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from tuneloom.config import Config
from tuneloom.data import designer
from tuneloom.data.fields import MissingField, compile_template
from tuneloom.data.mapping import UnknownShape, mapper
from tuneloom.data.recipe import Name
from tuneloom.data.records import canonical, content_id, parse, text_digest
from tuneloom.data.rows import Rows, open_rows
from tuneloom.data.shards import write_whole
from tuneloom.errors import ConfigError, DataError

SCORE = re.compile(r"\b(10|[0-9])\b")


class TeacherConfig(Config):
    url: str = "http://localhost:8000/v1"
    """Base address of an OpenAI-style API; its key is read from OPENAI_API_KEY."""
    model: str
    licence: str
    """Whether its answers may train another model is for you to know; it is written to each row."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.7
    max_tokens: Annotated[int, Field(gt=0)] = 512
    timeout_seconds: Annotated[float, Field(gt=0)] = 120.0


class SynthesiseConfig(Config):
    name: Name
    """The output is OUT/NAME.jsonl."""
    seeds: str
    """A dataset folder or JSONL file whose rows fill the prompt."""
    split: str = "train"
    prompt: str | None = None
    """Template over the seed's content, such as 'Rephrase: {prompt}'; or else a design."""
    design: str | None = None
    """YAML of columns for NeMo Data Designer (an extra), which sees the seed's content."""
    record: dict[str, Any]
    """Templates of the new row over the seed's content and {answer}, or the design's columns."""
    teacher: TeacherConfig
    judge: str | None = None
    """Template over the same that asks for a score from 0 to 10; None asks for none."""
    min_score: Annotated[int, Field(ge=0, le=10)] = 7
    per_seed: Annotated[int, Field(gt=0)] = 1
    """Answers to ask for each seed, as far as max_share allows; a second one after all firsts."""
    max_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.3
    """Synthetic rows, of these and the seeds together."""
    parallel: Annotated[int, Field(gt=0)] = 8
    out: str = "raw/synthetic"

    @model_validator(mode="after")
    def one_source(self) -> "SynthesiseConfig":
        if (self.prompt is None) == (self.design is None):
            raise ValueError("set either prompt or design, and only one of them")
        return self


CONFIG = SynthesiseConfig


def main(config: SynthesiseConfig) -> int:
    """Ask, judge, write; print what became of the answers."""
    path, counts = synthesise(config)
    for what, number in counts.items():
        print(f"  {what:<24}{number:>10,}")
    print(f"{path}\nnext: tuneloom ingest data=... 'source=[...,{path}]'")
    return 0


def synthesise(config: SynthesiseConfig) -> tuple[Path, dict[str, int]]:
    """Write the synthetic rows; returns the file, whole or not there, and the counts; from
    `empty` on they add up to `asked`.

    Raises ConfigError for a template or design that is wrong, DataError for an endpoint that does
    not answer or says nothing that makes a record; what was answered is kept, so that the same
    command goes on from there.
    """
    seeds = open_rows(config.seeds, config.split)
    wanted = [i for _ in range(config.per_seed) for i in range(len(seeds))][: _most(config, seeds)]
    fields = [flat(seeds[i].content) for i in wanted]
    out = Path(config.out)
    teacher = Teacher(config.teacher, out / f".{config.name}.answers")
    judge = _naming("judge", compile_template(config.judge, key="judge")) if config.judge else None
    build = _naming("record", mapper(config.record))
    if config.design is None:
        made = _prompted(config, teacher, fields)
    else:
        made = designer.answers(
            designer.read_design(Path(config.design)), fields, teacher=config.teacher,
            parallel=config.parallel, cache=teacher.cache,
        )  # fmt: skip
    counts = {"over max_share": config.per_seed * len(seeds) - len(wanted), "asked": len(wanted),
              "empty": len(wanted), "no record": 0, "judged too low": 0, "a copy": 0,
              "written": 0}  # fmt: skip
    known = {seeds[i].id for i in range(len(seeds))}
    source = config.prompt or Path(str(config.design)).read_text(encoding="utf-8")
    origin = {
        "teacher": config.teacher.model,
        "teacher_licence": config.teacher.licence,
        "prompt_digest": text_digest(source),
    }

    def score(answer: tuple[int, dict[str, Any]]) -> tuple[int, dict[str, Any], int | None]:
        position, columns = answer
        if judge is None:
            return position, columns, None
        return position, columns, score_in(teacher.answer(judge(fields[position] | columns), 0))

    fault = ""
    whole, part = out / f"{config.name}.jsonl", out / f".{config.name}.jsonl.part"
    try:
        with ThreadPoolExecutor(config.parallel) as pool, part.open("w", encoding="utf-8") as file:
            for position, columns, points in pool.map(score, filter(_answered, made)):
                counts["empty"] -= 1
                try:
                    content = build(fields[position] | columns)
                    row_id = content_id(parse(content, where="record").content)
                except (UnknownShape, DataError) as error:
                    counts["no record"] += 1
                    fault = str(error)
                    continue
                if judge is not None and (points is None or points < config.min_score):
                    counts["judged too low"] += 1
                elif row_id in known:
                    counts["a copy"] += 1
                else:
                    known.add(row_id)
                    meta = origin | {"seed": seeds[wanted[position]].id, "score": points}
                    file.write(canonical(content | {"meta": {"synthetic": meta}}) + "\n")
                    counts["written"] += 1
        if counts["no record"] == counts["asked"] - counts["empty"] > 0:
            raise DataError(f"record: no answer of the teacher makes one, the last since {fault}")
        part.replace(whole)
    finally:
        part.unlink(missing_ok=True)
    return whole, counts


def _most(config: SynthesiseConfig, seeds: Rows) -> int:
    """Synthetic rows that max_share allows beside the seeds; raises ConfigError for none."""
    most = int(config.max_share / (1.0 - config.max_share) * len(seeds) + 1e-9)  # 0.6 of 50 is 30
    if not most:
        enough = math.ceil(1000 / (len(seeds) + 1)) / 1000
        raise ConfigError(
            f"max_share: {config.max_share} leaves no room for a row beside the seeds "
            f"({len(seeds)}); raise it to {enough} or give more seeds"
        )
    return most


def _prompted(
    config: SynthesiseConfig, teacher: "Teacher", fields: list[dict[str, Any]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The teacher's answer to the prompt for each seed, as (its position, {"answer": text})."""
    ask = _naming("prompt", compile_template(str(config.prompt), key="prompt"))
    attempts: Counter[str] = Counter()
    asked = []
    for position, seed in enumerate(fields):
        prompt = ask(seed)
        asked.append((position, prompt, attempts[prompt]))
        attempts[prompt] += 1
    with ThreadPoolExecutor(config.parallel) as pool:
        yield from pool.map(lambda a: (a[0], {"answer": teacher.answer(a[1], a[2])}), asked)


def _naming(key: str, fill: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`fill`, with a ConfigError in place of MissingField."""

    def named(fields: dict[str, Any]) -> Any:
        try:
            return fill(fields)
        except MissingField as missing:
            raise ConfigError(
                f"{key}: no field {missing.args[0]!r} among {', '.join(fields)}; write "
                f"{{{missing.args[0]}?}} if it may be missing"
            ) from None

    return named


def _answered(answer: tuple[int, dict[str, Any]]) -> bool:
    """Whether no column is blank."""
    return all(value.strip() for value in answer[1].values() if isinstance(value, str))


def flat(content: dict[str, Any]) -> dict[str, Any]:
    """A record's content with the last question and answer of a chat beside its messages."""
    if "messages" not in content:
        return dict(content)
    turns = content["messages"]
    said = {turn["role"]: turn.get("content") or "" for turn in turns}
    return {**content, "question": said.get("user", ""), "completion": said.get("assistant", "")}


def score_in(text: str) -> int | None:
    """The first whole number from 0 to 10 in a judge's answer."""
    found = SCORE.search(text)
    return int(found[1]) if found else None


class Teacher:
    """One chat completion a call; an answer that was had before comes from disk."""

    def __init__(self, config: TeacherConfig, cache: Path) -> None:
        self.config, self.cache = config, cache
        cache.mkdir(parents=True, exist_ok=True)

    def answer(self, prompt: str, attempt: int) -> str:
        """What the teacher says; raises DataError for an endpoint that does not answer."""
        body = {"model": self.config.model, "messages": [{"role": "user", "content": prompt}],
                "temperature": self.config.temperature, "max_tokens": self.config.max_tokens,
                "seed": attempt}  # fmt: skip
        path = self.cache / f"{text_digest(self.config.url + canonical(body))[:32]}.txt"
        if path.exists():
            return path.read_bytes().decode("utf-8")
        said = self._post(body).encode("utf-8", "replace")  # half a surrogate pair is no text
        write_whole(path, said)
        return said.decode("utf-8")

    def _post(self, body: dict[str, Any]) -> str:
        if not self.config.url.startswith(("http://", "https://")):
            raise ConfigError(f"teacher.url: expected http:// or https://, got {self.config.url!r}")
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{self.config.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
        )
        try:
            with urllib.request.urlopen(request, timeout=self.config.timeout_seconds) as response:
                return str(json.load(response)["choices"][0]["message"]["content"] or "")
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            raise DataError(
                f"teacher.url: no answer from {self.config.url} ({error}); answers so far are "
                "kept, the same command goes on from here"
            ) from None
