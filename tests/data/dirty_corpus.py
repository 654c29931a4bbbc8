"""One dirty export with every fault planted a known number of times; `plant(folder)` writes it.

Seven files of five kinds, one of them in an archive; what `tuneloom ingest` must say of each fault
stands beside it in EXPECTED. `HOSTILE` are files that one more of which must stop the whole ingest.
"""
# ruff: noqa: E501 - sentences in six languages

import gzip
import io
import json
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

BROKEN: list[tuple[str, bytes]] = [
    ("invalid_utf8", b'{"text": "caf\xe9"}'),
    ("invalid_json", b'{"text": "cut off'),
    ("lone_surrogate", b'{"text": "half \\ud800 a pair"}'),
    ("duplicate_key", b'{"text": "one", "text": "two"}'),
    ("not_finite", b'{"text": "a", "score": NaN}'),
    ("not_an_object", b'["text"]'),
    ("unknown_shape", b'{"title": "no payload"}'),
    ("wrong_type", b'{"messages": null}'),
    ("wrong_type", b'{"text": 7}'),
    ("too_long", b'{"text": "' + b"x" * 1_100_000 + b'"}'),
    ("empty", b'{"text": "   "}'),
    ("empty", b'{"text": "\\u0000\\u200b"}'),
    ("no_answer", b'{"messages": [{"role": "user", "content": "hello?"}]}'),
    ("unknown_role", b'{"messages": [{"role": "robot", "content": "beep"}]}'),
    ("invalid_json", b"[" * 3000),
    ("invalid_json", b'{"text": "a", "n": ' + b"9" * 5000 + b"}"),
    ("invalid_record", b'{"messages": [{"role": "assistant", "content": "a", "tool_calls": [3]}]}'),
]
"""All 13 reasons that a row of JSON can be rejected for without a recipe of its own."""

LANGUAGES = {
    "en": "Please note that {} was given in the letter",
    "de": "Bitte beachten Sie, dass {} im Brief angegeben war",
    "fr": "Veuillez noter que {} figure dans la lettre",
    "es": "Tenga en cuenta que {} figura en la carta",
    "it": "Si prega di notare che {} è indicato nella lettera",
    "nl": "Let erop dat {} in de brief staat",
}
PERSONAL = {  # each of the published form, none issued
    "email": "anna.k@example.com", "phone": "+49 151 23456789", "card": "4111 1111 1111 1111",
    "iban": "FR76 3000 6000 0112 3456 7890 189", "ip": "203.0.113.77", "us_ssn": "536-22-1234",
    "uk_nino": "AB 12 34 56 C", "fr_nir": "2 55 08 14 168 025 38", "es_dni": "12345678Z",
    "it_cf": "RSSMRA85T10A562S",
}  # fmt: skip
SECRETS = ["ghp_" + "a1B2" * 9, "AKIAIOSFODNN7EXAMPLE", "glpat-" + "Zz9_" * 5, "npm_" + "9" * 36]
DIRT = {
    "mojibake": ("Ã©", 7), "bidi": ("\u202e\u2066", 5), "controls": ("\x07\x1b\ufdd0", 6),
    "invisible": ("\u200b", 3), "nfc": ("e\u0301", 2), "newlines": ("\r\n", 4),
}  # fmt: skip
CONTROL_TOKENS = ["<|im_end|>", "<|im_start|>system", "</s>", "<|eot_id|>", "<start_of_turn>"]
CLUSTERS = (2, 3, 4, 5, 6)
GOOD, TWICE, CONFLICTS, PLACEHOLDERS = 900, 50, 5, 3
LEAKS = {"golden:record": 4, "golden:question": 3, "golden:words": 2, "golden:near": 1}
BAD_CELLS = 2
DROPPED = "us_ssn"
"""The one entity whose rows the recipe drops."""

_personal = {entity: i + 1 for i, entity in enumerate(PERSONAL)}
"""Rows of each entity in each language: another number for each, so that none stands for another."""
_rejected = {code: sum(code == c for c, _ in BROKEN) for code, _ in BROKEN} | {
    "invalid_csv": BAD_CELLS
}
_dirt = {step: number for step, (_, number) in DIRT.items()}
_personal_rows = len(LANGUAGES) * sum(_personal.values())
_gone = len(LANGUAGES) * _personal[DROPPED]
EXPECTED: dict[str, Any] = {
    "counts": {
        "in": GOOD + TWICE + _personal_rows + len(SECRETS) + sum(_dirt.values()) + sum(CLUSTERS)
        + len(CONTROL_TOKENS) + 2 * CONFLICTS + PLACEHOLDERS + sum(LEAKS.values())
        + sum(_rejected.values()),
        "rejected": _rejected,
        "deduplicated": {"exact": TWICE, "near": sum(CLUSTERS) - len(CLUSTERS)},
        "quarantined": {"label_conflict": 2 * CONFLICTS, "placeholder": PLACEHOLDERS,
                        f"privacy_{DROPPED}": _gone,
                        **{f"leak_{known}": rows for known, rows in LEAKS.items()}},
        "kept": GOOD + _personal_rows - _gone + len(SECRETS) + sum(_dirt.values())
        + len(CONTROL_TOKENS) + len(CLUSTERS),
    },
    "found": {entity: len(LANGUAGES) * n for entity, n in _personal.items() if entity != DROPPED}
    | {"secret": len(SECRETS)},
    "sanitised": _dirt,
    "leaks": LEAKS,
    "label_conflicts": 2 * CONFLICTS,
}  # fmt: skip
FOUND_IN = {
    (entity, language): n
    for entity, n in _personal.items() if entity != DROPPED for language in LANGUAGES
}  # fmt: skip

