"""The dirty corpus: one folder of an owner's exports in which every fault is planted and counted.

`plant(folder)` writes it from a seed; the tables say what an ingest of it must report.
"""
# ruff: noqa: E501 - sentences in six languages

import bz2
import gzip
import io
import json
import random
import string
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rng = random.Random
WORDS = [f"word{i}" for i in range(3000)]
GOOD = 600
TWICE = 50
CLUSTERS, SIZE = 20, 4
CONFLICTS = 5
MAX_ROW = 20_000
"""`data.max_row_bytes` of the recipe, so that a row beyond it stays small."""

# Ten types of value, in a sentence of each of six languages.
LANGUAGES = ("en", "de", "fr", "es", "it", "nl")
PLAIN = {"en": "It is {} as far as I know,", "de": "Hier steht {} und sonst nichts,", "fr": "Voici {} pour le dossier,",
         "es": "El dato es {} desde siempre,", "it": "Il dato è {} per tutti,", "nl": "Gebruik {} hiervoor,"}  # fmt: skip
CALLED = {"en": "Call my phone {} today,", "de": "Meine Handynummer ist {} wie immer,", "fr": "Mon téléphone : {} le soir,",
          "es": "Mi móvil es {} por la tarde,", "it": "Il mio cellulare {} di sera,", "nl": "Bel mij op {} vandaag,"}  # fmt: skip


def digits(rng: Rng, count: int) -> str:
    return "".join(rng.choices(string.digits, k=count))


def _card(rng: Rng) -> str:
    body = "4" + digits(rng, 14)
    doubled = (int(c) * (2 if i % 2 == 0 else 1) for i, c in enumerate(reversed(body)))
    return body + str(-sum(sum(map(int, str(n))) for n in doubled) % 10)


def _iban(rng: Rng) -> str:
    body = digits(rng, 18)
    return f"DE{98 - int(body + '131400') % 97:02d}{body}"


def _fr_nir(rng: Rng) -> str:
    body = f"2{rng.randrange(100):02d}{rng.randrange(1, 13):02d}75{digits(rng, 6)}"
    return f"{body}{97 - int(body) % 97:02d}"


def _es_dni(rng: Rng) -> str:
    number = rng.randrange(10_000_000, 99_999_999)
    return f"{number}{'TRWAGMYFPDXBNJZSQVHLCKE'[number % 23]}"


def _it_cf(rng: Rng) -> str:
    body = (
        "".join(rng.choices("BCDFGLMNPRSTV", k=6))
        + f"{rng.randrange(10, 99)}A{rng.randrange(10, 29)}H{digits(rng, 3)}"
    )
    odd = "BAKPLCQDREVOSFTGUHMINJWZYX"  # the letter whose place is the value of the n-th letter
    value = {c: odd.index(chr(65 + i)) for i, c in enumerate(string.ascii_uppercase)}
    value |= {str(i): value[chr(65 + i)] for i in range(10)}
    total = sum(value[c] for c in body[::2])
    total += sum(int(c) if c.isdigit() else ord(c) - 65 for c in body[1::2])
    return body + chr(65 + total % 26)


PERSONAL: dict[str, Callable[[Rng], str]] = {
    "email": lambda r: f"anna.{digits(r, 6)}@example.com", "card": _card, "iban": _iban,
    "ip": lambda r: f"203.0.113.{r.randrange(1, 255)}", "phone": lambda r: f"+49 151 2{digits(r, 7)}",
    "us_ssn": lambda r: f"{r.randrange(100, 600)}-{r.randrange(10, 99)}-{r.randrange(1000, 9999)}",
    "uk_nino": lambda r: f"AB{digits(r, 6)}C", "fr_nir": _fr_nir, "es_dni": _es_dni, "it_cf": _it_cf,
}  # fmt: skip
DROPPED = "us_ssn"
"""The type whose rows the recipe does not want at all."""
SECRETS = [
    f"ghp_{'a1B2' * 9}", f"glpat-{'x9' * 10}", f"hf_{'Ab3' * 11}", "AKIAIOSFODNN7EXAMPLE",
    f"sk-proj-{'q7' * 12}", f"AIza{'Z' * 35}", f"npm_{'c4D1' * 9}", f"xoxb-{'1234567890-' * 2}abc",
]  # fmt: skip

