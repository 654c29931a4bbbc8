"""Where rows come from and what may be done with them: owner, licence, consent and trust by source.

The effective licence of a dataset is all its rows' licences together; what stands in the way of the
use that the recipe wants is listed by source, which is the smallest set of rows to drop.
"""

import datetime
import fnmatch
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from tuneloom.config import Config

Use = Literal["commercial", "research"]
OWN_TERMS = re.compile(r"(?:DocumentRef-[\w.-]+:)?LicenseRef-[\w.-]+")
NO_COMMERCE = {"NC", "NONCOMMERCIAL", "NCGL"}
"""Words in the identifiers of licences that forbid commercial use (license-expression 30.4.4)."""


class SourceInfo(Config):
    match: str
    """Source files this is about, as a glob over their names; the first match counts."""
    owner: str | None = None
    contact: str | None = None
    licence: str | None = None
    """An SPDX identifier or expression, or LicenseRef-... for a contract of your own."""
    commercial: bool | None = None
    """Whether a LicenseRef allows commercial use; SPDX licences are known."""
    consent: Literal["contract", "consent", "legitimate_interest", "public", "none"] | None = None
    """The basis on which personal data in the source is used."""
    consent_until: datetime.date | None = None
    trust: Annotated[int, Field(ge=0, le=100)] = 50
    """Of two equal rows the one from the more trusted source is kept."""

    @field_validator("licence")
    @classmethod
    def is_spdx(cls, value: str | None) -> str | None:
        if value is not None and (faults := spdx_faults(value)):
            raise ValueError(f"no SPDX expression ({faults}); use LicenseRef-NAME for your own")
        return value

    @property
    def rank(self) -> int:
        """Sorts the most trusted first."""
        return -self.trust


@functools.cache
def _spdx() -> Any:
    from license_expression import get_spdx_licensing

    return get_spdx_licensing()


def spdx_faults(expression: str) -> str:
    """What is wrong with an SPDX expression; empty when nothing is."""
    from license_expression import ExpressionError

    try:
        parsed = _spdx().parse(OWN_TERMS.sub("0BSD", expression), validate=True, strict=True)
    except ExpressionError as error:
        return str(error)
    return "it is empty" if parsed is None else ""


class Provenance:
    """The recipe's entries, asked by source name."""

    def __init__(self, entries: list[SourceInfo]) -> None:
        self.entries = entries
        self.of = functools.cache(self._of)

    def _of(self, source: str) -> SourceInfo:
        """The first entry whose glob matches; one that says nothing where none does."""
        for entry in self.entries:
            if fnmatch.fnmatchcase(source, entry.match):
                return entry
        return SourceInfo(match=source)


def allows(entry: SourceInfo, use: Use, as_of: datetime.date | None) -> str | None:
    """None when rows of this source may be trained on for `use`; else the reason why not."""
    if entry.consent == "none":
        return "consent was refused"
    if entry.consent_until and as_of and entry.consent_until < as_of:
        return f"consent ended on {entry.consent_until}"
    if entry.licence is None:
        return "no licence is named" if use == "commercial" else None
    # The library takes some LicenseRefs for other names of public licences.
    tree = _spdx().parse(OWN_TERMS.sub("LicenseRef-own", entry.licence))
    if _tree_allows(tree, use, entry.commercial):
        return None
    return f"{entry.licence} does not allow {use} use of derived work"


def _tree_allows(tree: Any, use: Use, own_terms: bool | None) -> bool:
    """Of a parsed expression: one side of an OR is enough, an AND needs all."""
    if isinstance(tree, _spdx().OR):
        return any(_tree_allows(part, use, own_terms) for part in tree.args)
    if isinstance(tree, _spdx().AND):
        return all(_tree_allows(part, use, own_terms) for part in tree.args)
    licence = getattr(tree, "license_symbol", tree)  # without its WITH
    return _licence_allows(licence.key, use, own_terms)


def _licence_allows(name: str, use: Use, own_terms: bool | None) -> bool:
    """By the terms a licence's own name states: NC no commercial use, ND no derived work."""
    parts = name.upper().split("-")
    if name.startswith("LicenseRef-"):
        return use == "research" or own_terms is True
    return not ("ND" in parts or (use == "commercial" and not NO_COMMERCE.isdisjoint(parts)))


def summary(
    rows_of: Mapping[str, int], provenance: Provenance, use: Use, as_of: datetime.date | None
) -> dict[str, Any]:
    """Licences of the kept rows, what they ask for together, and what blocks the wanted use."""
    licences: dict[str, int] = {}
    blockers = []
    for source, rows in sorted(rows_of.items()):
        if not rows:
            continue
        entry = provenance.of(source)
        licences[entry.licence or "unknown"] = licences.get(entry.licence or "unknown", 0) + rows
        reason = allows(entry, use, as_of)
        if reason:
            blockers.append({"source": source, "rows": rows, "reason": reason})
    return {
        "use": use, "licences": licences, "effective": effective(licences), "blockers": blockers,
        "rows_to_drop": sum(blocker["rows"] for blocker in blockers),
    }  # fmt: skip


def effective(licences: Iterable[str]) -> str:
    """The conjunction of all licences in the dataset, as one SPDX expression; unknown if one is."""
    names = sorted(set(licences))
    if not names:
        return "none"
    if "unknown" in names:
        return "unknown"
    return " AND ".join(f"({n})" if " OR " in n else n for n in names)
