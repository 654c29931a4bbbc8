"""Personal data that has a form: mails, phones, cards, IBANs, addresses of machines, national ids.

Each recogniser is a cheap look, a pattern, and a check of what was found (checksum, length,
range); a number whose checksum lets one in ten pass also needs a word nearby that says what it is.
Names and street addresses have no form, and nothing here finds them.
How well each does: benchmarks/pii.py.
"""

import bisect
import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import phonenumbers
import regex

from tuneloom.errors import ConfigError

NEAR = 48
"""Characters before a number in which its context word must stand."""


@dataclass(frozen=True)
class Finding:
    """One piece of personal data in a text: where it is, not what it is."""

    entity: str
    start: int
    end: int


PATIENCE_SECONDS = 5.0


class Bounded:
    """The data owner's pattern, which a text must not keep busy for ever (CWE-1333): `regex` stops
    where `re` cannot. Raises ConfigError after PATIENCE_SECONDS in one text.
    """

    def __init__(self, pattern: str, key: str) -> None:
        self.compiled, self.key = regex.compile(pattern), key
        self.groupindex = self.compiled.groupindex

    def finditer(self, text: str) -> Iterator[re.Match[str]]:
        try:
            yield from self.compiled.finditer(text, timeout=PATIENCE_SECONDS)
        except TimeoutError:
            raise ConfigError(
                f"{self.key}: {self.compiled.pattern!r} took over {PATIENCE_SECONDS:.0f} s in one "
                f"text of {len(text):,} characters; write it without a repeat inside a repeat"
            ) from None


@dataclass(frozen=True)
class Recogniser:
    """`check` takes the match; one of `words` must stand before it, and `unless` must not."""

    entity: str
    look: str
    pattern: re.Pattern[str] | Bounded
    check: Callable[[str], bool] = lambda _: True
    words: tuple[str, ...] = ()
    unless: re.Pattern[str] | None = None

    def find(self, text: str, lowered: str) -> Iterator[Finding]:
        """Every match of something that holds up."""
        if self.words and not any(word.strip() in lowered for word in self.words):
            return
        for match in self.pattern.finditer(text):
            start, end = match.span("value" if "value" in self.pattern.groupindex else 0)
            if start == end:  # of a pattern such as `C?\d*`, between any two characters
                continue
            if self.words and not self.named(lowered[max(0, start - NEAR) : start]):
                continue
            if self.unless and self.unless.search(text[max(0, start - NEAR) : start]):
                continue
            if self.check(text[start:end]):
                yield Finding(self.entity, start, end)

    def named(self, before: str) -> bool:
        """True when one of the words begins a word of the text before; ` tel` is not in `hotel`."""
        return any(word in " " + WORD_EDGE.sub(" ", before) for word in self.words)


WORD_EDGE = re.compile(r"\W+")


def digits_of(text: str) -> list[int]:
    """The digits in a text, without what groups them."""
    return [int(c) for c in text if c.isdecimal()]


def luhn(text: str) -> bool:
    """Payment cards: an issuer's range and length, and Luhn's checksum."""
    digits = digits_of(text)
    doubled = [sum(divmod(2 * d, 10)) for d in digits[-2::-2]]
    total = sum(digits[-1::-2]) + sum(doubled)
    issued = CARD_NUMBERS.fullmatch("".join(map(str, digits))) is not None
    return issued and total % 10 == 0 and len(set(digits)) > 1


# Issuers and their lengths, or one number in ten of any 16 digits would do: Visa, Mastercard,
# American Express, Diners, Discover, JCB, UnionPay, Maestro (ranges as the schemes publish them).
CARD_NUMBERS = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}"
    r"|3[47]\d{13}|3(?:0[0-5]|[689]\d)\d{11}|6(?:011|5\d\d|4[4-9]\d)\d{12}"
    r"|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}"
    r"|(?:5018|5020|5038|5893|6304|6759|676[1-3])\d{8,15}"
)


IBAN_LENGTH = {
    "AD": 24, "AE": 23, "AT": 20, "BE": 16, "BG": 22, "CH": 21, "CY": 28, "CZ": 24, "DE": 22,
    "DK": 18, "EE": 20, "ES": 24, "FI": 18, "FR": 27, "GB": 22, "GR": 27, "HR": 21, "HU": 28,
    "IE": 22, "IL": 23, "IS": 26, "IT": 27, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "MC": 27,
    "MT": 31, "NL": 18, "NO": 15, "PL": 28, "PT": 25, "RO": 24, "SA": 24, "SE": 24, "SI": 19,
    "SK": 24, "SM": 27, "TR": 26, "UA": 29,
}  # fmt: skip


def iban(text: str) -> bool:
    """ISO 13616: the country's length, and 1 modulo 97."""
    plain = text.replace(" ", "")
    if len(plain) != IBAN_LENGTH.get(plain[:2]):
        return False
    return int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def address(text: str) -> bool:
    """An IP address that could be a person's: not a loopback, not 0.0.0.0."""
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (found.is_loopback or found.is_unspecified or found.is_multicast)


