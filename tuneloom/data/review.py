"""`tuneloom golden action=propose|queue|decide|retire|seal|status`: people decide what is golden.

`queue` writes a static page to read and decide on without a server, and the same rows as JSONL and
as Label Studio tasks and Argilla records; the decisions that the page, Label Studio or Argilla
saves go back in with `decide`.
`seal` writes golden.jsonl: an evaluation set, and what `data.against` keeps out of training.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from tuneloom.config import Config
from tuneloom.data import argilla
from tuneloom.data.curate import Golden, Row, Status
from tuneloom.data.recipe import Name
from tuneloom.data.review_page import page, text_of
from tuneloom.data.rows import open_rows
from tuneloom.errors import ConfigError, DataError, RefusedError

STATUSES: tuple[Status, ...] = ("draft", "reviewed", "golden", "refused", "retired")


class GoldenConfig(Config):
    action: Literal["propose", "queue", "decide", "retire", "seal", "status"] = "status"
    name: Name
    """The golden set; its folder is ROOT/NAME."""
    root: str = "golden"
    reviewers: Annotated[int, Field(ge=1)] = 2
    """Approvals a row needs, each by another person and none by its proposer."""
    by: str = ""
    """Who is doing this."""
    source: str | None = None
    """propose: a JSONL file of records or a dataset folder."""
    split: str = "validation"
    """propose: the split of a dataset folder."""
    id: str | None = None
    """decide, retire: one row, by its id or the first 8 digits or more."""
    decision: Literal["approve", "refuse"] | None = None
    """decide: on that one row."""
    decisions: str | None = None
    """decide: a file of decisions, from the page (JSONL), Label Studio or Argilla (JSON)."""
    people: dict[str, str] | None = None
    """decide: names of the users that the file knows by another one, as Argilla's UUIDs or
    Label Studio's numbers."""
    note: str = ""

    @field_validator("people", mode="before")
    @classmethod
    def numbers_are_names(cls, value: Any) -> Any:
        return {str(k): v for k, v in value.items()} if isinstance(value, dict) else value


CONFIG = GoldenConfig
TEXT_KEYS = ("id", "by", "note")
Decided = tuple[str, Literal["approve", "refuse"], str, str]


def main(config: GoldenConfig) -> int:
    """Do the action, then print how many rows have which status."""
    folder = Path(config.root) / config.name
    with Golden.alone(folder, reviewers=config.reviewers) as golden:
        ACTIONS[config.action](golden, folder, config)
    counted = Counter(row.status(config.reviewers) for row in golden.rows.values())
    print("  ".join(f"{status} {counted[status]:,}" for status in STATUSES))
    return 0


def propose(golden: Golden, folder: Path, config: GoldenConfig) -> None:
    """Enter every record of the source as a draft."""
    rows = open_rows(_needed(config.source, "source"), config.split)
    entered = sum(golden.propose(rows[i], config.by) for i in range(len(rows)))
    print(f"proposed {entered:,} rows, {len(rows) - entered:,} were here before")


