"""One block of raw lines into prepared rows and rejects: a pure function, run in any process.

Rows come back as an Arrow table sorted by id; `gather.py` merges the tables of all blocks.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from tuneloom.data.mapping import UnknownShape, mapper
from tuneloom.data.readers import Block
from tuneloom.data.recipe import Recipe
from tuneloom.data.schema import Reject, check
from tuneloom.data.template import MissingField, compile_template

ROW = pa.schema([
    ("id", pa.string()), ("record", pa.string()), ("source", pa.string()), ("meta", pa.string()),
    ("line", pa.int64()), ("key", pa.uint64()), ("label", pa.string()),
])  # fmt: skip
EXCERPT = 200
canonical = json.JSONEncoder(
    ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False
).encode


@dataclass
class Prepared:
    """What became of one block."""

    table: pa.Table
    rows_in: int = 0
    rejects: list[dict[str, Any]] = field(default_factory=list)

    def reasons(self) -> Counter[str]:
        return Counter(reject["reason"] for reject in self.rejects)


def key_hash(text: str) -> int:
    """The 64 bits that a split key is known by; joins rows across datasets made with one key."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


class Preparer:
    """A recipe made ready to run: templates compiled once a process."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.content = mapper(recipe.record)
        self.key = compile_template(recipe.key, key="data.key") if recipe.key else None
        self.label = compile_template(recipe.label, key="data.label") if recipe.label else None

    def __call__(self, block: Block) -> Prepared:
        """Prepare every line of a block; a bad one becomes a reject, never an exception."""
        done = Prepared(table=ROW.empty_table())
        rows = []
        for line, raw in numbered(block):
            done.rows_in += 1
            try:
                rows.append(self.row(raw, block.source, line))
            except Reject as reject:
                done.rejects.append(excerpt(raw, block.source, line, reject))
        rows.sort(key=lambda row: (row["id"], row["line"]))
        done.table = pa.Table.from_pylist(rows, schema=ROW)
        return done

    def row(self, raw: bytes, source: str, line: int) -> dict[str, Any]:
        """One raw line as a prepared row; raises Reject."""
        if len(raw) > self.recipe.max_row_bytes:
            raise Reject("too_long", f"{len(raw):,} bytes, over data.max_row_bytes")
        fields = parse_line(raw)
        try:
            content = self.content(fields)
            label = self.label(fields) if self.label else None
            key = self.key(fields) if self.key else None
        except MissingField as missing:
            raise Reject("missing_field", f"{missing.args[0]}: missing or null") from None
        except UnknownShape as unknown:
            raise Reject("unknown_shape", str(unknown)) from None
        check(content)
        record = canonical(content)
        key_number = key_hash(key if key is not None else asked(content))
        meta = {"key": f"{key_number:016x}", "line": line}
        if label is not None:
            meta["label"] = label
        try:
            encoded = record.encode("utf-8")
        except UnicodeEncodeError:
            raise Reject("lone_surrogate", "half of a surrogate pair, which is no text") from None
        return {
            "id": hashlib.sha256(encoded).hexdigest(), "record": record, "source": source,
            "meta": canonical(meta), "line": line, "key": key_number, "label": label,
        }  # fmt: skip


def numbered(block: Block) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, each with its number in the source."""
    for offset, line in enumerate(block.lines.split(b"\n")):
        stripped = line.strip()
        if block.first + offset == 1:
            stripped = stripped.removeprefix(b"\xef\xbb\xbf")
        if stripped:
            yield block.first + offset, stripped


def parse_line(raw: bytes) -> dict[str, Any]:
    """A JSON object whose keys are unique and whose numbers are finite; raises Reject."""
    try:
        value = DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Reject("invalid_utf8", f"byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise Reject("invalid_json", "nested too deeply") from None
    except json.JSONDecodeError as error:
        raise Reject("invalid_json", f"{error.msg} at character {error.pos}") from None
    if not isinstance(value, dict):
        raise Reject("not_an_object", f"expected an object, got {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, or Reject: JSON readers differ in which of two equal keys they keep."""
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise Reject("duplicate_key", f"the key {twice[:40]!r} stands twice")
    return made


def _finite(constant: str) -> float:
    raise Reject("not_finite", f"{constant} is no JSON number")


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_finite)


def asked(content: Mapping[str, Any]) -> str:
    """The input side of a record: what two conflicting answers would share."""
    if "messages" in content:
        turns = content["messages"]
        last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
        return str(canonical([[turn["role"], turn.get("content")] for turn in turns[:last]]))
    return str(content.get("prompt", content.get("text")))


def excerpt(raw: bytes, source: str, line: int, reject: Reject) -> dict[str, Any]:
    """What rejected.jsonl says of a row."""
    start = raw[: 4 * EXCERPT].decode("utf-8", "replace")[:EXCERPT]
    return {"source": source, "line": line, "reason": reject.code, "why": reject.sentence,
            "start": start}  # fmt: skip
