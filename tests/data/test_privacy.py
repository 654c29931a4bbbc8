"""Sanitising, secrets and personal data, through the texts and datasets that come out."""

import json
import time
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tuneloom.config import build
from tuneloom.data import recognisers
from tuneloom.data.ingest import ingest
from tuneloom.data.prepare import Prepared, Preparer
from tuneloom.data.readers import Block
from tuneloom.data.recipe import IngestConfig, Recipe
from tuneloom.data.recognisers import RECOGNISERS, Finding, apart, find
from tuneloom.data.redact import PrivacyConfig, Redactor
from tuneloom.data.sanitise import SanitiseConfig, sanitise
from tuneloom.data.secrets import find_secrets
from tuneloom.errors import ConfigError

KEY = "0123456789abcdef-a-tenants-key"
# Each is of the published form of its issuer and was never issued.
SECRETS = [
    "AKIAIOSFODNN7EXAMPLE", "aws_secret_access_key=wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "ghp_" + "a1B2" * 9, "github_pat_" + "x" * 30, "glpat-" + "Zz9_" * 5,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEow==\n-----END RSA PRIVATE KEY-----",
    "sk-" + "Ab12" * 10, "sk-ant-" + "x1-Y" * 8, "hf_" + "q" * 34, "npm_" + "9" * 36,
    "pypi-" + "A" * 60,
    "SG." + "a" * 22 + "." + "b" * 43, "xoxb-1234567890-abcdefghij", "sk_live_" + "4e" * 12,
    "sq0atp-" + "c" * 22, "AIza" + "B" * 35, "ya29." + "d" * 30, "AccountKey=" + "E" * 86 + "==",
    "dop_v1_" + "0a" * 32, "shpat_" + "ab" * 16, "key-" + "0f" * 16, "0f" * 16 + "-us12",
    "123456789:AA" + "g" * 33, "https://hooks.slack.com/services/T000/B000/" + "X" * 24,
]  # fmt: skip


@pytest.mark.parametrize("secret", SECRETS, ids=[s[:10] for s in SECRETS])
def test_a_token_of_known_form_does_not_survive(secret: str) -> None:
    text, notes = Redactor(PrivacyConfig()).redact(f"log in with {secret} then go on", "text")
    assert text.startswith("log in with ") and text.endswith(" then go on")
    assert "<SECRET>" in text
    assert all(part not in text for part in secret.split("=") if len(part) > 18)
    assert [note["entity"] for note in notes] == ["secret"]


