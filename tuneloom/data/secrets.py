"""Credentials in text: tokens of known form, private keys, passwords in URLs.

The table is ours because it must cost microseconds a row: nothing runs unless the text holds a
token's anchor. `privacy.secrets=detect-secrets` adds that library's detectors, 1.5 ms a KB.
"""

import functools
import re
from collections.abc import Iterator
from typing import Any

from tuneloom.data.recognisers import Finding
from tuneloom.errors import ConfigError

PATTERNS: list[tuple[tuple[str, ...], str]] = [
    (("AKIA", "ASIA", "ABIA", "ACCA"), r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}\b"),
    (("aws", "AWS", "Aws"),
     r"(?i)aws_?(?:secret_?)?(?:access_?)?key\W{1,5}[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])"),
    (("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"\bgh[pousr]_[A-Za-z0-9]{36,255}\b"),
    (("github_pat_",), r"\bgithub_pat_\w{22,255}\b"),
    (("glpat-",), r"\bglpat-[\w-]{20,}"),
    (("eyJ",), r"\beyJ[\w-]{8,2048}\.eyJ[\w-]{8,}\.[\w-]{8,}"),
    (("-----BEGIN",),
     r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[\s\S]*?-----END [A-Z ]*PRIVATE KEY-----|[\s\S]*)"),
    (("sk-",), r"\bsk-(?:proj-|ant-|svcacct-|or-v1-)?[\w-]{20,}"),
    (("hf_",), r"\bhf_[A-Za-z0-9]{30,}\b"),
    (("npm_",), r"\bnpm_[A-Za-z0-9]{36}\b"),
    (("pypi-",), r"\bpypi-[\w-]{50,}"),
    (("SG.",), r"\bSG\.[\w-]{16,}\.[\w-]{16,}"),
    (("xox", "xapp-"), r"\b(?:xox[abeoprs]-[\w-]{10,}|xapp-\d-[\w-]{10,})"),
    (("hooks.slack.com",), r"https://hooks\.slack\.com/services/[\w/]{20,}"),
    (("sk_live_", "rk_live_", "sk_test_"), r"\b[sr]k_(?:live|test)_[A-Za-z0-9]{16,}\b"),
    (("sq0",), r"\bsq0(?:atp|csp)-[\w-]{22,}"),
    (("AIza",), r"\bAIza[\w-]{35}"),
    (("ya29.",), r"\bya29\.[\w-]{20,}"),
    (("AccountKey=",), r"AccountKey=[A-Za-z0-9+/=]{80,}"),
    (("dop_v1_",), r"\bdop_v1_[a-f0-9]{64}\b"),
    (("shpat_", "shpss_"), r"\bshp(?:at|ss)_[a-fA-F0-9]{32}\b"),
    (("key-",), r"\bkey-[0-9a-f]{32}\b"),
    (("-us",), r"\b[0-9a-f]{32}-us\d{1,2}\b"),
    ((":AA",), r"\b\d{8,10}:AA[\w-]{33}\b"),
    (("://",), r"(?<=://)[^\s/:@]{0,64}:[^\s/@]{3,}(?=@[\w.-])"),
    (("Bearer ", "bearer "), r"(?i)(?<=bearer )[\w.~+/-]{24,}=*"),
    (("assw", "ASSW", "ecret", "ECRET", "api", "Api", "API", "oken", "OKEN"),
     # Not of a tokenizer or a secretary; and <pad> is no value, nor is what a redactor put there.
     r"(?i)(?:password|passwd|secret|api[_-]?key|token)(?:s|key)?(?-i:(?![a-z]))[\w-]{0,64}"
     # Behind a quoted key, as in JSON, a value has a digit: {"token": "Washington"} is none.
     r"(?:\\?[\"']\s?[=:]\s?\\?[\"'](?=[^\s\"']*\d)(?!https?:)|\s?[=:]\s?\\?[\"'])"
     r"(?!<[^\s\"']*>\\?[\"'])(?P<value>[^\s\"']{8,})[\"']"),
]  # fmt: skip
COMPILED = [(anchors, re.compile(pattern)) for anchors, pattern in PATTERNS]
# Sorted by a character that all anchors of a pattern share, most patterns cost nothing on prose.
BY_HINT = {
    hint: [
        (anchors, pattern) for anchors, pattern in COMPILED
        if next((h for h in "_-=:" if all(h in a for a in anchors)), "") == hint
    ]
    for hint in ("_", "-", "=", ":", "")
}  # fmt: skip


def find_secrets(text: str) -> Iterator[Finding]:
    """Credentials of known form; overlapping finds of two patterns come out as one."""
    spans: list[tuple[int, int]] = []
    for hint, group in BY_HINT.items():
        for anchors, pattern in group if hint in text else ():
            if any(anchor in text for anchor in anchors):
                spans += [match.span(match.lastgroup or 0) for match in pattern.finditer(text)]
    yield from _merged(spans)


def find_with_detect_secrets(text: str) -> Iterator[Finding]:
    """The same, and what the detectors of detect-secrets find line by line."""
    spans = [(found.start, found.end) for found in find_secrets(text)]
    offset = 0
    for line in text.split("\n"):
        for detector in _detectors():
            for value in detector.analyze_string(line):
                if value and len(str(value)) >= 8:
                    found = re.finditer(re.escape(str(value)), line)
                    spans += [(offset + m.start(), offset + m.end()) for m in found]
        offset += len(line) + 1
    yield from _merged(spans)


@functools.cache
def _detectors() -> list[Any]:
    """All detectors but public IPs, which are the privacy config's business, and bare entropy."""
    try:
        from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    except ImportError:
        raise ConfigError(
            "data.privacy.secrets: detect-secrets is not installed; pip install 'tuneloom[data]'"
        ) from None
    # On prose, entropy and keyword detectors fire on words in quotes; the rest are token shapes.
    left_out = {"IPPublicDetector", "Base64HighEntropyString", "HexHighEntropyString"}
    classes: Any = get_mapping_from_secret_type_to_class().values()
    return [cls() for cls in classes if cls.__name__ not in left_out]


def _merged(spans: list[tuple[int, int]]) -> Iterator[Finding]:
    """Spans in order, those that touch joined."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and start < joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return (Finding("secret", start, end) for start, end in joined)