def phone(text: str) -> bool:
    """A number that its country could give out (libphonenumber)."""
    for region in (None, "US", "GB", "DE", "FR", "ES", "IT", "NL"):
        if region is None and not text.startswith(("+", "00")):
            continue
        try:
            number = re.sub(r"^00", "+", text) if region is None else text
            if phonenumbers.is_valid_number(phonenumbers.parse(number, region)):
                return True
        except phonenumbers.NumberParseException:
            continue
    return False


def us_ssn(text: str) -> bool:
    """Social Security: areas 000, 666 and 900-999, group 00 and serial 0000 are never given out."""
    area, group, serial = re.split(r"[- ]", text)
    return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"


def uk_nhs(text: str) -> bool:
    """Ten digits, modulo 11."""
    d = digits_of(text)
    return len(d) == 10 and (11 - sum(d[i] * (10 - i) for i in range(9)) % 11) % 11 == d[9]


def de_tax(text: str) -> bool:
    """Steuer-Identifikationsnummer: eleven digits, ISO 7064 mod 11,10; no leading zero."""
    d, product = digits_of(text), 10
    for digit in d[:-1]:
        product = ((digit + product - 1) % 10 + 1) * 2 % 11
    return len(d) == 11 and d[0] != 0 and (11 - product) % 10 == d[-1]


def fr_nir(text: str) -> bool:
    """Numéro de sécurité sociale: thirteen characters and their complement modulo 97."""
    plain = re.sub(r"\D", "", text.upper().replace("2A", "19").replace("2B", "18"))
    return len(plain) == 15 and 97 - int(plain[:13]) % 97 == int(plain[13:])


def es_dni(text: str) -> bool:
    """DNI and NIE: a letter that is the number modulo 23."""
    plain = text.upper().replace("-", "").replace(" ", "")
    number = plain[:-1].translate(str.maketrans("XYZ", "012"))
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23] == plain[-1]


ODD = dict(zip("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ",
               [1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20,
                11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23], strict=True))  # fmt: skip


def it_cf(text: str) -> bool:
    """Codice fiscale: sixteen characters, the last a checksum over odd and even places."""
    plain = "".join(str(int(c)) if c.isdecimal() else c for c in text.upper())  # of any script
    even = sum(int(c) if c.isdigit() else ord(c) - 65 for c in plain[1:15:2])
    return chr(65 + (sum(ODD[c] for c in plain[0:15:2]) + even) % 26) == plain[15]


def nl_bsn(text: str) -> bool:
    """Burgerservicenummer: nine digits, the eleven test."""
    d = digits_of(text)
    return len(d) == 9 and any(d) and (sum(d[i] * (9 - i) for i in range(8)) - d[8]) % 11 == 0


def pl_pesel(text: str) -> bool:
    """PESEL: eleven digits, weights 1 3 7 9, and a birth date inside."""
    d = digits_of(text)
    total = sum(x * w for x, w in zip(d, (1, 3, 7, 9, 1, 3, 7, 9, 1, 3), strict=False))
    return (
        len(d) == 11 and (10 - total % 10) % 10 == d[10] and (d[2] * 10 + d[3]) % 20 in range(1, 13)
    )


@dataclass(frozen=True)
class Sight:
    """What a text holds, counted once in a microsecond, so that most patterns need not be tried."""

    digits: int
    dots: int
    colons: int
    at: bool
    plus: bool

    @classmethod
    def of(cls, text: str) -> "Sight":
        digits = len(text.encode("utf-8", "replace").translate(None, NO_DIGITS))
        if not text.isascii():  # digits of other scripts are digits too
            digits += sum(c.isdecimal() for c in text if c > "\x7f")
        dots = text.count(".") if digits >= 4 else 0
        return cls(digits, dots, text.count(":"), "@" in text, "+" in text)


NO_DIGITS = bytes(byte for byte in range(256) if not 48 <= byte <= 57)
GROUPED = re.compile(r"\d[\d ().\-/A-Z]{4,}\d")
LOOKS: dict[str, Callable[[str, Sight], object]] = {
    "at": lambda text, sight: sight.at,
    "digits": lambda text, sight: sight.digits >= 6 and GROUPED.search(text),
    "dotted": lambda text, sight: sight.dots >= 3,
    "colons": lambda text, sight: sight.colons >= 2,
    "dashed": lambda text, sight: sight.digits >= 9 and "-" in text,
    "international": lambda text, sight: sight.digits >= 7 and sight.plus,
    "fiscal": lambda text, sight: sight.digits >= 7,
}


PHONE_WORDS = (
    "phone", " tel", " tél", " mobil", " call", " fax", "whatsapp", " sms", " handy", " ruf",
    "anruf",    " appel", " portable", " llam", " móvil", " cell", " chiam", " bel ", " bellen",
)  # fmt: skip

