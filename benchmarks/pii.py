"""How much personal data the built-in recognisers find: python benchmarks/pii.py [--presidio].

10,000 sentences with one value each, of 14 types in six languages, and 50,000 with something that
looks like one: order numbers, timestamps, versions, ISBNs, hashes, and numbers whose checksum is
wrong. The values are built here digit by digit, not with the recognisers' own checks. Prints
precision, recall and F2 per type, and writes benchmarks/results/pii.json.
"""
# ruff: noqa: E501 - tables of example sentences

import argparse
import random
import string
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.record import write
from tuneloom.data.recognisers import RECOGNISERS, Finding, find

POSITIVES, NEGATIVES, SEED = 10_000, 50_000, 7
Rng = random.Random


def digits(rng: Rng, count: int) -> str:
    return "".join(rng.choice(string.digits) for _ in range(count))


def grouped(text: str, sizes: Iterable[int], sep: str) -> str:
    parts, at = [], 0
    for size in sizes:
        parts.append(text[at : at + size])
        at += size
    return sep.join(part for part in [*parts, text[at:]] if part)


def email(rng: Rng) -> str:
    user = rng.choice(
        ["anna.k", "jörg_m", "o.brien+news", "l-garcía", "x9", "maria.rossi84", "info"]
    )
    host = rng.choice(
        ["example.com", "firma-beispiel.de", "mail.univ-lyon.fr", "correo.es", "posta.it"]
    )
    return f"{user}{rng.randrange(999)}@{host}"


def card(rng: Rng) -> str:
    prefix, length = rng.choice([("4", 16), ("51", 16), ("55", 16), ("2221", 16), ("34", 15), ("37", 15),
                                 ("6011", 16), ("36", 14), ("3528", 16), ("62", 16)])  # fmt: skip
    body = prefix + digits(rng, length - len(prefix) - 1)
    total = sum(
        sum(map(int, str(int(c) * (2 if i % 2 == 0 else 1)))) for i, c in enumerate(reversed(body))
    )
    number = body + str(-total % 10)
    sizes = {16: (4, 4, 4, 4), 15: (4, 6, 5), 14: (4, 6, 4)}[length]
    return rng.choice([number, grouped(number, sizes, " "), grouped(number, sizes, "-")])


def iban(rng: Rng) -> str:
    country, length = rng.choice(
        [("DE", 22), ("ES", 24), ("NL", 18), ("PL", 28), ("GB", 22), ("AT", 20)]
    )
    bank = {"NL": "ABNA", "GB": "WEST"}.get(country, "")
    body = bank + digits(rng, length - 4 - len(bank))
    number = int("".join(str(int(c, 36)) for c in body + country + "00"))
    whole = f"{country}{98 - number % 97:02d}{body}"
    return rng.choice([whole, grouped(whole, [4] * 8, " ")])


def ip(rng: Rng) -> str:
    if rng.random() < 0.7:
        return ".".join(str(rng.randrange(1, 224)) for _ in range(4)).replace("127.", "12.", 1)
    return ":".join(f"{rng.randrange(1, 65536):x}" for _ in range(8))


def phone(rng: Rng) -> str:
    return rng.choice([
        f"+49 30 {rng.randrange(2, 10)}{digits(rng, 6)}", f"+49 151 {digits(rng, 8)}",
        f"+33 6 {grouped(digits(rng, 8), (2, 2, 2, 2), ' ')}", f"+34 6{digits(rng, 2)} {grouped(digits(rng, 6), (3, 3), ' ')}",
        f"+39 347 {digits(rng, 7)}", f"+31 6 {rng.randrange(1, 5)}{digits(rng, 7)}", f"+44 7400 {digits(rng, 6)}",
        f"+1 212-{rng.randrange(2, 10)}{rng.randrange(2, 9)}{rng.randrange(2, 9)}-{digits(rng, 4)}",
        f"0151 {digits(rng, 8)}", f"(212) {rng.randrange(2, 10)}{rng.randrange(2, 9)}{rng.randrange(2, 9)}-{digits(rng, 4)}",
    ])  # fmt: skip


def us_ssn(rng: Rng) -> str:
    return f"{rng.randrange(1, 665):03d}-{rng.randrange(1, 99):02d}-{rng.randrange(1, 9999):04d}"


def uk_nhs(rng: Rng) -> str:
    while True:
        body = digits(rng, 9)
        check = 11 - sum(int(c) * w for c, w in zip(body, range(10, 1, -1), strict=True)) % 11
        if check != 10:
            return grouped(body + str(check % 11), (3, 3, 4), rng.choice([" ", "", "-"]))


