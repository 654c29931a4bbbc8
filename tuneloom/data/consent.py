"""Consent that ends: rows that a run may no longer read, and those for which the day is near.

A source's `consent_until` stands in the dataset's manifest; a mixture has that of its parts, as far
as they still stand beside it.
"""

import datetime
from collections import Counter
from pathlib import Path
from typing import Any

from tuneloom.data.rows import DatasetRows, Rows, manifest_of
from tuneloom.errors import DataError

SOON = datetime.timedelta(days=30)


def refuse_ended(rows: Rows, today: datetime.date) -> list[str]:
    """Raise DataError where consent for any row has ended; a line for each day that is near."""
    by_day = rows_by_day(rows)
    ended = sum(count for day, count in by_day.items() if day < today.isoformat())
    if ended and isinstance(rows, DatasetRows):
        raise DataError(
            f"data.path: consent for {ended:,} of {len(rows):,} rows of {rows.path} has ended; "
            f"tuneloom erase consent={today} shows where they went and takes them out"
        )
    return [f"data: {line}" for line in ends_soon(rows, today)]


def ends_soon(rows: Rows, today: datetime.date) -> list[str]:
    """A line for each day, past or near, on which consent for some rows ends."""
    return [
        f"consent for {count:,} of {len(rows):,} rows "
        + (f"ends on {day}" if day >= today.isoformat() else
           f"ended on {day}; tuneloom erase consent={today} takes them out")
        for day, count in sorted(rows_by_day(rows).items())
        if day <= (today + SOON).isoformat()
    ]  # fmt: skip


def rows_by_day(rows: Rows) -> Counter[str]:
    """Rows by the last day of their consent, for those that have one."""
    by_day: Counter[str] = Counter()
    if isinstance(rows, DatasetRows) and (ends := _ends(rows.path, rows.manifest)):
        for source, count in rows.sources().items():
            if source in ends:
                by_day[ends[source]] += count
    return by_day


def _ends(folder: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """The last day of consent by source, as the rows name sources."""
    found = {}
    for part in manifest.get("created_from", []):
        if until := (part.get("provenance") or {}).get("consent_until"):
            found[part["name"]] = until
        parent = folder.resolve().parent / part.get("dataset", "-")
        if "dataset" in part and parent.is_dir():
            name = part["dataset"].split("@")[0]
            inner = _ends(parent, manifest_of(parent))
            found |= {f"{name}/{source}": until for source, until in inner.items()}
    return found