RECOGNISERS = [
    Recogniser(
        "email", "at",
        re.compile(
            r"(?<![\w.+%-])[\w.+%-]{1,64}@"
            r"(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.)+[^\W\d_]{2,24}(?![\w-])"
        ),
    ),
    Recogniser("iban", "digits", re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{2,4}){3,8}\b"), iban),
    Recogniser(
        "card", "digits",
        re.compile(
            r"(?<![\w.,-])(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{1,7}|\d{4}([ -])\d{6}\2\d{4,5})"
            r"(?!\w|[.,-]\d)"
        ),
        luhn,
    ),
    Recogniser(
        "ip", "dotted",
        re.compile(r"(?<![\w.])(?<![A-Za-z]-)(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\w|-(?!\d+\.))"),
        address,
        unless=re.compile(r"(?:\bv|version|release|build|firmware|section|§|oid)\W{0,3}$", re.I),
    ),
    Recogniser(
        "ip", "colons",
        re.compile(r"(?<![\w:])(?:[0-9a-fA-F]{0,4}:){2,7}[0-9a-fA-F]{0,4}(?![\w:])"), address,
    ),
    Recogniser("us_ssn", "dashed", re.compile(r"(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])"), us_ssn),
    Recogniser(
        "uk_nhs", "digits", re.compile(r"(?<!\d)\d{3}[ -]?\d{3}[ -]?\d{4}(?!\d)"), uk_nhs, (" nhs",)
    ),
    Recogniser(
        "uk_nino", "digits",
        re.compile(
            r"\b(?!BG|GB|KN|NK|NT|TN|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z]"
            r" ?\d{2} ?\d{2} ?\d{2} ?[A-D]\b"
        ),
    ),
    Recogniser(
        "de_tax", "digits", re.compile(r"(?<!\d)\d{2} ?\d{3} ?\d{3} ?\d{3}(?!\d)"), de_tax,
        (" steuer", "idnr", " tin ", " tax"),
    ),
    Recogniser(
        "fr_nir", "digits",
        re.compile(
            r"(?<!\d)[12] ?\d{2} ?(?:0[1-9]|1[0-2]|[2-9]\d) ?(?:\d{2}|2[AB])"
            r" ?\d{3} ?\d{3} ?\d{2}(?!\d)"
        ),
        fr_nir,
    ),
    Recogniser(
        "es_dni", "digits", re.compile(r"\b(?:\d{8}|[XYZ]-?\d{7})[- ]?[A-HJ-NP-TV-Z]\b"), es_dni
    ),
    Recogniser(
        "it_cf", "fiscal",
        re.compile(r"\b[A-Z]{6}\d{2}[A-EHLMPR-T]\d{2}[A-Z]\d{3}[A-Z]\b"), it_cf,
    ),
    Recogniser(
        "nl_bsn", "digits", re.compile(r"(?<!\d)\d{4}[. ]?\d{2}[. ]?\d{3}(?!\d)"), nl_bsn,
        (" bsn", " burgerservice", " sofi"),
    ),
    Recogniser(
        "pl_pesel", "digits", re.compile(r"(?<!\d)\d{11}(?!\d)"), pl_pesel, (" pesel",)
    ),
    Recogniser(
        "phone", "international",
        re.compile(r"(?<![\w+.,-])\+[1-9](?:[ ().\-/]{0,2}\d){6,13}(?![\w]|[.,-]\d)"), phone,
    ),
    Recogniser(
        "phone", "digits",
        re.compile(r"(?<![\w+.,-])\(?\d(?:[ ().\-/]{0,2}\d){6,13}(?![\w]|[.,-]\d)"), phone,
        PHONE_WORDS,
    ),
]  # fmt: skip
ENTITIES = sorted({recogniser.entity for recogniser in RECOGNISERS})


def find(text: str, recognisers: list[Recogniser]) -> list[Finding]:
    """What stands in the text, in its order; where two overlap the earlier recogniser has it."""
    if not recognisers:
        return []
    sight = Sight.of(text)
    seen = {name for name, look in LOOKS.items() if look(text, sight)} | {"always"}
    lowered = text.lower()
    if len(lowered) != len(
        text
    ):  # one character in a million lowers to two; then places would shift
        lowered = text
    return apart(
        found
        for recogniser in recognisers
        if recogniser.look in seen
        for found in recogniser.find(text, lowered)
    )


def apart(findings: Iterable[Finding]) -> list[Finding]:
    """Of findings in order of precedence those that overlap none before them, by place."""
    kept: list[Finding] = []
    starts: list[int] = []
    for found in findings:
        at = bisect.bisect_left(starts, found.start)
        after_last = at == 0 or kept[at - 1].end <= found.start
        if after_last and (at == len(kept) or found.end <= kept[at].start):
            kept.insert(at, found)
            starts.insert(at, found.start)
    return kept
