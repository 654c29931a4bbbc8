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
    if not isinstance(rows, DatasetRows):
        return []
    ends = _ends(rows.path, rows.manifest)
    by_day: Counter[str] = Counter()
    for source, count in rows.sources().items() if ends else ():
        if source in ends:
            by_day[ends[source]] += count
    if ended := sum(count for day, count in by_day.items() if day < today.isoformat()):
        raise DataError(
            f"data.path: consent for {ended:,} of {len(rows):,} rows of {rows.path} has ended; "
            f"tuneloom erase consent={today} shows where they went and takes them out"
        )
    return [
        f"data: consent for {count:,} of {len(rows):,} rows ends on {day}"
        for day, count in sorted(by_day.items())
        if day <= (today + SOON).isoformat()
    ]


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