def uk_nino(rng: Rng) -> str:
    prefix = rng.choice(["AB", "CE", "JM", "PW", "SK", "TY"])
    return grouped(
        prefix + digits(rng, 6) + rng.choice("ABCD"), (2, 2, 2, 2, 1), rng.choice(["", " "])
    )


def de_tax(rng: Rng) -> str:
    body, product = str(rng.randrange(1, 10)) + digits(rng, 9), 10
    for c in body:
        total = (int(c) + product) % 10 or 10
        product = total * 2 % 11
    return grouped(body + str((11 - product) % 10), (2, 3, 3, 3), rng.choice([" ", ""]))


def fr_nir(rng: Rng) -> str:
    body = f"{rng.choice('12')}{rng.randrange(100):02d}{rng.randrange(1, 13):02d}{rng.randrange(1, 96):02d}{digits(rng, 6)}"
    whole = f"{body}{97 - int(body) % 97:02d}"
    return grouped(whole, (1, 2, 2, 2, 3, 3, 2), rng.choice([" ", ""]))


def es_dni(rng: Rng) -> str:
    number = rng.randrange(10_000_000, 99_999_999)
    return f"{number}{rng.choice(['', '-'])}{'TRWAGMYFPDXBNJZSQVHLCKE'[number % 23]}"


def it_cf(rng: Rng) -> str:
    letters = "".join(rng.choice("BCDFGLMNPRSTV") for _ in range(6))
    body = f"{letters}{rng.randrange(100):02d}{rng.choice('ABCDEHLMPRST')}{rng.randrange(1, 29):02d}H{digits(rng, 3)}"
    odd = "BAKPLCQDREVOSFTGUHMINJWZYX"  # the letter whose place is the value of the n-th character
    value = {c: odd.index(chr(65 + i)) for i, c in enumerate(string.ascii_uppercase)}
    value |= {str(i): value[chr(65 + i)] for i in range(10)}
    total = sum(value[c] for c in body[::2])
    total += sum(int(c) if c.isdigit() else ord(c) - 65 for c in body[1::2])
    return body + chr(65 + total % 26)


def nl_bsn(rng: Rng) -> str:
    while True:
        body = digits(rng, 8)
        check = sum(int(c) * w for c, w in zip(body, range(9, 1, -1), strict=True)) % 11
        if check < 10 and body[0] != "0":
            return body + str(check)


def pl_pesel(rng: Rng) -> str:
    body = f"{rng.randrange(100):02d}{rng.randrange(1, 13):02d}{rng.randrange(1, 29):02d}{digits(rng, 4)}"
    total = sum(int(c) * int(w) for c, w in zip(body, "1379137913", strict=True))
    return body + str(-total % 10)


TYPES: dict[str, Callable[[Rng], str]] = {
    f.__name__: f for f in (email, card, iban, ip, phone, us_ssn, uk_nhs, uk_nino, de_tax, fr_nir, es_dni,
                            it_cf, nl_bsn, pl_pesel)
}  # fmt: skip
SENTENCES = {
    "phone": ["Call me at {} tomorrow.", "Meine Handynummer ist {}, bitte anrufen.", "Mon tél : {}.",
              "Mi móvil es {}.", "Il mio cellulare: {}", "Bel mij op {}."],
    "uk_nhs": ["NHS number {}.", "The patient (NHS {}) was seen."],
    "de_tax": ["Meine Steuer-ID lautet {}.", "Steueridentifikationsnummer: {}", "IdNr. {}"],
    "nl_bsn": ["Mijn BSN is {}.", "Burgerservicenummer {}"],
    "pl_pesel": ["Mój PESEL to {}.", "numer PESEL: {}"],
    "": ["It is {} as far as I know.", "Hier: {}, bitte ändern.", "Voici {} pour le dossier.",
         "El dato es {}, gracias.", "Il dato è {}.", "Gebruik {} hiervoor.", "({})", "id={};"],
}  # fmt: skip
NOISE: list[Callable[[Rng], str]] = [
    lambda r: f"Order {digits(r, 12)} was shipped.",
    lambda r: (
        f"Ticket #{digits(r, 8)} is open since 20{r.randrange(10, 30)}-0{r.randrange(1, 10)}-1{r.randrange(10)}."
    ),
    lambda r: f"Logged at 20{r.randrange(10, 30)}{digits(r, 10)} by the batch job.",
    lambda r: (
        f"Upgrade to version {r.randrange(9)}.{r.randrange(20)}.{r.randrange(99)}.{r.randrange(9)} first."
    ),
    lambda r: f"The total is {r.randrange(1, 999)},{digits(r, 3)}.{digits(r, 2)} EUR.",
    lambda r: (
        f"ISBN 978-{r.randrange(10)}-{digits(r, 4)}-{digits(r, 4)}-{r.randrange(10)} is out of print."
    ),
    lambda r: f"Commit {''.join(r.choice('0123456789abcdef') for _ in range(40))} broke it.",
    lambda r: f"Trace {uuid.UUID(int=r.getrandbits(128))} has the details.",
    lambda r: (
        f"The meeting is at {r.randrange(24):02d}:{r.randrange(60):02d}:{r.randrange(60):02d}."
    ),
    lambda r: f"MAC {':'.join(f'{r.randrange(256):02x}' for _ in range(6))} is the printer.",
    lambda r: f"At {r.randrange(90)}.{digits(r, 6)}, {r.randrange(180)}.{digits(r, 6)} turn left.",
    lambda r: f"Part no. {digits(r, 4)}-{digits(r, 4)}-{digits(r, 4)} fits.",
    lambda r: f"@user{r.randrange(999)} wrote about std::vector and foo@bar.",
    lambda r: (
        f"Resolution {r.randrange(9000)}x{r.randrange(9000)} at {r.randrange(300)} Hz, code A{digits(r, 7)}."
    ),
    lambda r: (
        f"Range 19{digits(r, 2)}-20{digits(r, 2)}, pages {r.randrange(99)}-{r.randrange(100, 999)}."
    ),
    lambda r: f"The card {wrong_card(r)} was refused.",
    lambda r: f"Reference {digits(r, 3)}-{digits(r, 3)}-{digits(r, 4)} in the file.",
    lambda r: f"Sensor {digits(r, 9)} and {digits(r, 11)} report {digits(r, 10)} counts.",
]


