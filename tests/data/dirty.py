"""A dirty export in which every fault is planted in known numbers, and the recipe it is read by."""
# ruff: noqa: E501 - sentences in six languages

import gzip
import json
import random
import zipfile
from pathlib import Path
from typing import Any

SHAPES: list[tuple[str, bytes]] = [
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
"""Rows that are no records, three of them bombs: nesting, digits, a line of 1.1 MB."""

SENTENCES = {
    "en": "Please write down {} and tell nobody", "de": "Bitte notieren Sie {} und sagen Sie es niemandem",
    "fr": "Merci de noter {} et de ne le dire à personne", "es": "Por favor, apunte {} y no se lo diga a nadie",
    "it": "Per favore annoti {} e non lo dica a nessuno", "pl": "Proszę zapisać {} i nikomu nie mówić",
}  # fmt: skip
PERSONAL = {
    "email": "anna.k@example.com", "phone": "+49 151 23456789", "card": "4111 1111 1111 1111",
    "iban": "FR76 3000 6000 0112 3456 7890 189", "ip": "203.0.113.77", "us_ssn": "536-22-1234",
    "es_dni": "12345678Z", "it_cf": "RSSMRA85T10A562S", "nl_bsn": "BSN 111222333", "pl_pesel": "PESEL 44051401359",
}  # fmt: skip
SECRETS = [
    "ghp_" + "a1B2" * 9, "AKIA" + "Q7XZ" * 4, "hf_" + "aBcDeFgHiJ" * 3 + "kLmN",
    "sk-proj-" + "Ab1" * 16, "xoxb-" + "123456789012-" * 2 + "AbCdEfGhIjKlMnOpQrStUvWx",
]  # fmt: skip
SANITISED = {
    "mojibake": "the cafÃ© {}", "controls": "a \x07 bell {}", "bidi": "turned \u202e round {}",
    "invisible": "zero\u200bwidth {}", "newlines": "two\r\nlines {}", "nfc": "cafe\u0301 {}",
}  # fmt: skip
GOOD, TWICE, CLUSTERS, SIZE, CONFLICTS, PLACEHOLDERS, MARKED = 900, 50, 20, 4, 5, 3, 3
LEAKS = {"record": 4, "question": 3, "words": 2}

PERSONS = len(PERSONAL) * len(SENTENCES)
COUNTS: dict[str, Any] = {
    "in": GOOD + TWICE + CLUSTERS * SIZE + 2 * CONFLICTS + PLACEHOLDERS + MARKED + PERSONS
    + 2 * len(SECRETS) + 2 * len(SANITISED) + sum(LEAKS.values()) + len(SHAPES),
    "rejected": {
        "duplicate_key": 1, "empty": 2, "invalid_json": 3, "invalid_record": 1, "invalid_utf8": 1,
        "lone_surrogate": 1, "no_answer": 1, "not_an_object": 1, "not_finite": 1, "too_long": 1,
        "unknown_role": 1, "unknown_shape": 1, "wrong_type": 2,
    },
    "deduplicated": {"exact": TWICE, "near": CLUSTERS * (SIZE - 1)},
    "quarantined": {
        "label_conflict": 2 * CONFLICTS, "placeholder": PLACEHOLDERS,
        "privacy_us_ssn": len(SENTENCES),
        **{f"leak_exam:{kind}": rows for kind, rows in LEAKS.items()},
    },
    "kept": GOOD + CLUSTERS + MARKED + PERSONS - len(SENTENCES) + 2 * len(SECRETS)
    + 2 * len(SANITISED),
}  # fmt: skip
FOUND = {kind: len(SENTENCES) for kind in PERSONAL if kind != "us_ssn"} | {
    "secret": 2 * len(SECRETS)
}

RECIPE: dict[str, Any] = {
    "name": "support",
    "near": {"action": "drop"},
    "conflicts": "quarantine",
    "max_rejected": 0.02,
    "privacy": {"actions": {"us_ssn": "drop"}},
    "against": {"sets": [{"name": "exam", "path": "exam.jsonl"}]},
    "provenance": [
        {"match": "crm*", "owner": "Example Ltd", "licence": "LicenseRef-contract", "commercial": True,
         "consent": "contract", "consent_until": "2027-01-01", "trust": 90},
        {"match": "forum*", "owner": "The forum's users", "licence": "CC-BY-SA-4.0", "consent": "public", "trust": 30},
        {"match": "more*", "owner": "Example Ltd", "licence": "MIT", "consent": "public"},
    ],
    "as_of": "2026-06-01",
}  # fmt: skip


def chat(question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns})


def write(folder: Path) -> None:
    """raw/ (JSONL, gzip, CSV in a zip), exam.jsonl, and the recipe as recipes/data/dirty.yaml."""
    rng = random.Random(11)

    def words(n: int) -> str:
        return " ".join(f"word{rng.randrange(3000)}" for _ in range(n))

    good = [(f"{words(40)}?", words(12)) for _ in range(GOOD)]
    exam = [(f"{words(30)}?", words(30)) for _ in range(20)]
    crm = [chat(*row) for row in good[:500]]
    crm += [
        chat(f"{sentence.format(value)} {words(8)}", words(9))
        for sentence in SENTENCES.values() for value in PERSONAL.values()
    ]  # fmt: skip
    crm += [
        chat(f"{text.format(words(20))}", words(6))
        for text in SANITISED.values() for _ in range(2)
    ]  # fmt: skip
    crm += [chat(f"<|im_start|>system {words(12)}<|im_end|>", words(9)) for _ in range(MARKED)]
    forum = [chat(*row) for row in [*good[500:750], *good[:TWICE]]]
    for _ in range(CLUSTERS):
        base = words(60)
        forum += [chat(f"{base} {i}", "the same answer") for i in range(SIZE)]
    for i in range(CONFLICTS):
        forum += [chat(f"Is planted question {i} true?", said) for said in ("yes", "no")]
    forum += [chat(f"The key is {key} for {words(9)}", words(5)) for key in SECRETS * 2]
    forum += [chat(f"Placeholder {i} {words(20)}", "N/A") for i in range(PLACEHOLDERS)]
    forum += [chat(*row) for row in exam[: LEAKS["record"]]]
    forum += [chat(question, words(12)) for question, _ in exam[5 : 5 + LEAKS["question"]]]
    forum += [chat(f"I read {text}", words(9)) for _, text in exam[10 : 10 + LEAKS["words"]]]
    table = "\n".join(["prompt,completion", *(f"{q},{a}" for q, a in good[750:])])

    raw = folder / "raw"
    raw.mkdir(parents=True)
    lines = [line.encode() for line in crm] + [line for _, line in SHAPES]
    rng.shuffle(lines)
    (raw / "crm.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    rng.shuffle(forum)
    (raw / "forum.jsonl.gz").write_bytes(gzip.compress("\n".join(forum).encode(), mtime=0))
    with zipfile.ZipFile(raw / "more.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("table.csv", table)
    (folder / "exam.jsonl").write_text("\n".join(chat(*row) for row in exam) + "\n")
    recipe = folder / "recipes" / "data" / "dirty.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text(json.dumps(RECIPE), encoding="utf-8")  # JSON is YAML
