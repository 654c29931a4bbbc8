"""What a data owner should know before signing: the points that the manifest leaves open."""

from collections.abc import Iterator, Mapping
from typing import Any


def open_points(manifest: Mapping[str, Any]) -> list[str]:
    """One sentence a point, none for a mixture, whose parts say it."""
    recipe = manifest["recipe"]
    if "provenance" not in recipe:
        return []
    return [*_sources(manifest), *_rows(manifest, recipe), *_not_looked_for(manifest, recipe)]


def _sources(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What is not known of a source, and until when its consent holds."""
    as_of = manifest["recipe"]["as_of"]
    for part in manifest["created_from"]:
        said = part.get("provenance")
        if not said or not part["kept"]:
            continue
        missing = [what for what in ("owner", "licence", "consent") if not said[what]]
        if missing:
            yield f"{part['name']} ({part['kept']:,} rows): no {', no '.join(missing)} is named."
        if until := said["consent_until"]:
            looked = f"as of {as_of}" if as_of else "not checked, since data.as_of names no day"
            yield f"{part['name']} ({part['kept']:,} rows): consent ends on {until} ({looked})."


def _rows(manifest: Mapping[str, Any], recipe: Mapping[str, Any]) -> Iterator[str]:
    """Doubtful rows that are in the dataset, and how much of the input is not."""
    conflicts, doubted = manifest["label_conflicts"], manifest.get("label_issues") or {}
    if conflicts and recipe["conflicts"] == "list":
        yield f"{conflicts:,} rows that another row contradicts are kept (data.conflicts=list)."
    if doubted.get("suspected") and recipe["label_issues"]["action"] == "list":
        yield f"{doubted['suspected']:,} rows whose label looks wrong are kept."
    privacy = recipe["privacy"]
    for entity, action in (privacy["actions"] or {}).items():
        if action == "keep":
            yield f"{entity} is not looked for and stays where it stands (data.privacy)."
    if privacy["default"] == "keep":
        yield "Personal data without an action of its own stays where it stands (data.privacy)."
    counts = manifest["counts"]
    if refused := manifest.get("refused_files"):
        yield f"{len(refused):,} files could not be read, and none of their rows is counted here."
    if rejected := sum(counts["rejected"].values()):
        share, most = rejected / counts["in"], recipe["max_rejected"]
        yield f"{rejected:,} rows ({share:.2%}) were no records; the recipe allows {most:.2%}."


def _not_looked_for(manifest: Mapping[str, Any], recipe: Mapping[str, Any]) -> Iterator[str]:
    """Checks that the recipe did not ask for."""
    if recipe["near"]["action"] == "off":
        yield "Near-duplicates were not looked for (data.near)."
    if not manifest["against"]:
        yield "No golden or evaluation set was held against the rows (data.against)."
    if manifest["labels"] and not manifest.get("label_issues"):
        yield "Labels were not held against the words of their rows (data.label_issues)."
