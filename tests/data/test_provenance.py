"""SPDX expressions: what is one, and which use all of it allows."""

import pytest
from pydantic import ValidationError

from tuneloom.data.provenance import SourceInfo, allows


def allowed(licence: str, use: str = "commercial", commercial: bool | None = None) -> bool:
    entry = SourceInfo(match="*", licence=licence, commercial=commercial)
    return allows(entry, "research" if use == "research" else "commercial", None) is None


@pytest.mark.parametrize(
    "licence",
    [
        "CC-BY-NC-4.0 AND (MIT OR Apache-2.0) AND BSD-3-Clause",
        "CC-BY-NC-4.0 AND (MIT OR Apache-2.0)",
        "(MIT OR Apache-2.0) AND CC-BY-NC-4.0",
        "(MIT OR (Apache-2.0 AND CC0-1.0)) AND (CC-BY-NC-4.0 OR CC-BY-NC-SA-4.0)",
        "CC-BY-NC-4.0 AND MIT or CC-BY-NC-4.0",
        "PolyForm-Noncommercial-1.0.0",
        "MIT AND NCGL-UK-2.0",
    ],
)
def test_a_licence_that_holds_in_every_alternative_forbids_commercial_use(licence: str) -> None:
    assert not allowed(licence)
    assert allowed(licence, "research")


@pytest.mark.parametrize(
    "licence",
    [
        "CC-BY-NC-4.0 OR MIT",
        "MIT OR CC-BY-NC-4.0 AND BSD-3-Clause",
        "(CC-BY-NC-4.0 OR (MIT)) AND BSD-3-Clause",
        "GPL-2.0-only WITH Classpath-exception-2.0",
    ],
)
def test_one_alternative_that_allows_the_use_is_enough(licence: str) -> None:
    assert allowed(licence)


def test_derived_work_that_is_forbidden_is_forbidden_to_research_too() -> None:
    assert not allowed("MIT AND (CC-BY-ND-4.0)", "research")


@pytest.mark.parametrize(
    "licence",
    [
        "LicenseRef-Acme",
        "MIT AND LicenseRef-Acme AND Apache-2.0",
        "(LicenseRef-Acme)",
        "LicenseRef-Apache",  # SPDX knows it as another name of Apache-2.0
        "DocumentRef-a:LicenseRef-b AND MIT",
    ],
)
def test_terms_of_your_own_allow_commercial_use_where_you_say_so(licence: str) -> None:
    assert allowed(licence, commercial=True)
    assert not allowed(licence)
    assert allowed(licence, "research")
    assert allowed(f"{licence} OR CC0-1.0")


@pytest.mark.parametrize(
    "licence",
    ["", "MIT OR", "AND MIT", "MIT Apache-2.0", "(MIT", "Nonsense-1.0", "MIT AND LicenseRef-a/b",
     "LicenseRef-a LicenseRef-b", "MIT WITH Apache-2.0"],
)  # fmt: skip
def test_what_is_no_expression_is_refused_in_a_sentence(licence: str) -> None:
    with pytest.raises(ValidationError, match=r"no SPDX expression \(.+\); use LicenseRef-NAME"):
        SourceInfo(match="*", licence=licence)