def queue(golden: Golden, folder: Path, config: GoldenConfig) -> None:
    """Write what waits for a reviewer: queue.jsonl, review.html, labelstudio.json, argilla/."""
    waiting = [*golden.of("draft"), *golden.of("reviewed")]
    lines = [json.dumps(_entry(row), ensure_ascii=False) for row in waiting]
    (folder / "queue.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    (folder / "review.html").write_text(page(config.name, waiting), encoding="utf-8")
    tasks = [{"data": {"id": row.record.id, "text": text_of(row)}} for row in waiting]
    (folder / "labelstudio.json").write_text(
        json.dumps(tasks, ensure_ascii=False), encoding="utf-8"
    )
    argilla.write(folder / "argilla", waiting, reviewers=config.reviewers)
    print(f"{len(waiting):,} rows wait; open {folder / 'review.html'}")


def decide(golden: Golden, folder: Path, config: GoldenConfig) -> None:
    """Enter decisions, one from the command line or all of a file on rows that are still open."""
    if config.decisions is None:
        word = _word(_needed(config.decision, "decision"))
        golden.decide(_needed(config.id, "id"), word, config.by, config.note)
        return
    late = 0
    for row_id, decision, by, note in read_decisions(
        Path(config.decisions), config.by, people=config.people or {}
    ):
        if golden.closed(row_id):
            late += 1
        else:
            golden.decide(row_id, decision, by, note)
    if late:
        print(f"skipped {late:,} decisions on rows that were golden, refused or retired before")


def retire(golden: Golden, folder: Path, config: GoldenConfig) -> None:
    golden.retire(_needed(config.id, "id"), config.by, config.note)
    if (folder / "golden.jsonl").exists():
        print(f"{folder / 'golden.jsonl'} is as it was; seal the set again: action=seal")


def seal(golden: Golden, folder: Path, config: GoldenConfig) -> None:
    """Write the golden rows, by id, with who approved each; none left, remove their file."""
    path = folder / "golden.jsonl"
    rows = golden.of("golden")
    if not rows and golden.of("retired") and path.exists():
        path.unlink()
        print(f"removed {path}: all its rows are retired")
        return
    if not rows:
        raise RefusedError(
            f"seal: no row of {config.name} is golden; a row needs {config.reviewers} approvals, "
            "see action=queue and action=decide"
        )
    lines = (
        json.dumps({**row.record.content, "source": row.record.source,
                    "meta": {"proposed_by": row.proposed_by, "approved_by": row.approved_by}},
                   ensure_ascii=False, sort_keys=True)
        for row in rows
    )  # fmt: skip
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    print(f"{len(rows):,} golden rows in {path}\nnext: tuneloom ingest ... "
          f"'data.against.sets=[{{name: {config.name}, path: {path}}}]'")  # fmt: skip


def status(golden: Golden, folder: Path, config: GoldenConfig) -> None:
    """Nothing but what main prints for every action."""


ACTIONS = {"propose": propose, "queue": queue, "decide": decide, "retire": retire, "seal": seal,
           "status": status}  # fmt: skip


def read_decisions(path: Path, by: str, *, people: Mapping[str, str]) -> list[Decided]:
    """Id, decision, reviewer, note: from our page's JSONL, Label Studio's or Argilla's JSON."""
    try:
        found = _decisions(path.read_text("utf-8"), by, people)
        for entry in found:
            if not all(isinstance(part, str) for part in entry):
                raise DataError(
                    f"decisions: {path}: expected texts as id, by and note, got {entry}"
                )
        return found
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"decisions: {path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"decisions: {path} is not what the page, Label Studio or Argilla saves ({error!r})"
        ) from None


def _decisions(text: str, by: str, people: Mapping[str, str]) -> list[Decided]:
    """The same, of a file's text; whatever it lacks raises."""
    if text.lstrip().startswith("["):
        tasks = json.loads(text)
        if tasks and "fields" in tasks[0]:
            answers = argilla.decisions(tasks, people)
            return [(i, _word(word), name, note) for i, word, name, note in answers]
        return [entry for task in tasks for entry in _from_label_studio(task, by, people)]
    entries = [json.loads(line) for line in text.split("\n") if line.strip()]
    return [(e["id"], _word(e["decision"]), e.get("by") or by, e.get("note", "")) for e in entries]


def _from_label_studio(task: dict[str, Any], by: str, people: Mapping[str, str]) -> Any:
    """One decision for each annotation of a task that chose approve or refuse.

    A user known by a number needs a name: nobody may approve what they proposed themselves.
    """
    for annotation in task.get("annotations", []):
        person = annotation.get("completed_by")
        name = person.get("email") if isinstance(person, dict) else person or by
        if isinstance(name, int) and str(name) not in people:
            raise DataError(
                f"decisions: Label Studio's user {name} has no name; set 'people={{{name}: NAME}}'"
            )
        name = people.get(str(name), name)
        for result in annotation.get("result", []):
            for choice in result.get("value", {}).get("choices", []):
                yield task["data"]["id"], _word(choice), name, ""


def _word(value: str) -> Literal["approve", "refuse"]:
    if value == "approve":
        return "approve"
    if value == "refuse":
        return "refuse"
    raise DataError(f"decisions: expected approve or refuse, got {value!r}")


def _needed(value: str | None, key: str) -> str:
    if value is None:
        raise ConfigError(f"{key}: required for this action, but not given; set {key}=...")
    return value


def _entry(row: Row) -> dict[str, Any]:
    return {
        "id": row.record.id,
        "content": row.record.content,
        "source": row.record.source,
        "proposed_by": row.proposed_by,
        "approved_by": row.approved_by,
        "notes": row.notes,
    }