def wrong_card(rng: Rng) -> str:
    """A card number with one digit changed, which Luhn's checksum always notices."""
    number = card(rng)
    at = rng.choice([i for i, c in enumerate(number) if c.isdigit()])
    return number[:at] + str((int(number[at]) + rng.randrange(1, 10)) % 10) + number[at + 1 :]


def measure(finder: Callable[[str], Iterable[Finding]]) -> dict[str, dict[str, float]]:
    """Precision, recall and F2 per type, with the counts they come from."""
    rng = Rng(SEED)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    started = time.perf_counter()
    names = list(TYPES)
    characters = 0
    for i in range(POSITIVES):
        name = names[i % len(names)]
        value = TYPES[name](rng)
        text = rng.choice(SENTENCES.get(name, SENTENCES[""])).format(value)
        start = text.index(value)
        characters += len(text)
        found = list(finder(text))
        hit = any(
            f.entity == name and f.start <= start and f.end >= start + len(value) for f in found
        )
        counts[name]["found" if hit else "missed"] += 1
        for other in found:
            if other.entity != name:
                counts[other.entity]["wrong"] += 1
    for i in range(NEGATIVES):
        text = NOISE[i % len(NOISE)](rng)
        characters += len(text)
        for found_here in finder(text):
            counts[found_here.entity]["wrong"] += 1
    seconds = time.perf_counter() - started
    table = {name: scores(counts[name]) for name in names}
    table["all"] = scores(sum((counts[name] for name in names), Counter()))
    table["all"]["characters_per_second"] = round(characters / seconds)
    return table


def scores(c: Counter[str]) -> dict[str, float]:
    precision = c["found"] / max(1, c["found"] + c["wrong"])
    recall = c["found"] / max(1, c["found"] + c["missed"])
    f2 = 5 * precision * recall / max(1e-9, 4 * precision + recall)
    return {"found": c["found"], "missed": c["missed"], "wrong": c["wrong"],
            "precision": round(precision, 4), "recall": round(recall, 4), "f2": round(f2, 4)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--presidio", action="store_true", help="measure Presidio alone as well (slow)"
    )
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "positives": POSITIVES, "negatives": NEGATIVES,
        "builtin": measure(lambda text: find(text, RECOGNISERS)),
    }  # fmt: skip
    if arguments.presidio:
        from tuneloom.data.presidio import find_with_presidio

        result["presidio"] = measure(find_with_presidio)
    for engine in ("builtin", "presidio"):
        if engine in result:
            print(
                f"{engine:<12}{'precision':>10}{'recall':>10}{'F2':>10}{'found':>8}{'missed':>8}{'wrong':>8}"
            )
            for name, row in result[engine].items():
                print(f"{name:<12}{row['precision']:>10.4f}{row['recall']:>10.4f}{row['f2']:>10.4f}"
                      f"{row['found']:>8}{row['missed']:>8}{row['wrong']:>8}")  # fmt: skip
    write("pii", result, seed=SEED)


if __name__ == "__main__":
    main()