@pytest.mark.parametrize("part", ["a-", "token-", "password", "api_key: '"])
def test_long_words_beside_a_secrets_name_take_no_longer_than_others(part: str) -> None:
    started = time.process_time()
    assert list(find_secrets("secret " + part * (40_000 // len(part)))) == []
    assert time.process_time() - started < 1


def test_the_password_of_a_url_goes_and_the_host_stays() -> None:
    text, _ = Redactor(PrivacyConfig()).redact("see https://bob:hunter22@db.example.com/x", "text")
    assert text == "see https://<SECRET>@db.example.com/x"


AWS_KEY = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKE"


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (f"export AWS_SECRET_ACCESS_KEY={AWS_KEY}Y", AWS_KEY + "Y"),
        (f"AwsSecretAccessKey: {AWS_KEY}/", AWS_KEY),
        ("redis://:s3cretpassw0rd@host:6379/0", "s3cretpassw0rd"),
        ('{"user": "bob", "password": "hunter2hunter2"}', "hunter2hunter2"),
        ('{"api_key":"Zx81Zx81Zx81"}', "Zx81Zx81Zx81"),
        ('say \\"secret\\": \\"hunter2hunter2\\"', "hunter2hunter2"),
        ("Token = 'hunter2hunter2'", "hunter2hunter2"),
        ("Client Secret: 'hunter2hunter2'", "hunter2hunter2"),
        ("Api-Key: 'hunter2hunter2'", "hunter2hunter2"),
        ("secretKey='<x>hunter2hunter2'", "hunter2hunter2"),
    ],
)
def test_a_credential_beside_its_name_does_not_survive(text: str, secret: str) -> None:
    assert secret in text and secret not in Redactor(PrivacyConfig()).redact(text, "text")[0]


@pytest.mark.parametrize(
    "text",
    ["the key-note speech", "a sk-inny latte", "token economics: prices", "std::vector<int> v;",
     '{"token": "Washington", "label": "LOC"}', '{"tokenUrl": "https://idp1.example.org/t"}',
     '{"tokenizer": "meta-llama/Llama-3"}', '{"eos_token": "<|im_end|>"}', "secretary: 'Katherine'",
     "see https://example.com/a:b@c", "git commit 3f786850e387550fdab836ed7e6dc881de23001b"],
)  # fmt: skip
def test_ordinary_text_is_no_secret(text: str) -> None:
    assert list(find_secrets(text)) == []


def test_findings_name_the_place_and_never_the_value() -> None:
    text, notes = Redactor(PrivacyConfig()).redact("Mail anna@example.com or +49 30 901820.", "m.0")
    assert text == "Mail <EMAIL> or <PHONE>."
    assert [(n["entity"], text[int(n["start"]) : int(n["end"])]) for n in notes] == [
        ("email", "<EMAIL>"), ("phone", "<PHONE>")
    ]  # fmt: skip
    assert "anna" not in json.dumps(notes)


def test_a_pseudonym_is_stable_within_a_key_and_says_nothing_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text(KEY)
    config = PrivacyConfig(actions={"email": "pseudonym"}, key_file=str(tmp_path / "key"))
    first, _ = Redactor(config).redact("anna@example.com met bob@example.com", "t")
    again, _ = Redactor(config).redact("ANNA@example.com", "t")
    anna, bob = first.split(" met ")
    assert anna == again != bob
    monkeypatch.setenv("TUNELOOM_PSEUDONYM_KEY", "another-key-of-the-tenant")
    other, _ = Redactor(PrivacyConfig(actions={"email": "pseudonym"})).redact(
        "anna@example.com", "t"
    )
    assert other != anna
    assert find(first, RECOGNISERS) == [], "a pseudonym must not look like personal data itself"


def test_pseudonyms_without_a_key_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUNELOOM_PSEUDONYM_KEY", raising=False)
    with pytest.raises(ConfigError, match="need a key of 16 bytes"):
        Redactor(PrivacyConfig(default="pseudonym"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_recipe_that_cannot_run_is_refused_by_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.delenv("TUNELOOM_PSEUDONYM_KEY", raising=False)
    (tmp_path / "raw.jsonl").write_text('{"text": "a"}\n')
    data = {"name": "d", "privacy": {"default": "pseudonym"}}
    places = {"source": str(tmp_path / "raw.jsonl"), "root": str(tmp_path / "ds")}
    with pytest.raises(ConfigError, match="need a key of 16 bytes"):
        ingest(build(IngestConfig, {"data": data, "workers": workers} | places))


def test_an_unknown_entity_in_actions_is_refused() -> None:
    with pytest.raises(ConfigError, match="no entity 'e-mail'"):
        build(PrivacyConfig, {"actions": {"e-mail": "drop"}})


def test_the_tenants_own_pattern_is_asked_first() -> None:
    own = [{"entity": "customer", "pattern": r"\bC-(?P<value>\d{6})\b", "near": ["customer"]}]
    redactor = Redactor(build(PrivacyConfig, {"recognisers": own}))
    assert redactor.redact("customer C-123456", "t")[0] == "customer C-<CUSTOMER>"
    assert redactor.redact("chapter C-123456", "t")[0] == "chapter C-123456"


@pytest.mark.parametrize("pattern", [r"C?\d*", r"C\d+|(?P<value>)", r"\b|C\d+"])
def test_a_tenants_pattern_that_may_match_nothing_masks_what_it_matches(pattern: str) -> None:
    own = [{"entity": "cust", "pattern": pattern}]
    redactor = Redactor(build(PrivacyConfig, {"recognisers": own}))
    assert redactor.redact("ask for it", "t") == ("ask for it", [])


def test_a_tenants_pattern_masks_between_the_places_where_it_matches_nothing() -> None:
    own = [{"entity": "cust", "pattern": r"C?\d*"}]
    redactor = Redactor(build(PrivacyConfig, {"recognisers": own}))
    assert redactor.redact("ask C123 now", "t")[0] == "ask <CUST> now"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_tenants_pattern_without_end_is_refused_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(recognisers, "PATIENCE_SECONDS", 0.5)  # with two workers it is 5
    (tmp_path / "raw.jsonl").write_text(json.dumps({"text": "a" * 60}) + "\n")
    own = [{"entity": "x", "pattern": "(a|aa)+b"}]
    places = {"source": str(tmp_path / "raw.jsonl"), "root": str(tmp_path / "ds")}
    data = {"name": "d", "privacy": {"recognisers": own}}
    with pytest.raises(ConfigError, match=r"recognisers\.0: '\(a\|aa\)\+b' took over"):
        ingest(build(IngestConfig, {"data": data, "workers": workers} | places))
    assert not list((tmp_path / "ds").iterdir())


def dataset(
    tmp_path: Path, lines: list[Any], **data: Any
) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    raw = tmp_path / "raw.jsonl"
    raw.write_text("".join(json.dumps(x) + "\n" for x in lines))
    mapping = {"data": {"name": "d", "split": {"train": 1, "validation": 0, "test": 0}, **data}}
    folder = ingest(
        build(IngestConfig, mapping | {"source": str(raw), "root": str(tmp_path / "ds")})
    )
    rows = pq.read_table(folder / "train-00000.parquet").to_pylist()
    return folder, json.loads((folder / "manifest.json").read_text()), rows


def test_rows_that_differ_only_in_personal_data_become_one(tmp_path: Path) -> None:
    lines = [{"text": f"Please reset the password of user{i}@example.com"} for i in range(9)]
    _, manifest, rows = dataset(tmp_path, lines)
    assert manifest["counts"]["deduplicated"] == {"exact": 8}
    assert manifest["found"] == {"email": 9}
    assert json.loads(rows[0]["meta"])["pii"][0]["entity"] == "email"


def test_a_row_with_an_entity_to_drop_leaves_no_trace_but_its_count(tmp_path: Path) -> None:
    lines = [{"text": "card 4111 1111 1111 1111 please"}, {"text": "fine"}]
    folder, manifest, _ = dataset(tmp_path, lines, privacy={"actions": {"card": "drop"}})
    assert manifest["counts"]["quarantined"] == {"privacy_card": 1}
    assert manifest["counts"]["kept"] == 1
    assert all(b"4111" not in path.read_bytes() for path in folder.iterdir())


def test_what_rejected_jsonl_shows_of_a_row_is_masked_even_if_rows_keep_all(tmp_path: Path) -> None:
    broken = {"messages": [{"role": "user", "content": "I am anna@example.com, " + "x" * 400}]}
    secret = {"title": "mine:\nghp_" + "a1B2" * 9}
    nobody = {"messages": [{"role": "anna@example.org", "content": "a"}]}
    privacy = {"default": "keep", "secrets": "off"}
    folder, _, _ = dataset(
        tmp_path, [broken, secret, nobody, {"text": "a"}], max_rejected=0.9, privacy=privacy
    )
    text = (folder / "rejected.jsonl").read_text()
    assert "<EMAIL>" in text and "<SECRET>" in text
    assert "anna" not in text and "ghp_" not in text


def test_what_rejected_jsonl_shows_is_masked_by_the_owners_patterns_too(tmp_path: Path) -> None:
    own = [{"entity": "customer", "pattern": "K-[0-9]{4}"}]
    folder, _, _ = dataset(
        tmp_path, [{"title": "K-1234"}, {"text": "a"}], max_rejected=0.9,
        privacy={"recognisers": own, "actions": {"customer": "keep"}},
    )  # fmt: skip
    text = (folder / "rejected.jsonl").read_text()
    assert "<CUSTOMER>" in text and "K-1234" not in text


def prepared(row: Any, **recipe: Any) -> Prepared:
    """One row, prepared by a recipe: as a line, or as a table gives it if it is no bytes."""
    block = Block(0, "s", 1, row) if isinstance(row, bytes) else Block(0, "s", 1, b"", [row])
    return Preparer(build(Recipe, {"name": "d", **recipe}))(block)


MAIL = "alice@corp.example.com"
TOKEN = "ghp_" + "a1B2" * 9


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    answer = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    return {"messages": [{"role": "user", "content": "q"}, answer]}


@pytest.mark.parametrize(
    "row",
    [
        call({"role": MAIL, "who": MAIL}), call({MAIL: "x", "n": 0}), call({TOKEN: {"a": MAIL}}),
        call({MAIL: None}),
        {"input": "q", "schema": {"type": "object"}, "answer": {"role": MAIL, TOKEN: 1}},
        {"input": "q", "schema": {"required": [MAIL]}, "answer": {MAIL: ""}},
        {"input": "q", "schema": {"type": "array"}, "answer": [("who", MAIL), (MAIL, 1)]},
    ],
)  # fmt: skip
def test_nothing_personal_survives_under_a_role_in_a_key_or_in_a_map(row: dict[str, Any]) -> None:
    done = prepared(row)
    assert done.rejects == []
    assert "alice" not in str(done.table.to_pylist()) and "ghp_" not in str(done.table.to_pylist())
    assert sum(done.found.values()) == str(row).count(MAIL) + str(row).count(TOKEN)


def arguments_of(done: Prepared) -> str:
    record = json.loads(done.table["record"][0].as_py())
    return str(record["messages"][1]["tool_calls"][0]["function"]["arguments"])


@pytest.mark.parametrize(
    ("note", "clean"),
    [
        ("Best,\n" + MAIL, "Best,\n<EMAIL>"), ("Call\n+49 151 23456789", "Call\n<PHONE>"),
        ("to\nDE89 3704 0044 0532 0130 00", "to\n<IBAN>"), ("key\t" + TOKEN, "key\t<SECRET>"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("as_text", [True, False])
def test_what_follows_a_line_end_in_a_calls_arguments_is_masked_and_they_stay_json(
    note: str, clean: str, as_text: bool
) -> None:
    said = {"note": note, "n": 2}
    found = json.loads(
        prepared(call(json.dumps(said) if as_text else said)).table["record"][0].as_py()
    )
    made = found["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert (json.loads(made) if as_text else made) == {"note": clean, "n": 2}


def test_what_follows_a_line_end_in_the_json_that_a_tool_gave_back_is_masked() -> None:
    row = call("{}")
    row["messages"].insert(2, {"role": "tool", "content": json.dumps({"by": f"it is\n{MAIL}"})})
    record = json.loads(prepared(row).table["record"][0].as_py())
    assert json.loads(record["messages"][2]["content"]) == {"by": "it is\n<EMAIL>"}


@pytest.mark.parametrize("said", ['{"card": 4111111111111111}', {"card": 4111111111111111}])
def test_a_card_given_as_a_number_is_masked(said: Any) -> None:
    done = prepared(call(said))
    assert "4111" not in str(done.table.to_pylist()) and done.found == {"card": 1}


def test_arguments_in_which_nothing_is_found_stay_as_they_were_written() -> None:
    said = '{ "b": 1.50,\t"a": "x\\ny", "sep": " ", "ü": "\\u00fc" }'
    done = prepared(call(said))
    assert done.rejects == [] and arguments_of(done) == said


@pytest.mark.parametrize("said", ["not JSON", '{"a": 1, "a": 2}', "[" * 70 + "]" * 70])
def test_arguments_that_no_template_could_show_are_rejected(said: str) -> None:
    (reject,) = prepared(call(said)).rejects
    assert reject["reason"] == "invalid_json"


def test_the_roles_and_keys_of_a_chat_are_no_personal_data() -> None:
    own = [{"entity": "word", "pattern": "assistant|content|messages"}]
    row = {"messages": [{"role": "assistant", "content": "hello"}]}
    done = prepared(row, privacy={"recognisers": own})
    assert json.loads(done.table["record"][0].as_py()) == row


def test_a_row_whose_keys_become_one_by_masking_is_rejected_by_name() -> None:
    done = prepared(call({"bob@example.com": 1, "eve@example.com": 2}))
    (reject,) = done.rejects
    assert reject["reason"] == "duplicate_key" and "eve" not in json.dumps(reject)
    assert reject["why"].endswith("function.arguments: two keys are the same once masked")


@pytest.mark.parametrize(
    ("dirty", "clean", "step"),
    [
        ("cafÃ©", "café", "mojibake"),
        ("Ð¿Ñ€Ð¸Ð²ÐµÑ‚", "привет", "mojibake"),
        ("bell\x07 and nul\x00", "bell and nul", "controls"),
        ("marker \ufdd0\ufdd1 here", "marker  here", "controls"),
        ("ad\u202emin\u2066x", "adminx", "bidi"),
        ("zero\u200bwidth\ufeff", "zerowidth", "invisible"),
        ("e\u0301te\u0301", "été", "nfc"),
        ("one\r\ntwo\rthree", "one\ntwo\nthree", "newlines"),
    ],
)
def test_dirty_text_is_repaired_and_the_step_is_named(dirty: str, clean: str, step: str) -> None:
    assert sanitise(dirty, SanitiseConfig(), frozenset()) == (clean, {step})


@pytest.mark.parametrize(
    "text", ["naïve café", "Ελληνικά", "می‌خواهم", "👩‍👩‍👧", "a\tb\nc", "“quoted” — so"]
)
def test_clean_text_of_any_script_is_left_alone(text: str) -> None:
    assert sanitise(text, SanitiseConfig(), frozenset()) == (text, frozenset())


def test_a_fiscal_code_with_digits_of_another_script_is_masked() -> None:
    text, _ = Redactor(PrivacyConfig()).redact("CF: RSSMRA８５T１０A５６２S.", "t")
    assert text == "CF: <IT_CF>."


@settings(max_examples=300, deadline=None)
@given(st.text())
@example("\xad\xc2\x91")  # a soft hyphen beside half of a broken quotation mark
@example("\x9b\xeb\xac\xea\x8d")  # a repair that brings a control
def test_sanitising_twice_is_sanitising_once(text: str) -> None:
    once, _ = sanitise(text, SanitiseConfig(), frozenset())
    assert sanitise(once, SanitiseConfig(), frozenset())[0] == once
    assert unicodedata.is_normalized("NFC", once)


def test_presidio_adds_its_patterns_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("presidio_analyzer")
    redactor = Redactor(PrivacyConfig(engine="presidio"))
    wallet = "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa"
    text, _ = redactor.redact(f"send bitcoin to wallet {wallet} and mail a@example.com", "t")
    assert text == "send bitcoin to wallet <CRYPTO> and mail <EMAIL>"


def test_detect_secrets_adds_its_detectors() -> None:
    pytest.importorskip("detect_secrets")
    text = "twilio SK0123456789abcdef0123456789abcdef and AKIAIOSFODNN7EXAMPLE"
    assert "SK0123" in Redactor(PrivacyConfig()).redact(text, "t")[0]
    redacted, _ = Redactor(PrivacyConfig(secrets="detect-secrets")).redact(text, "t")
    assert redacted == "twilio <SECRET> and <SECRET>"


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=30))
def test_of_overlapping_finds_the_earlier_recognisers_stays(spans: list[tuple[int, int]]) -> None:
    findings = [Finding("email", start, start + size) for start, size in spans]
    kept: list[Finding] = []
    for found in findings:  # each with each, which took minutes on a row of 1 MB
        if all(found.end <= other.start or found.start >= other.end for other in kept):
            kept.append(found)
    assert apart(findings) == sorted(kept, key=lambda finding: finding.start)


def test_a_row_full_of_addresses_or_of_dashes_takes_seconds() -> None:
    """Each took minutes: a find was held against all others, each start read to the end."""
    addresses = "a@b.co " * 140_000
    started = time.process_time()
    assert len(Redactor(PrivacyConfig()).find(addresses)) == 140_000
    assert list(find_secrets("eyJ-" * 250_000)) == []
    assert time.process_time() - started < 60