# Rows that are no records: the shapes that F9 of the fault list names, and their relatives.
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
    ("too_long", b'{"text": "' + b"x" * (MAX_ROW + 1) + b'"}'),
    ("empty", b'{"text": "   "}'),
    ("empty", b'{"text": "\\u0000\\u200b"}'),
    ("no_answer", b'{"messages": [{"role": "user", "content": "hello?"}]}'),
    ("unknown_role", b'{"messages": [{"role": "robot", "content": "beep"}]}'),
    ("invalid_json", b"[" * 10_000),
    ("invalid_json", b'{"text": "a", "n": ' + b"9" * 5000 + b"}"),
    ("invalid_record", b'{"messages": [{"role": "assistant", "content": "a", "tool_calls": [3]}]}'),
]
DIRT = {  # what is put into an answer, and the step that must name it
    "mojibake": ("cafÃ© au lait", 7), "controls": ("bell\x07 and\x1b[31m red", 6), "bidi": ("a\u202etxt.exe\u202c b", 5),
    "invisible": ("zero\u200bwidth", 4), "nfc": ("cafe\u0301 noir", 3),
}  # fmt: skip
TOKENS = ("<|im_end|>", "<|im_start|>system", "</s>", "<|eot_id|>", "[INST]", "<end_of_turn>")
"""Control tokens as text: kept as they are, since rendering escapes them in whatever model is tuned."""


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}  # fmt: skip


