"""run.json, as those that hand on or use a run's weights read it."""

import json
from pathlib import Path
from typing import Any

from tuneloom.errors import RefusedError


def record_of(run: Path) -> dict[str, Any]:
    """run.json, empty where there is none."""
    path = run / "run.json"
    facts: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return facts


def refuse_unfinished(run: Path) -> None:
    """Weights that the run itself refused, for instance in its drill, are not handed on, nor those
    that it has gone on from.
    """
    facts = record_of(run)
    state = facts.get("state", "done")
    if state == "failed":
        reason = " ".join(facts.get("error") or ["no reason was recorded"])
        raise RefusedError(f"{run}: the run failed ({reason}); resume or repeat it, then export")
    if state != "done":
        raise RefusedError(
            f"{run}: its weights are of an earlier end, as the run was taken up again and is "
            f"{state}; train it to the end, then export"
        )
