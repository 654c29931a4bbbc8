"""`tuneloom report run=runs/ID`: one self-contained page on a run, for people and for the record.

Every figure is read from a file of the run folder; what was not measured is said to be missing.
No script, no external address; what came from data is escaped.
"""

import json
from pathlib import Path
from typing import Any

from tuneloom.config import Config, OutFile, write_out
from tuneloom.errors import DONE, ConfigError, DataError
from tuneloom.evals import evaluation, formats, page
from tuneloom.evals.evaluation import Evaluation
from tuneloom.evals.runs import open_run

TEMPLATE = "report.html.jinja"


class ReportConfig(Config):
    run: str
    """Run folder, such as runs/RUN_ID."""
    task: str | None = None
    """Evaluation that leads the page; by default the newest."""
    out: OutFile | None = None
    """File to write; by default report.html in the run folder."""


CONFIG = ReportConfig


def main(config: ReportConfig) -> int:
    """Write the page and say where."""
    path = write(Path(config.run), task=config.task, out=Path(config.out) if config.out else None)
    print(f"report: {path}")
    return DONE


def write(run: Path, *, task: str | None = None, out: Path | None = None) -> Path:
    """Read the run, render the page, write it in one move."""
    path = out or run / "report.html"
    text = render(gather(run, task=task))
    write_out(path, text)
    return path


def render(record: page.Record) -> str:
    """The page of a run's record."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= formats.FILTERS
    return environment.get_template(TEMPLATE).render(page.view(record))


def gather(run: Path, *, task: str | None = None) -> page.Record:
    """Everything the page is made of; only config.yaml has to be there."""
    _, config = open_run(str(run))
    text = (run / "config.yaml").read_text("utf-8")
    evaluations = _evaluations(run)
    facts = _json(run / "run.json") or {}
    return page.Record(
        folder=str(run),
        config=config,
        config_text=text,
        facts=facts,
        metrics=_lines(run / "metrics.jsonl"),
        evaluations=evaluations,
        lead=_lead(run, evaluations, task),
        ledger=_json(run / "ledger.json"),
        manifest=_manifest(config, facts),
        effects=_json(run / "effects.json"),
        drill=_json(run / "drill" / "drill.json"),
        samples=_lines(run / "samples.jsonl"),
        exports=_exports(run),
    )


def _evaluations(run: Path) -> list[Evaluation]:
    """All evaluations of the run, the newest first."""
    files = sorted((run / "evals").glob("*.json"), key=lambda f: -f.stat().st_mtime)
    return [evaluation.read(file) for file in files]


def _lead(run: Path, found: list[Evaluation], task: str | None) -> Evaluation | None:
    """The evaluation that the verdict is about."""
    if task is None:
        return found[0] if found else None
    for one in found:
        if one.task == task:
            return one
    names = ", ".join(one.task for one in found) or "none"
    raise ConfigError(f"task: {run}/evals has no {task!r}, only: {names}")


def _exports(run: Path) -> list[dict[str, Any]]:
    """Contracts of what was exported, with the bytes of the weights."""
    found = []
    for folder in sorted((run / "export").glob("*")):
        contract = _json(folder / "contract.json")
        if contract is not None:
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            found.append({**contract, "folder": str(folder), "bytes": size})
    return found


def _manifest(config: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of the dataset trained on; None where the folder holds another by now."""
    from tuneloom.data.rows import open_rows

    folder = Path(config["data"]["path"])
    manifest = _json(folder / "manifest.json") if folder.is_dir() else None
    if manifest is None:
        return None
    now = open_rows(folder, config["data"]["split"], verify=False).digest
    trained_on = (facts.get("dataset") or {}).get("digest")
    return manifest if trained_on in (None, now) else None


def _json(path: Path) -> Any:
    """A JSON file, None where there is none; DataError for a broken one."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: broken JSON ({error}); remove the file") from error


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; a torn last line, of a killed writer, is left out."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text("utf-8").split("\n") if line.strip()]
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(f"{path}:{number}: broken JSON ({error}); remove the line") from error
    return found