def jsonl(rows: list[Any]) -> bytes:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    return b"\n".join(lines) + b"\n"


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _tar(files: dict[str, bytes], link: str | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        if link:
            info = tarfile.TarInfo("link.jsonl")
            info.type, info.linkname = tarfile.SYMTYPE, link
            archive.addfile(info)
    return buffer.getvalue()


ROW = jsonl([{"text": "a row that nobody may take from a refused file"}])
HOSTILE: dict[str, tuple[str, Callable[[], bytes]]] = {  # refused whole, with these words
    "bomb.jsonl.gz": ("grows more than 200 times", lambda: gzip.compress(ROW + bytes(230 << 20), 1, mtime=0)),
    "bomb.zip": ("grows more than 200 times", lambda: _zip({"a.jsonl": ROW + bytes(8 << 20)})),
    "climbs.zip": ("leads out of it", lambda: _zip({"a.jsonl": ROW, "../../etc/evil.jsonl": ROW})),
    "climbs.tar": ("leads out of it", lambda: _tar({"a.jsonl": ROW, "/tmp/evil.jsonl": ROW})),
    "cut.jsonl.bz2": ("Compressed file ended|cannot be uncompressed", lambda: bz2.compress(ROW * 99)[:-9]),
    "linked.tar": ("is a link", lambda: _tar({"a.jsonl": ROW}, link="/etc/passwd")),
    "matryoshka.zip": ("an archive in an archive", lambda: _zip({"a.jsonl": ROW, "b.zip": _zip({})})),
    "torn.parquet": ("cannot be read as parquet", lambda: b"PAR1" + bytes(99)),
}  # fmt: skip


def plant(folder: Path) -> Path:
    """Write the corpus and `exam.jsonl` beside it; returns the folder of the raw files."""
    rng = Rng(11)

    def words(n: int) -> str:
        return " ".join(rng.choices(WORDS, k=n))

    good = [chat(f"{words(40)}?", words(12)) for _ in range(GOOD)]
    exam = [chat(f"{words(30)}?", words(30)) for _ in range(60)]
    crm: list[Any] = good[: GOOD // 2] + [line for _, line in SHAPES]
    for entity, value in PERSONAL.items():
        for language in LANGUAGES:
            said = (CALLED if entity == "phone" else PLAIN)[language]
            crm.append(chat(f"{said.format(value(rng))} {words(25)}", f"{language} {words(9)}"))
    crm += [chat(f"Dirt {step} {i} {words(20)}", f"{dirt} {words(6)}")
            for step, (dirt, count) in DIRT.items() for i in range(count)]  # fmt: skip
    forum: list[Any] = good[GOOD // 2 :] + good[:TWICE]
    for _ in range(CLUSTERS):
        base = words(60)
        forum += [chat(f"{base} {i}", "the same answer") for i in range(SIZE)]
    forum += [chat(f"Is planted question {i} {words(12)} true?", answer)
              for i in range(CONFLICTS) for answer in ("yes",)]  # fmt: skip
    forum += [chat(row["messages"][0]["content"], "no") for row in forum[-CONFLICTS:]]
    forum += [chat(f"The key is {s} for {words(25)}", words(5)) for s in SECRETS]
    forum += [chat(f"Placeholder {i} {words(20)}", "N/A") for i in range(3)]
    forum += [
        chat(f"What does {token} mean? {words(20)}", f"{token} {words(9)}") for token in TOKENS
    ]
    leaks = exam[:7] + [chat(e["messages"][0]["content"], words(12)) for e in exam[10:15]]
    leaks += [chat(words(9), f"As I read: {e['messages'][1]['content']}") for e in exam[20:23]]
    rng.shuffle(crm)
    rng.shuffle(forum)
    write(folder, crm, forum, leaks, exam)
    return folder


def write(
    folder: Path, crm: list[Any], forum: list[Any], leaks: list[Any], exam: list[Any]
) -> None:
    """The rows as an owner's systems leave them: plain, packed, in archives, in folders, as CSV."""
    files = {
        "crm.jsonl": b"\xef\xbb\xbf" + jsonl(crm),
        "forum/2025.jsonl.gz": gzip.compress(jsonl(forum[:200]), mtime=0),
        "forum/2026.zip": _zip({"a.jsonl": jsonl(forum[200:300]), "deep/b.jsonl": jsonl(forum[300:])}),
        "mail.csv": b"prompt,completion\n" + b"".join(b"mail %d,answer %d\n" % (i, i) for i in range(20)) + b"too,many,cells\n",
        "scraped.tar": _tar({"leaks.jsonl": jsonl(leaks)}),
        ".hidden.jsonl": ROW, "notes.pdf": b"%PDF",
    }  # fmt: skip
    for name, data in {**files, **{n: make() for n, (_, make) in HOSTILE.items()}}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder.parent / "exam.jsonl").write_bytes(jsonl(exam))


REJECTED = Counter(reason for reason, _ in SHAPES) + Counter({"invalid_csv": 1})
LEAKS = {"exam:question": 5, "exam:record": 7, "exam:words": 3}
MAIL = 20
COUNTS: dict[str, Any] = {
    "rejected": dict(sorted(REJECTED.items())),
    "deduplicated": {"exact": TWICE, "near": CLUSTERS * (SIZE - 1)},
    "quarantined": {
        "label_conflict": 2 * CONFLICTS, **{f"leak_{kind}": n for kind, n in LEAKS.items()},
        "placeholder": 3, f"privacy_{DROPPED}": len(LANGUAGES),
    },
    "kept": GOOD + (len(PERSONAL) - 1) * len(LANGUAGES) + sum(n for _, n in DIRT.values()) + CLUSTERS
            + len(SECRETS) + len(TOKENS) + MAIL,
}  # fmt: skip
COUNTS["in"] = COUNTS["kept"] + sum(
    sum(COUNTS[fate].values()) for fate in ("rejected", "deduplicated", "quarantined")
)
FOUND = {e: len(LANGUAGES) for e in PERSONAL if e != DROPPED} | {"secret": len(SECRETS)}
SANITISED = {step: count for step, (_, count) in DIRT.items()}
