"""Golden rows: proposed, reviewed by people, sealed, retired; a log of events that is never edited.

A row is known by the id of its content, so changing it makes another row: what is golden stays as
it was approved. Each line of events.jsonl holds the digest of the line before it; an edited log is
refused. Whoever proposed a row does not count as its reviewer.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tuneloom.data.lock import alone_in
from tuneloom.data.records import Record, canonical, parse
from tuneloom.errors import DataError, RefusedError

Status = Literal["draft", "reviewed", "golden", "refused", "retired"]
CLOSED: tuple[Status, ...] = ("golden", "refused", "retired")


@dataclass
class Row:
    """One record and what people said of it."""

    record: Record
    proposed_by: str
    approved_by: list[str] = field(default_factory=list)
    refused_by: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    retired: bool = False

    def status(self, reviewers: int) -> Status:
        """Golden with `reviewers` approvals by others than the proposer and no refusal."""
        if self.retired:
            return "retired"
        if self.refused_by:
            return "refused"
        if len(self.approved_by) >= reviewers:
            return "golden"
        return "reviewed" if self.approved_by else "draft"


class Golden:
    """A folder with events.jsonl, read whole; what happens is appended by `write`."""

    def __init__(self, folder: Path, *, reviewers: int) -> None:
        self.log, self.reviewers = folder / "events.jsonl", reviewers
        self.rows: dict[str, Row] = {}
        self.head = ""
        self.fresh: list[str] = []
        for number, line in enumerate(self._lines(), 1):
            try:
                event = json.loads(line)
                followed = event["previous"] == self.head
            except (ValueError, KeyError, TypeError):  # cut off, or no event
                followed = False
            if not followed:
                raise DataError(
                    f"{self.log}:{number}: the log was edited or cut off; restore it from a copy"
                )
            self.head = digest(line)
            self._apply(event)

    @classmethod
    @contextmanager
    def alone(cls, folder: Path, *, reviewers: int) -> Iterator["Golden"]:
        """The set, which nobody else changes meanwhile: all that is done to it, or nothing."""
        folder.mkdir(parents=True, exist_ok=True)
        with alone_in(folder):
            golden = cls(folder, reviewers=reviewers)
            yield golden
            golden.write()

    def write(self) -> None:
        """Append what happened since the log was read; on disk when this returns, or RefusedError
        and nothing is.
        """
        if not self.fresh:
            return
        with self.log.open("ab") as file:
            end = file.tell()
            try:
                file.write("".join(self.fresh).encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                os.truncate(self.log, end)
                raise RefusedError(
                    f"{self.log}: cannot be written ({error.strerror}), so nothing was entered"
                ) from None
        self.fresh = []

    def _lines(self) -> Iterator[str]:
        if self.log.exists():
            with self.log.open(encoding="utf-8") as file:
                yield from (line.removesuffix("\n") for line in file)

    def of(self, status: Status) -> list[Row]:
        """The rows of one status, by id."""
        chosen = [row for row in self.rows.values() if row.status(self.reviewers) == status]
        return sorted(chosen, key=lambda row: row.record.id)

    def propose(self, record: Record, by: str) -> bool:
        """Enter a row as a draft; False when it is here already, in whatever status."""
        if record.id in self.rows:
            return False
        self._append("propose", record.id, by, content=record.content, source=record.source)
        return True

    def decide(
        self, row_id: str, decision: Literal["approve", "refuse"], by: str, note: str = ""
    ) -> None:
        """One reviewer's word on a draft; raises RefusedError where the rules forbid it."""
        row = self._row(row_id)
        status = row.status(self.reviewers)
        if status in CLOSED:
            raise RefusedError(
                f"golden: {row_id[:12]} is {status} and cannot change; propose another"
            )
        if same_person(by, row.proposed_by):
            raise RefusedError(f"golden: {by} proposed {row_id[:12]} and cannot review it")
        if any(same_person(by, other) for other in row.approved_by):
            raise RefusedError(f"golden: {by} has reviewed {row_id[:12]} before; another must")
        self._append(decision, row_id, by, note=note)

    def closed(self, row_id: str) -> bool:
        """True for a row on which nothing more can be decided."""
        return self._row(row_id).status(self.reviewers) in CLOSED

    def retire(self, row_id: str, by: str, note: str) -> None:
        """Take a row out of use; it stays in the log."""
        if self._row(row_id).retired:
            raise RefusedError(f"golden: {row_id[:12]} is retired already")
        self._append("retire", row_id, by, note=note)

    def _row(self, row_id: str) -> Row:
        found = (
            [known for known in self.rows if known.startswith(row_id)] if len(row_id) >= 8 else []
        )
        if len(found) != 1:
            raise DataError(f"golden: {len(found)} rows begin with {row_id!r}; give the whole id")
        return self.rows[found[0]]

    def _append(self, event: str, row_id: str, by: str, **more: Any) -> None:
        if not by.strip():
            raise DataError("by: required, but not given; set by=NAME")
        whole = self._row(row_id).record.id if event != "propose" else row_id
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        entry = {"event": event, "id": whole, "by": by, "at": at, "previous": self.head, **more}
        line = canonical(entry)
        self.fresh.append(line + "\n")
        self.head = digest(line)
        self._apply(entry)

    def _apply(self, event: dict[str, Any]) -> None:
        if event["event"] == "propose":
            record = parse(event["content"], source=event["source"], where=str(self.log))
            self.rows[event["id"]] = Row(record, event["by"])
            return
        row = self.rows[event["id"]]
        if event.get("note"):
            row.notes.append(f"{event['by']}: {event['note']}")
        if event["event"] == "approve":
            row.approved_by.append(event["by"])
        elif event["event"] == "refuse":
            row.refused_by.append(event["by"])
        else:
            row.retired = True


def same_person(one: str, other: str) -> bool:
    """Whether two names are one person's, whatever the case and the blanks around them."""
    return one.strip().casefold() == other.strip().casefold()


def digest(line: str) -> str:
    return hashlib.sha256(line.encode("utf-8")).hexdigest()
