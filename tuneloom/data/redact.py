"""What is done about secrets and personal data in a row: keep, mask, pseudonym, or drop the row.

Findings go with the row as entity, field and place, never as the value. A pseudonym is a keyed
hash, the same for one value within one key, so that deduplication and joins still work; the key
stays outside the dataset.
"""

import hashlib
import hmac
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import regex
from pydantic import field_validator, model_validator

from tuneloom.config import Config
from tuneloom.data.recognisers import (
    ENTITIES,
    RECOGNISERS,
    Bounded,
    Finding,
    Recogniser,
    apart,
    find,
)
from tuneloom.data.secrets import find_secrets, find_with_detect_secrets
from tuneloom.errors import ConfigError

Action = Literal["keep", "mask", "pseudonym", "drop"]
KEY_VARIABLE = "TUNELOOM_PSEUDONYM_KEY"


class TenantRecogniser(Config):
    entity: str
    """The name it is counted and masked by, such as customer_number."""
    pattern: str
    """A regular expression; its group `value`, if it has one, is what is masked."""
    near: list[str] = []
    """Words of which one must stand shortly before."""

    @field_validator("pattern")
    @classmethod
    def compiles(cls, value: str) -> str:
        try:
            regex.compile(value)
        except regex.error as error:
            raise ValueError(f"no regular expression ({error})") from None
        return value

    @field_validator("entity")
    @classmethod
    def named(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", value):
            raise ValueError("expected 1 to 32 of [a-z0-9_]")
        return value


class PrivacyConfig(Config):
    default: Action = "mask"
    """What happens to an entity that `actions` does not name."""
    actions: dict[str, Action] | None = None
    """By entity, such as {email: pseudonym, card: drop, secret: drop}."""
    engine: Literal["patterns", "presidio"] = "patterns"
    """`presidio` adds its recognisers, about 10 ms a row (extra `data`)."""
    secrets: Literal["off", "patterns", "detect-secrets"] = "patterns"
    """`detect-secrets` adds that library's detectors, about 1.5 ms a KB (extra `data`)."""
    recognisers: list[TenantRecogniser] = []
    """The data owner's own patterns, asked before the built-in ones."""
    key_file: str | None = None
    """Holds the pseudonym key; None takes it from TUNELOOM_PSEUDONYM_KEY."""

    @model_validator(mode="after")
    def actions_are_of_known_entities(self) -> "PrivacyConfig":
        own = {recogniser.entity for recogniser in self.recognisers}
        known = {*ENTITIES, *own, "secret"}
        unknown = sorted((self.actions or {}).keys() - known) if self.engine == "patterns" else []
        if unknown:
            raise ValueError(
                f"data.privacy.actions: no entity {unknown[0]!r}; "
                f"known are {', '.join(sorted(known))}"
            )
        return self


class DropRow(Exception):
    """The recipe says that a row with this entity must not be used."""

    def __init__(self, entity: str, field: str) -> None:
        super().__init__(entity, field)
        self.entity, self.field = entity, field


class Redactor:
    """A privacy config made ready: `redact(text, field)` gives clean text and findings."""

    def __init__(self, config: PrivacyConfig) -> None:
        self.config = config
        own = [
            Recogniser(
                r.entity, "always", Bounded(r.pattern, f"data.privacy.recognisers.{number}"),
                words=tuple(map(_word, r.near)),
            )
            for number, r in enumerate(config.recognisers)
        ]  # fmt: skip
        self.actions = config.actions or {}
        named = {"keep"} != {config.default, *self.actions.values()}
        wanted = [r for r in [*own, *RECOGNISERS] if self.action(r.entity) != "keep"]
        self.recognisers = wanted if named else []
        self.find_secrets: Callable[[str], Iterable[Finding]] | None = {
            "off": None, "patterns": find_secrets, "detect-secrets": find_with_detect_secrets,
        }[config.secrets]  # fmt: skip
        if config.engine == "presidio":
            from tuneloom.data.presidio import find_with_presidio

            self.more: Callable[[str], Iterable[Finding]] | None = find_with_presidio
        else:
            self.more = None
        self.idle = not (self.recognisers or self.find_secrets or self.more)
        uses_key = "pseudonym" in {config.default, *self.actions.values()}
        self.key = pseudonym_key(config.key_file) if uses_key else b""

    def action(self, entity: str) -> Action:
        """What the config says to do with an entity."""
        return self.actions.get(entity, self.config.default)

    def find(self, text: str) -> list[Finding]:
        """Secrets first, then the data owner's patterns, the built-in ones, and Presidio's."""
        return apart([
            *(self.find_secrets(text) if self.find_secrets else ()),
            *find(text, self.recognisers),
            *(self.more(text) if self.more else ()),
        ])  # fmt: skip

    def redact(self, text: str, field: str) -> tuple[str, list[dict[str, str | int]]]:
        """The text without what must go, and where the replacements stand; raises DropRow."""
        if self.idle:
            return text, []
        found = [f for f in self.find(text) if self.action(f.entity) != "keep"]
        if not found:
            return text, []
        parts: list[str] = []
        notes: list[dict[str, str | int]] = []
        end = length = 0
        for finding in found:
            action = self.action(finding.entity)
            if action == "drop":
                raise DropRow(finding.entity, field)
            value = text[finding.start : finding.end]
            name = finding.entity.upper()
            put = (
                f"<{name}_{self.pseudonym(finding.entity, value)}>"
                if action == "pseudonym"
                else f"<{name}>"
            )
            parts += [text[end : finding.start], put]
            length += finding.start - end
            notes.append({"entity": finding.entity, "field": field, "start": length,
                          "end": length + len(put), "action": action})  # fmt: skip
            length += len(put)
            end = finding.end
        return "".join([*parts, text[end:]]), notes

    def pseudonym(self, entity: str, value: str) -> str:
        """Eight letters, keyed: letters, so that no recogniser takes a pseudonym for a number."""
        plain = value.casefold() if entity == "email" else re.sub(r"[\s().\-/]", "", value)
        named = f"{entity}\0{plain}".encode("utf-8", "surrogatepass")
        mac = hmac.digest(self.key, named, hashlib.sha256)
        number = int.from_bytes(mac[:8], "big")
        letters = []
        for _ in range(8):
            number, letter = divmod(number, 26)
            letters.append(chr(97 + letter))
        return "".join(letters)


def _word(near: str) -> str:
    return " " + near.lower()


def excerpt_redactor(config: PrivacyConfig) -> Redactor:
    """Masks all that the recipe can find, whatever it keeps: for excerpts of rejected rows."""
    secrets = "patterns" if config.secrets == "off" else config.secrets
    masked = {"default": "mask", "actions": None, "secrets": secrets}
    return Redactor(config.model_copy(update=masked))


def pseudonym_key(key_file: str | None) -> bytes:
    """The tenant's key, from its file or the environment; raises ConfigError without one."""
    if key_file is not None:
        path = Path(key_file)
        if not path.is_file():
            raise ConfigError(f"data.privacy.key_file: no file at {key_file!r}")
        key = path.read_bytes().strip()
    else:
        key = os.environ.get(KEY_VARIABLE, "").encode()
    if len(key) < 16:
        raise ConfigError(
            "data.privacy.key_file: pseudonyms need a key of 16 bytes or more; name a file, "
            f"or set {KEY_VARIABLE}, and keep the key: the same key gives the same pseudonyms"
        )
    return key
