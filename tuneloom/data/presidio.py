"""Presidio's recognisers without a language model: the blank spaCy engine, nothing downloaded.

Names and places need a model, so those recognisers find nothing here; what Presidio adds are its
pattern recognisers (US bank and licence numbers, medical licences, crypto wallets, URLs).
"""

import functools
import os
from collections.abc import Iterator
from typing import Any

from tuneloom.data.recognisers import Finding
from tuneloom.errors import ConfigError

MINIMUM_SCORE = 0.4
"""Below it Presidio guesses: a ticket number is a US_DRIVER_LICENSE with 0.01."""
NAMES = {"EMAIL_ADDRESS": "email", "PHONE_NUMBER": "phone", "CREDIT_CARD": "card",
         "IBAN_CODE": "iban", "IP_ADDRESS": "ip", "US_SSN": "us_ssn", "UK_NHS": "uk_nhs",
         "ES_NIF": "es_dni", "IT_FISCAL_CODE": "it_cf", "PL_PESEL": "pl_pesel"}  # fmt: skip
LEFT_OUT = {"URL", "DATE_TIME"}
"""No personal data by themselves; masking them takes meaning out of a text."""


def find_with_presidio(text: str) -> Iterator[Finding]:
    """What Presidio's pattern recognisers find in an English reading of the text."""
    for result in _analyzer().analyze(text=text, language="en", score_threshold=MINIMUM_SCORE):
        if result.entity_type not in LEFT_OUT:
            name = NAMES.get(result.entity_type, result.entity_type.lower())
            yield Finding(name, result.start, result.end)


@functools.cache
def _analyzer() -> Any:
    """An analyzer on a blank English pipeline."""
    try:
        import spacy
        import tldextract
        from presidio_analyzer import AnalyzerEngine
        from presidio_analyzer.nlp_engine import SpacyNlpEngine
    except ImportError:
        raise ConfigError(
            "data.privacy.engine: presidio is not installed; pip install 'tuneloom[data]'"
        ) from None
    # Its e-mail recogniser would fetch the public suffix list from the network at first use.
    os.environ.setdefault("TLDEXTRACT_CACHE", "")
    offline: Any = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)
    tldextract.extract = offline

    class Blank(SpacyNlpEngine):
        """No model: tokens only."""

        def load(self) -> None:
            self.nlp: Any = {"en": spacy.blank("en")}

    engine = Blank()
    engine.load()
    return AnalyzerEngine(nlp_engine=engine, supported_languages=["en"])
