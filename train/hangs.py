"""What ranks that hang have written, and what is made of it. Without torch: the launcher reads it.

Files are those of `train/watchdog.py`.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = "hang"
SLOW_START = "start-up stall"
STALLS = {"data": "data stall", "checkpoint": "save stall", "evaluation": "evaluation stall",
          "startup": SLOW_START}  # fmt: skip


@dataclass(frozen=True)
class Standing:
    """Where one rank stands."""

    rank: int
    host: str
    pid: int
    step: int
    """The last one that is done."""
    phase: str
    line: str
    """Innermost line of this project that the main thread is in."""
    collective: str | None
    """The collective that it waits in, None when it computes, reads or sleeps."""


@dataclass(frozen=True)
class Seen:
    """A rank's last beat."""

    standing: Standing
    seconds_ago: float


@dataclass(frozen=True)
class Report:
    kind: str
    ranks: list[int]
    sentence: str


def write(path: Path, content: Standing | Report) -> None:
    """Whole or not at all: others may read it now."""
    torn = path.with_suffix(".tmp")
    torn.write_text(json.dumps(asdict(content), indent=1) + "\n", encoding="utf-8")
    torn.replace(path)


def standings(folder: Path, *, since: float) -> list[Standing]:
    """What ranks wrote after `since` (seconds of the epoch), in rank order."""
    return [standing for standing, at in written(folder, "rank") if at >= since]


def written(folder: Path, kind: str) -> list[tuple[Standing, float]]:
    """Files of a kind, in rank order, with the seconds of the epoch at which they were written."""
    found = []
    for file in sorted(folder.glob(f"{kind}-*.json")):
        with suppress(FileNotFoundError):  # of a rank that is closing
            text, at = file.read_text(encoding="utf-8"), file.stat().st_mtime
            found.append((Standing(**json.loads(text)), at))
    return found


def last_report(run: Path, *, since: float) -> Report | None:
    """What the watchdogs of a run wrote after `since`, None when they wrote nothing."""
    path = run / FOLDER / "report.json"
    if not path.exists() or path.stat().st_mtime < since:
        return None
    return Report(**json.loads(path.read_text(encoding="utf-8")))


def judge(
    found: list[Standing], hosts: list[str], seconds: float, beats: Mapping[int, Seen]
) -> Report:
    """Which ranks the others wait for, and why; `hosts` holds every rank's, in rank order, and
    `beats` tells where a rank stood that does not answer.
    """
    silent = sorted(set(range(len(hosts))) - {s.rank for s in found})
    head = f"no progress for {seconds:.0f} s; "
    if silent:
        named = ", ".join(
            f"rank {rank} on {hosts[rank]} does not answer{_last_seen(beats.get(rank))}"
            for rank in silent
        )
        others = f"; rank {found[0].rank} waits at {found[0].line}"
        return Report("missing rank", silent, f"{head}missing rank: {named}{others}")
    working = [s for s in found if s.collective is None]
    if working:
        kind = STALLS.get(working[0].phase, "stalled rank")
        at = "; ".join(f"rank {s.rank} on {s.host} stands at {s.line}" for s in working)
        longer = "; raise train.hang_seconds if it only takes longer" if kind == SLOW_START else ""
        return Report(kind, [s.rank for s in working], f"{head}{kind}: {at}{longer}")
    at = "; ".join(f"rank {s.rank} on {s.host} is in {s.collective} at {s.line}" for s in found)
    if len({(s.collective, s.line) for s in found}) == 1:
        return Report(
            "no connection", [s.rank for s in found],
            f"{head}no connection: all ranks wait in the same call and nothing passes; look at the "
            f"network between the hosts; {at}",
        )  # fmt: skip
    return Report(
        "mismatched collective", [s.rank for s in found], f"{head}mismatched collective: {at}"
    )


def _last_seen(beat: Seen | None) -> str:
    if beat is None:
        return ""
    at = beat.standing
    return (
        f", last seen {beat.seconds_ago:.0f} s ago after step {at.step} in phase {at.phase} at "
        f"{at.line}"
    )
