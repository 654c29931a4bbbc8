"""Golden rows to Argilla and back, as the JSON that its SDK writes and reads (argilla 2.8.0).

settings.json is for `rg.Settings.from_json`, records.json for `dataset.records.from_json`; what
`dataset.records.to_json` wrote goes back in. No server and no SDK are needed here.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tuneloom.data.curate import Row
from tuneloom.data.review_page import text_of
from tuneloom.errors import DataError

DECISION, NOTE = "decision", "note"


def write(folder: Path, rows: list[Row], *, reviewers: int) -> None:
    """argilla/settings.json and argilla/records.json; each record wants `reviewers` answers."""
    folder.mkdir(exist_ok=True)
    records = [
        {
            "id": row.record.id,
            "fields": {"text": text_of(row)},
            "metadata": {"source": row.record.source, "proposed_by": row.proposed_by},
        }
        for row in rows
    ]
    for name, said in (("settings", _settings(reviewers)), ("records", records)):
        text = json.dumps(said, ensure_ascii=False, indent=1)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def decisions(
    records: list[dict[str, Any]], people: Mapping[str, str]
) -> Iterator[tuple[str, str, str, str]]:
    """Id, decision, reviewer, note of every answer to a record that has all it wants.

    An answer names its user by a UUID only, and the rule that two others approve needs names.
    The export does not tell drafts from answers, so only what Argilla calls completed is read.
    """
    done = [record for record in records if record["status"] == "completed"]
    if len(done) < len(records):
        print(f"{len(records) - len(done):,} records still wait for answers in Argilla")
    for record in done:
        given = record.get("responses") or {}
        notes = {entry["user_id"]: entry["value"] for entry in given.get(NOTE) or []}
        for entry in given.get(DECISION) or []:
            user = entry["user_id"]
            if user not in people:
                raise DataError(
                    f"decisions: Argilla's user {user} has no name; set 'people={{{user}: NAME}}'"
                )
            yield record["id"], entry["value"], people[user], notes.get(user) or ""


def _settings(reviewers: int) -> dict[str, Any]:
    """One text to read, one label to choose, one note to write."""
    labels = [{"text": word, "value": word} for word in ("approve", "refuse")]
    plain = {"type": "text", "use_markdown": False}
    return {
        "guidelines": "Approve a row only if you would vouch for its answer as it stands.",
        "fields": [_part("text", "The row", plain)],
        "questions": [
            _part(DECISION, "Is it golden?", {"type": "label_selection", "options": labels}),
            _part(NOTE, "Why", plain) | {"required": False},
        ],
        "metadata": [
            {"name": name, "title": name, "settings": {"type": "terms"}}
            for name in ("source", "proposed_by")
        ],
        "vectors": [],
        "allow_extra_metadata": False,
        "distribution": {"strategy": "overlap", "min_submitted": reviewers},
        "mapping": None,
    }


def _part(name: str, title: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "title": title, "settings": settings, "required": True}
