"""Recipes: those we ship compose, one's own folder is found, and every option is read by code."""

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from tuneloom.cli import main
from tuneloom.config import build, compose
from tuneloom.data.contamination import AgainstConfig, EvaluationSet
from tuneloom.data.curate import Golden
from tuneloom.data.dedupe import NearConfig
from tuneloom.data.erase import EraseConfig
from tuneloom.data.mix import MixConfig, Part, Rehearsal
from tuneloom.data.provenance import SourceInfo
from tuneloom.data.quality import QualityConfig
from tuneloom.data.recipe import IngestConfig, Recipe, SplitConfig, WithinConfig
from tuneloom.data.redact import PrivacyConfig, TenantRecogniser
from tuneloom.data.review import GoldenConfig
from tuneloom.data.sanitise import SanitiseConfig
from tuneloom.data.synthesise import SynthesiseConfig, TeacherConfig
from tuneloom.launch.ingest import IngestJob
from tuneloom.registry.lineage import LineageConfig

ROOT = Path(__file__).parents[2]
RECIPES = sorted(p.stem for p in (ROOT / "conf" / "ingest" / "data").glob("*.yaml"))
MODELS: list[type[BaseModel]] = [
    AgainstConfig, EraseConfig, EvaluationSet, GoldenConfig, IngestConfig, LineageConfig, MixConfig,
    NearConfig, Part, PrivacyConfig, QualityConfig, Recipe, Rehearsal, SanitiseConfig, SourceInfo,
    SplitConfig, SynthesiseConfig, TeacherConfig, TenantRecogniser, WithinConfig,
]  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_composes_and_validates(name: str) -> None:
    overrides = [
        f"data={name}",
        "source=raw.jsonl",
        *(["data.name=x"] if name == "records" else []),
    ]
    config = build(IngestJob, compose("ingest", overrides))
    assert config.sources == ["raw.jsonl"]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_option_is_read_by_code(model: type[BaseModel]) -> None:
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("data", "registry")
        for path in (ROOT / "tuneloom" / folder).glob("*.py")
    )
    for name in model.model_fields.keys() - {"contact"}:  # shown with all of provenance, for people
        read = rf'\.{name}\b|\["{name}"\]'
        if name in ("row", "subject", "source", "licence"):
            read = "ROW_KINDS"  # read in a loop over these names
        assert re.search(read, code), f"{model.__name__}.{name} is read nowhere"


def test_the_yaml_spells_out_every_option_with_its_default() -> None:
    composed = compose("ingest", ["data.name=x", "source=raw.jsonl"])
    assert composed["data"] == Recipe(name="x").model_dump(mode="json")


@pytest.mark.parametrize("name", RECIPES)
def test_any_option_of_a_recipe_can_be_set_on_the_command_line(name: str) -> None:
    overrides = [f"data={name}", "data.name=x", "source=a", "data.near.action=drop",
                 "data.split.seed=5",
                 "data.privacy.actions={email: drop}"]  # fmt: skip
    config = build(IngestJob, compose("ingest", overrides))
    assert (config.data.near.action, config.data.split.seed) == ("drop", 5)
    assert config.data.privacy.actions == {"email": "drop"}


def test_a_recipe_of_ones_own_is_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine" / "data").mkdir(parents=True)
    recipe = 'name: support\nrecord:\n  prompt: "{ask}"\n  completion: "{say}"\n'
    (tmp_path / "mine" / "data" / "support.yaml").write_text(recipe)
    (tmp_path / "raw").mkdir()
    for i in range(3):
        rows = [{"ask": f"q{i}{j}", "say": "a"} for j in range(5)]
        (tmp_path / "raw" / f"{i}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.chdir(tmp_path)
    code = main(["ingest", "--config-dir", "mine", "data=support", "source=raw/*.jsonl"])
    out = capsys.readouterr().out
    assert code == 0, out
    assert re.search(r"rows in +15\n", out)
    assert "next: tuneloom train data.path=datasets/support" in out
    manifest = json.loads((tmp_path / "datasets" / "support" / "manifest.json").read_text())
    assert [part["name"] for part in manifest["created_from"]] == ["0.jsonl", "1.jsonl", "2.jsonl"]


def test_too_many_bad_rows_end_the_command_with_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "raw.jsonl").write_text('{"text": "a"}\n{\n')
    monkeypatch.chdir(tmp_path)
    assert main(["ingest", "data.name=x", "source=raw.jsonl"]) == 3
    assert "1 of 2 rows were rejected" in capsys.readouterr().err
    assert main(["ingest", "data.name=x", "source=raw.jsonl", "data.max_rejected=0.5"]) == 0


def test_the_reviewers_rule_is_the_configs(tmp_path: Path) -> None:
    assert Golden(tmp_path, reviewers=GoldenConfig(name="g").reviewers).reviewers == 2
