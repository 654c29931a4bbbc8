"""Consent that ends: rows that a run may no longer read, and those for which the day is near.

A source's `consent_until` stands in the dataset's manifest; a mixture's holds the terms of the
sources of its parts.
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
    if isinstance(rows, DatasetRows):
        terms = terms_of(rows.path, rows.manifest)
        ends = {source: said.get("consent_until") for source, said in terms.items()}
        for source, count in rows.sources().items() if any(ends.values()) else ():
            if until := ends.get(source):
                by_day[until] += count
    return by_day


def terms_of(folder: Path, manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was said of each source (licence, consent_until and more), as the rows name sources.

    Raises DataError for a mixture that does not say it where a part of it is gone.
    """
    found = {}
    for part in manifest.get("created_from", []):
        if said := part.get("provenance"):
            found[part["name"]] = said
        if "dataset" in part and manifest.get("mixture"):
            name = part["dataset"].split("@")[0]
            inner = part["terms"] if "terms" in part else _terms_beside(folder, part["dataset"])
            found |= {f"{name}/{source}": said for source, said in inner.items()}
    return found


def _terms_beside(folder: Path, part: str) -> dict[str, dict[str, Any]]:
    """The terms of a part of a mixture made before mixtures held them."""
    parent = folder.resolve().parent / part
    if not parent.is_dir():
        raise DataError(
            f"data.path: {folder} does not say until when consent holds for its rows, and "
            f"{part} is not beside it; put its manifest.json there, as {parent}/manifest.json, or "
            "mix again"
        )
    return terms_of(parent, manifest_of(parent))
