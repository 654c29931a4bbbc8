"""What stands beside a dataset's shards for people and tools: card, report, Croissant."""

from pathlib import Path
from typing import Any

from tuneloom.data.card import card
from tuneloom.data.croissant import croissant
from tuneloom.data.report import report
from tuneloom.data.store import write_json


def write_paperwork(folder: Path, manifest: dict[str, Any]) -> None:
    """card.md, report.html and croissant.json, from the manifest and the files beside it."""
    (folder / "card.md").write_text(card(manifest), encoding="utf-8", newline="\n")
    (folder / "report.html").write_text(report(folder, manifest), encoding="utf-8", newline="\n")
    write_json(folder / "croissant.json", croissant(manifest))
