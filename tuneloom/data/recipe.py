"""What `tuneloom ingest` may be told: the recipe of one dataset, checked before a row is read."""

import datetime
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from tuneloom.config import Config
from tuneloom.data.contamination import AgainstConfig
from tuneloom.data.dedupe import NearConfig
from tuneloom.data.labels import LabelIssuesConfig
from tuneloom.data.provenance import SourceInfo, Use
from tuneloom.data.quality import QualityConfig
from tuneloom.data.redact import PrivacyConfig
from tuneloom.data.sanitise import SanitiseConfig

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def _safe(value: str) -> str:
    if not NAME.fullmatch(value):
        raise ValueError("expected 1 to 64 of [a-z0-9._-], not starting with a dot or dash")
    return value


Name = Annotated[str, AfterValidator(_safe)]
"""Becomes a folder or a file (LLaMA-Factory CVE-2024-52803)."""
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]


class SplitConfig(Config):
    train: Fraction = 0.9
    validation: Fraction = 0.05
    test: Fraction = 0.05
    seed: int = 0
    """Another seed puts other keys into each split."""

    @model_validator(mode="after")
    def adds_up(self) -> "SplitConfig":
        total = self.train + self.validation + self.test
        if abs(total - 1.0) > 1e-9:
            raise ValueError(
                f"data.split: expected train + validation + test to be 1, got {total:g}"
            )
        return self


class WithinConfig(Config):
    dataset: str
    """A dataset folder whose keys were made by the same `key`."""
    split: str = "train"
    """Rows of other splits are left out, so that text for pretraining holds no test row."""


class Recipe(Config):
    name: Name
    """The dataset's name; its folder is NAME@ID."""
    source: str | list[str] | None = None
    """Files, folders or globs; `source=` on the command line goes before it."""
    record: dict[str, Any] | None = None
    """Templates that make a record from a raw row's fields; None recognises the common shapes."""
    json_schema: str | None = None
    """A JSON Schema file of the data owner's; raw rows that break it are rejected."""
    key: str | None = None
    """Template of what must not be on both sides of a split; None takes the record's input."""
    label: str | None = None
    """Template of the class that splits are balanced over; None balances nothing."""
    subject: str | None = None
    """Template that names the person a row is about; kept as a hash, for erasure."""
    sanitise: SanitiseConfig = SanitiseConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    quality: QualityConfig = QualityConfig()
    near: NearConfig = NearConfig()
    against: AgainstConfig = AgainstConfig()
    """Validation, golden and evaluation sets that no row may be taken from."""
    conflicts: Literal["list", "quarantine"] = "list"
    """Rows that answer one question differently: counted only, or set aside."""
    label_issues: LabelIssuesConfig = LabelIssuesConfig()
    """Labels that the words of their row speak against: counted, or set aside."""
    provenance: list[SourceInfo] = []
    """Owner, licence, consent and trust of the sources."""
    use: Use = "commercial"
    """What a model tuned on this dataset is for; blockers are listed in the manifest."""
    as_of: datetime.date | None = None
    """The day on which consent must be in force; None does not look at dates."""
    licence_action: Literal["list", "drop", "fail"] = "list"
    """What happens to rows whose source does not allow the use."""
    split: SplitConfig = SplitConfig()
    within: WithinConfig | None = None
    max_rejected: Fraction = 0.01
    """Share of rows that may be rejected before the ingest ends with exit code 3."""
    max_row_bytes: Positive = 1_000_000
    """A longer row is rejected: a 10 MB row is a broken export more often than a record."""
    rows_per_shard: Positive = 50_000


class IngestConfig(Config):
    data: Recipe
    source: str | list[str] | None = None
    """Files, folders or globs to read; None takes the recipe's own."""
    root: str = "datasets"
    """Folder that holds one folder a dataset version."""
    workers: Positive = 1
    """Processes that prepare rows; the result does not depend on it."""
    max_archive_bytes: Positive = 16 << 30
    """What the members of a zip or tar may hold; a compressed tar needs as much disk meanwhile."""

    max_refused_files: Annotated[int, Field(ge=0)] = 0
    """Files that may be broken, hostile or closed to us; each is listed, no row of it taken.
    Above 0 every file is read once more beforehand."""

    @model_validator(mode="after")
    def has_a_source(self) -> "IngestConfig":
        if not self.sources:
            raise ValueError("source: required, but not given; set source='raw/*.jsonl'")
        return self

    @property
    def sources(self) -> list[str]:
        """The patterns to read, whichever of the two places named them."""
        chosen = self.source if self.source is not None else self.data.source
        return [chosen] if isinstance(chosen, str) else sorted(chosen or [])
