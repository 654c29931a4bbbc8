"""One dirty export in which every fault was planted: each count is known and met exactly."""
# ruff: noqa: E501 - sentences in six languages

import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tuneloom.config import build
from tuneloom.data.ingest import ingest
from tuneloom.data.recipe import IngestConfig

WORDS = [f"word{i}" for i in range(3000)]
# Ten types in six languages, one a row.
PERSONAL = [
    ("email", "Please write to anna.k@example.com about it"), ("phone", "Meine Handynummer ist +49 151 23456789"),
    ("card", "Paid with 4111 1111 1111 1111 yesterday"), ("iban", "Mon compte est FR76 3000 6000 0112 3456 7890 189"),
    ("ip", "The request came from 203.0.113.77 at night"), ("us_ssn", "His number is 536-22-1234 on the form"),
    ("es_dni", "Mi DNI es 12345678Z desde siempre"), ("it_cf", "Il codice è RSSMRA85T10A562S per tutti"),
    ("nl_bsn", "Mijn BSN is 111222333 zoals altijd"), ("pl_pesel", "Mój PESEL to 44051401359 i koniec"),
]  # fmt: skip
REJECTS = [
    "{",
    "[1]",
    '{"text": ""}',
    '{"a": 1}',
    '{"text": "a", "text": "b"}',
    '{"text": "\\ud800"}',
]


def chat(question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns})


def corpus(folder: Path) -> Path:
    rng = random.Random(11)

    def words(n: int) -> str:
        return " ".join(rng.choices(WORDS, k=n))

    good = [chat(f"{words(40)}?", words(12)) for _ in range(900)]
    crm = good[:600] + [
        chat(f"{text} {words(3)}", words(9)) for _, text in PERSONAL for _ in range(3)
    ]
    forum = good[600:] + good[:50]  # 50 rows stand in both
    for _ in range(20):  # clusters of four that differ in a word
        base = words(60)
        forum += [chat(f"{base} {i}", "the same answer") for i in range(4)]
    for i in range(5):  # five questions with two answers each
        forum += [
            chat(f"Is planted question {i} true?", "yes"),
            chat(f"Is planted question {i} true?", "no"),
        ]
    forum += [chat(f"The key is ghp_{'a1B2' * 9} for {words(9)}", words(5)) for _ in range(4)]
    forum += [chat(f"Placeholder {i} {words(20)}", "N/A") for i in range(3)]
    crm += [chat(f"Mojibake {i} cafÃ© {words(20)}", words(6)) for i in range(7)]
    crm += REJECTS
    folder.mkdir()
    for name, lines in (("crm.jsonl", crm), ("forum.jsonl", forum)):
        rng.shuffle(lines)
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


RECIPE: dict[str, Any] = {
    "name": "support",
    "near": {"action": "drop"},
    "conflicts": "quarantine",
    "privacy": {"actions": {"us_ssn": "drop"}},
    "provenance": [
        {"match": "crm*", "owner": "Example Ltd", "licence": "LicenseRef-contract", "commercial": True,
         "consent": "contract", "consent_until": "2027-01-01", "trust": 90},
        {"match": "forum*", "owner": "The forum's users", "licence": "CC-BY-SA-4.0", "consent": "public", "trust": 30},
    ],
    "as_of": "2026-06-01",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("dirty")
    source = str(corpus(tmp / "raw"))
    mapping = {"data": RECIPE, "source": source, "root": str(tmp / "datasets"), "workers": 1}
    return ingest(build(IngestConfig, mapping))


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


def test_every_count_is_the_one_that_was_planted(made: Path) -> None:
    counts = manifest(made)["counts"]
    assert counts == {
        "in": 900 + 30 + 50 + 80 + 10 + 4 + 3 + 7 + 6,
        "rejected": {"duplicate_key": 1, "empty": 1, "invalid_json": 1, "lone_surrogate": 1,
                     "not_an_object": 1, "unknown_shape": 1},
        "deduplicated": {"exact": 50, "near": 60},
        "quarantined": {"label_conflict": 10, "placeholder": 3, "privacy_us_ssn": 3},
        "kept": 900 + 27 + 20 + 4 + 7,
    }  # fmt: skip
    assert manifest(made)["found"] == {
        **{entity: 3 for entity, _ in PERSONAL if entity != "us_ssn"}, "secret": 4
    }  # fmt: skip
    assert manifest(made)["sanitised"] == {"mojibake": 7}


def test_nothing_that_was_to_go_is_left_in_any_file(made: Path) -> None:
    values = [b"anna.k@", b"23456789", b"4111 1111", b"FR76", b"203.0.113", b"536-22", b"12345678Z",
              b"RSSMRA", b"111222333", b"44051401359", b"ghp_"]  # fmt: skip
    for path in made.iterdir():
        texts = [path.read_bytes()]
        if path.suffix == ".parquet":
            texts = [
                json.dumps(row, ensure_ascii=False).encode()
                for row in pq.read_table(path).to_pylist()
            ]
        assert not [(path.name, v) for v in values for text in texts if v in text]


def test_no_question_and_no_text_is_on_two_sides_of_the_split(made: Path) -> None:
    sides: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        for row in pq.read_table(made / f"{split}-00000.parquet").to_pylist():
            sides.setdefault(json.loads(row["record"])["messages"][0]["content"], set()).add(split)
    assert all(len(side) == 1 for side in sides.values())


def test_the_report_shows_every_count_and_runs_no_script(made: Path) -> None:
    page = (made / "report.html").read_text(encoding="utf-8")
    assert f"support@{manifest(made)['id']}" in page
    for text in (
        "deduplicated: near",
        "Example Ltd",
        "CC-BY-SA-4.0",
        "No source stands in the way",
        "crm.jsonl (634 rows): consent ends on 2027-01-01 (as of 2026-06-01).",
        "6 rows (0.55%) were no records; the recipe allows 1.00%.",
        "No golden or evaluation set was held against the rows",
        "958",
    ):
        assert text in page
    assert "<script" not in page and "src=" not in page and "url(" not in page


def test_hostile_rows_are_text_in_the_report(tmp_path: Path) -> None:
    (tmp_path / "raw.jsonl").write_text(
        chat("<script>alert(1)</script>", "<img src=x onerror=alert(2)>")
        + '\n{"<b>": "<script>"}\n'
    )
    mapping = {"data": {"name": "d", "max_rejected": 1.0}, "source": str(tmp_path / "raw.jsonl")}
    page = (
        ingest(build(IngestConfig, mapping | {"root": str(tmp_path / "ds")})) / "report.html"
    ).read_text()
    assert "<script" not in page and "<img" not in page and "<b>" not in page
    assert "&lt;script&gt;alert(1)" in page


@pytest.mark.browser
def test_the_report_renders_in_a_browser(made: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    shot = tmp_path / "report.png"
    subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--screenshot={shot}",
         "--window-size=1100,3200", f"file://{made}/report.html"],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert shot.stat().st_size > 50_000
