"""Golden rows are never trained on: what a run reads is held against every golden set first.

By the hash of the record, its question, a shared run of words, and MinHash, as at ingest
(`contamination.py`). A dataset whose manifest says that ingest dropped what this very set knows is
believed; anything else is read through once, before the first step.
"""

from glob import glob
from pathlib import Path

from tuneloom.data.contamination import AgainstConfig, Contamination, EvaluationSet
from tuneloom.data.dedupe import NearConfig
from tuneloom.data.questions import asked_and_answered, hash64
from tuneloom.data.rows import DatasetRows, Rows, open_rows
from tuneloom.errors import ConfigError, DataError

SHOWN = 5


def refuse_golden(rows: Rows, sets: list[str]) -> list[str]:
    """Raise DataError when `rows` hold anything that a golden set knows; returns what was checked.

    `sets` are files that `tuneloom golden action=seal` wrote, or globs of such.
    """
    paths = golden_files(sets)
    unchecked = [path for path in paths if not _dropped_at_ingest(rows, path)]
    if unchecked:
        _scan(rows, unchecked)
    return [str(path) for path in paths]


def golden_files(sets: list[str]) -> list[Path]:
    """The files that are there; a plain path that is not there is an error, a glob is not."""
    found: list[Path] = []
    for pattern in sets:
        matches = sorted(map(Path, glob(pattern))) if "*" in pattern else [Path(pattern)]
        if "*" not in pattern and not matches[0].exists():
            raise ConfigError(f"data.golden: no file {pattern!r}; run tuneloom golden action=seal")
        found += matches
    return found


def _dropped_at_ingest(rows: Rows, path: Path) -> bool:
    if not isinstance(rows, DatasetRows):
        return False
    manifest = rows.manifest
    if manifest.get("recipe", {}).get("against", {}).get("action") == "list":
        return False
    known = {entry["digest"] for entry in manifest.get("against", [])}
    return open_rows(path).digest in known


def _scan(rows: Rows, paths: list[Path]) -> None:
    sets = [
        EvaluationSet(name=f"golden-{number}", path=str(path))
        for number, path in enumerate(paths)
    ]  # fmt: skip
    known = Contamination(AgainstConfig(sets=sets), NearConfig())
    hits: list[str] = []
    count = 0
    for index in range(len(rows)):
        record = rows[index]
        hit = known.hit(record.id, hash64(asked_and_answered(record.content)[0]), record.content)
        if hit is not None:
            count += 1
            name, _, kind = hit.partition(":")
            if count <= SHOWN:
                golden = paths[int(name.removeprefix("golden-"))]
                hits.append(f"{rows.where(index)} ({kind}, {golden})")
    if count:
        more = f" and {count - SHOWN:,} more" if count > SHOWN else ""
        raise DataError(
            f"data.golden: {count:,} of {len(rows):,} training rows are known to a golden set: "
            f"{'; '.join(hits)}{more}; ingest again with data.against.sets naming it"
        )