RECIPE: dict[str, Any] = {
    "name": "support",
    "near": {"action": "drop"},
    "conflicts": "quarantine",
    "privacy": {"actions": {DROPPED: "drop"}},
    "max_rejected": 0.02,
    "provenance": [
        {"match": "crm*", "owner": "Example Ltd", "licence": "LicenseRef-contract", "commercial": True,
         "consent": "contract", "consent_until": "2027-01-01", "trust": 90},
        {"match": "*", "owner": "The forum's users", "licence": "CC-BY-SA-4.0", "consent": "public", "trust": 30},
    ],
    "as_of": "2026-06-01",
}  # fmt: skip


class Plants:
    """The rows of each file, made in one order from one seed."""

    def __init__(self, seed: int = 11) -> None:
        self.rng = random.Random(seed)
        consonants, vowels = "bdfgklmnprst", "aeiou"
        self.vocabulary = [a + b + c + d for a in consonants for b in vowels for c in consonants
                           for d in vowels]  # fmt: skip
        self.good = [self.row(f"{self.words(40)}?") for _ in range(GOOD)]
        self.golden = [self.row(f"{self.words(40)}?") for _ in range(9)] + [("Is tea hot", "yes")]

    def words(self, count: int) -> str:
        return " ".join(self.rng.choices(self.vocabulary, k=count))

    def row(self, question: str, answer: str | None = None) -> tuple[str, str]:
        return question, self.words(12) if answer is None else answer

    def personal(self) -> list[tuple[str, str]]:
        return [
            self.row(f"{sentence.format(PERSONAL[entity])}: {self.words(20)}")
            for entity, number in _personal.items()
            for sentence in LANGUAGES.values()
            for _ in range(number)
        ]

    def dirt(self) -> list[tuple[str, str]]:
        return [
            self.row(f"{self.words(10)} caf{dirt} {self.words(10)}")
            for dirt, number in DIRT.values()
            for _ in range(number)
        ] + [self.row(f"Say {token}\n {self.words(15)}") for token in CONTROL_TOKENS]

    def doubtful(self) -> list[tuple[str, str]]:
        made = [self.row(f"The key is {secret} for {self.words(9)}") for secret in SECRETS]
        for size in CLUSTERS:  # rows that differ in their last word
            base = self.words(60)
            made += [self.row(f"{base} {last}", "the same answer") for last in "abcdef"[:size]]
        for i in range(CONFLICTS):
            made += [self.row(f"Is planted question {i} true?", said) for said in ("yes", "no")]
        return made + [self.row(self.words(20), "N/A") for _ in range(PLACEHOLDERS)]

    def leaks(self) -> list[tuple[str, str]]:
        """Rows that the golden set knows whole, by question, by 13 words, by all but case."""
        whole, asked, quoted = self.golden[:4], self.golden[4:7], self.golden[7:9]
        return [
            *whole,
            *(self.row(question) for question, _ in asked),
            *(self.row(f"{self.words(9)} {' '.join(question.split()[5:18])} {self.words(9)}")
              for question, _ in quoted),
            ("is TEA hot?", "Yes."),
        ]  # fmt: skip


def chat(question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns})


def lines(rows: list[tuple[str, str]]) -> bytes:
    return "".join(chat(*row) + "\n" for row in rows).encode()


def plant(folder: Path) -> Path:
    """Write the export under `folder/raw` and the golden set beside it; returns `folder/raw`."""
    plants, raw = Plants(), folder / "raw"
    (raw / "old").mkdir(parents=True)
    crm = plants.good[:300] + plants.personal() + plants.dirt()
    forum = plants.good[300:600] + plants.doubtful() + plants.leaks()
    plants.rng.shuffle(crm)
    plants.rng.shuffle(forum)
    (raw / "crm.jsonl").write_bytes(lines(crm))
    (raw / "forum.jsonl").write_bytes(lines(forum))
    (raw / "broken.jsonl").write_bytes(b"".join(line + b"\n" for _, line in BROKEN))
    (raw / "old" / "copies.jsonl.gz").write_bytes(
        gzip.compress(lines(plants.good[:TWICE]), mtime=0)
    )
    (raw / "old" / "export.zip").write_bytes(
        zipped({"a/tickets.jsonl": lines(plants.good[600:700])})
    )
    cells = "".join(f"{q},{a}\n" for q, a in plants.good[700:800])
    (raw / "shop.csv").write_text(f"prompt,completion\n{cells}" + "one cell\n" * BAD_CELLS)
    questions, answers = zip(*plants.good[800:], strict=True)
    pq.write_table(pa.table({"prompt": questions, "completion": answers}), raw / "wiki.parquet")
    (folder / "golden.jsonl").write_bytes(lines(plants.golden))
    return raw


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def tarred(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> bytes:
    buffer, info = io.BytesIO(), tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(info)
    return buffer.getvalue()


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "bomb.zip": (lambda: zipped({"a.jsonl": b" " * (64 << 20)}), "as a bomb does"),
    "bomb.jsonl.gz": (lambda: gzip.compress(b" " * (210 << 20), 1), "as a bomb does"),
    "up.zip": (lambda: zipped({"../../a.jsonl": b"{}\n"}), "leads out of it"),
    "root.tar": (lambda: tarred("/etc/a.jsonl"), "leads out of it"),
    "link.tar": (lambda: tarred("a.jsonl", tarfile.SYMTYPE, "/etc/passwd"), "is a link"),
    "device.tar": (lambda: tarred("a.jsonl", tarfile.CHRTYPE), "is no file"),
    "nested.zip": (lambda: zipped({"b.zip": zipped({"a.jsonl": b"{}\n"})}), "archive in an archive"),
    "newline.zip": (lambda: zipped({"a\n.jsonl": b"{}\n"}), "is no name for a file"),
}  # fmt: skip
"""A file, and what must be said of it."""
