"""One block of raw rows into prepared rows and rejects: a pure function, run in any process.

A row is parsed, mapped to a record, checked, sanitised, freed of secrets and personal data, and
only then named by its id: rows that differ in nothing but a mail address become duplicates here.
Rows come back as an Arrow table sorted by id; `gather.py` merges the tables of all blocks.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import orjson
import pyarrow as pa

from tuneloom.data import records
from tuneloom.data.contamination import Contamination
from tuneloom.data.dedupe import signature
from tuneloom.data.fields import MissingField, compile_template
from tuneloom.data.mapping import UnknownShape, mapper
from tuneloom.data.payloads import DEEPEST, EXTRACTED, Fault, deeper, normal, payload_of
from tuneloom.data.provenance import Provenance, allows
from tuneloom.data.quality import own_text, texts, weakness
from tuneloom.data.questions import asked_and_answered, contested, hash64
from tuneloom.data.readers import Block
from tuneloom.data.recipe import Recipe
from tuneloom.data.redact import DropRow, Redactor, excerpt_redactor
from tuneloom.data.sanitise import CONTROLS, sanitise
from tuneloom.data.schema import Reject, check, is_plain
from tuneloom.data.strict_json import DECODER, parse_line
from tuneloom.data.tenant_schema import refuse_unlike, schema_check
from tuneloom.errors import DataError

ROW = pa.schema([
    ("id", pa.string()), ("record", pa.string()), ("source", pa.string()), ("meta", pa.string()),
    ("line", pa.int64()), ("rank", pa.int32()), ("key", pa.uint64()), ("asked", pa.uint64()),
    ("answer", pa.uint64()), ("label", pa.string()), ("weak", pa.string()), ("leak", pa.string()),
    ("signature", pa.binary()),
])  # fmt: skip
EXCERPT = 200
BARRED = 1_000
"""More than any rank of trust."""
ORIGIN = ("teacher", "teacher_licence", "prompt_digest", "seed", "score")
SORTED = orjson.OPT_SORT_KEYS
NOTHING: frozenset[str] = frozenset()
LONE_SURROGATE = ("lone_surrogate", "half of a surrogate pair, which is no text")
TURN = re.compile(r"messages\.\d+")
ARGUMENTS = re.compile(r"messages\.\d+\.tool_calls\.\d+\.function\.arguments")

ESCAPES = re.compile(r"\\+[bfnrt]")
"""As JSON writes a line's end: the `n` would hide what begins behind it."""


@dataclass
class Prepared:
    """What became of one block."""

    table: pa.Table
    rows_in: int = 0
    rejects: list[dict[str, Any]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)


class Preparer:
    """A recipe made ready to run: templates and patterns compiled once a process."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.content = mapper(recipe.record)
        self.conforms = schema_check(recipe.json_schema) if recipe.json_schema else None
        self.key = compile_template(recipe.key, key="data.key") if recipe.key else None
        self.label = compile_template(recipe.label, key="data.label") if recipe.label else None
        self.subject = (
            compile_template(recipe.subject, key="data.subject") if recipe.subject else None
        )
        self.provenance = Provenance(recipe.provenance)
        self.contamination = Contamination(recipe.against, recipe.near)
        self.redactor = Redactor(recipe.privacy)
        self.masks = excerpt_redactor(recipe.privacy)

    def __call__(self, block: Block) -> Prepared:
        """Prepare every row of a block; a bad one becomes a reject, never an exception."""
        done = Prepared(table=ROW.empty_table())
        rows: list[tuple[Any, ...]] = []
        rank = self.rank(block.source)
        for line, raw in numbered(block):
            done.rows_in += 1
            try:
                row_id, record, meta, *numbers = self.row(raw, line, done)
            except Reject as reject:
                done.rejects.append(excerpt(raw, block.source, line, reject, self.masks))
            except DropRow as drop:
                done.dropped[f"privacy_{drop.entity}"] += 1
            else:
                rows.append((row_id, record, block.source, meta, line, rank, *numbers))
        rows.sort(key=itemgetter(0, 4))
        columns = zip(*rows, strict=True) if rows else [[] for _ in ROW]
        arrays = [pa.array(c, type=f.type) for c, f in zip(columns, ROW, strict=True)]
        done.table = pa.Table.from_arrays(arrays, schema=ROW)
        return done

    def rank(self, source: str) -> int:
        """Sorts the most trusted first, and what does not allow the use last of all."""
        entry = self.provenance.of(source)
        barred = allows(entry, self.recipe.use, self.recipe.as_of) is not None
        return entry.rank + BARRED * barred

    def row(
        self, raw: bytes | Reject | dict[str, Any], line: int, done: Prepared
    ) -> tuple[Any, ...]:
        """One raw row in the order of ROW, without its place; raises Reject or DropRow."""
        fields = self.parse(raw)
        if self.conforms:
            self.conforms(fields)
        content, key, label, subject = self.mapped(fields)
        check(content)
        payload, plain = payload_of(content), False
        if payload:
            content = _normal(payload, content)
        elif not (plain := is_plain(content)):
            content = _parsed(content)
        content, changed, findings = self.clean(content)
        if payload:  # masking may make two labels one, or an answer that breaks its schema
            content = _normal(payload, content)
            label = content.get("label") if label is None else label
        encoded = canonical_bytes(content, plain=plain)
        question, answer = asked_and_answered(content)
        asked = hash64(question)
        matter, verdict = contested(content) if payload else (question, answer)
        key_number = asked if key is None else hash64(key)
        meta: dict[str, Any] = {"key": f"{key_number:016x}", "line": line}
        if label is not None:
            meta["label"] = label
        if subject is not None:
            meta["subject"] = f"{hash64(subject):016x}"
        if "meta" in fields and (synthetic := origin_of(fields)):
            meta["synthetic"] = synthetic
        if changed:
            meta["sanitised"] = sorted(changed)
            done.changed.update(changed)
        if findings:
            meta["pii"] = findings
            done.found.update(finding["entity"] for finding in findings)
        near, text = self.recipe.near, "\n".join(texts(content))
        record_id = hashlib.sha256(encoded).hexdigest()
        return (
            record_id, encoded, orjson.dumps(meta, option=SORTED), key_number,
            asked if matter is question else hash64(matter), hash64(verdict), label,
            weakness(content, text, self.recipe.quality),
            self.contamination.hit(record_id, asked, content),
            signature(own_text(content), near) if near.action != "off" else None,
        )  # fmt: skip

    def parse(self, raw: bytes | Reject | dict[str, Any]) -> dict[str, Any]:
        """The fields of a raw row; raises Reject."""
        if isinstance(raw, Reject):
            raise raw
        if isinstance(raw, dict):  # of a table or a .json: there is no line to measure
            if (size := len(str(raw))) > self.recipe.max_row_bytes:
                raise Reject("too_long", f"{size:,} characters, over data.max_row_bytes")
            return raw
        if len(raw) > self.recipe.max_row_bytes:
            raise Reject("too_long", f"{len(raw):,} bytes, over data.max_row_bytes")
        return parse_line(raw)

    def mapped(
        self, fields: dict[str, Any]
    ) -> tuple[dict[str, Any], str | None, str | None, str | None]:
        """Content, split key, label and subject of a raw row; raises Reject."""
        try:
            content = self.content(fields)
            key = self.key(fields) if self.key else None
            label = (self.label(fields) if self.label else None) or None  # empty is none
            subject = self.subject(fields) if self.subject else None
        except MissingField as missing:
            raise Reject("missing_field", f"{missing.args[0]}: missing or null") from None
        except UnknownShape as unknown:
            raise Reject("unknown_shape", str(unknown)) from None
        refuse_halves(key, label, subject)
        return content, key, label, subject

    def clean(
        self, content: dict[str, Any]
    ) -> tuple[dict[str, Any], set[str], list[dict[str, Any]]]:
        """Sanitised and redacted content, what was changed, what was found."""
        changed: set[str] = set()
        findings: list[dict[str, Any]] = []

        def text(value: str, field: str) -> str:
            clean, steps = sanitise(value, self.recipe.sanitise, NOTHING)
            if steps:
                changed.update(steps)
            redacted, notes = self.redactor.redact(clean, field)
            if notes:
                findings.extend(notes)
            if (not redacted or redacted.isspace()) and not value.isspace():
                raise Reject("empty", f"{field}: nothing left after sanitising")
            return redacted

        return rewrite(content, text, ""), changed, findings


def origin_of(fields: dict[str, Any]) -> dict[str, Any]:
    """What `tuneloom synthesise` wrote of a row's teacher, prompt and seed; else nothing."""
    said = fields.get("meta")
    said = said.get("synthetic") if isinstance(said, dict) else None
    if not isinstance(said, dict):
        return {}
    made = {key: said.get(key) for key in ORIGIN}
    for key, value in made.items():
        large = isinstance(value, int) and abs(value) >= 1 << 63  # more than meta can hold
        if large or not isinstance(value, str | int | float | None):
            raise Reject("wrong_type", f"meta.synthetic.{key}: expected a text or a number")
    refuse_halves(*made.values())
    return made


def refuse_halves(*values: Any) -> None:
    """Raise Reject for a text that UTF-8 cannot hold."""
    try:
        for value in values:
            if isinstance(value, str):
                value.encode()
    except UnicodeEncodeError:
        raise Reject(*LONE_SURROGATE) from None


def rewrite(value: Any, text: Callable[[str, str], str], field: str) -> Any:
    """`value` with every text in it replaced, keys too; a row's own keys and roles stay.

    What is found in a key is said of the object that holds it. Raises Reject where keys meet. A
    number that `text` replaces becomes text.
    """
    if type(value) is str:
        return _rewrite_text(value, text, field) if value else value
    if type(value) is int:
        shown = str(value)
        made_of_it = text(shown, field)
        return value if made_of_it == shown else made_of_it
    if type(value) is dict:
        made: dict[Any, Any] = {}
        ours = not field or TURN.fullmatch(field)  # keys that have been checked
        for name, inner in value.items():
            key = text(name, field) if name and not ours else name
            if key in made:
                raise Reject("duplicate_key", f"{field}: two keys are the same once masked")
            if not inner or (ours and name == "role"):
                made[key] = inner
                continue
            place = f"{field}.{key}" if field else key
            if key == "arguments" and type(inner) is str and ARGUMENTS.fullmatch(place):
                made[key] = _rewrite_arguments(inner, text, place)
            else:
                made[key] = rewrite(inner, text, place)
        return made
    if type(value) is list or type(value) is tuple:  # Arrow gives a map as pairs
        return [rewrite(inner, text, f"{field}.{i}") for i, inner in enumerate(value)]
    return value


def _rewrite_text(value: str, text: Callable[[str, str], str], field: str) -> str:
    """Text replaced; JSON with escapes by what it says: in `\\nanna@..` the `n` begins a word."""
    if "\\" in value and value.lstrip()[:1] in ("{", "["):
        said = _json_of(value)
        if said is not None:
            return _rewrite_json(value, said, text, field)
    return text(value, field)


def _rewrite_arguments(value: str, text: Callable[[str, str], str], field: str) -> str:
    """The arguments of a call replaced by what they say; raises Reject for what is no JSON."""
    said = _json_of(value)
    if said is None:
        raise Reject("invalid_json", f"{field}: no JSON, or a key twice, or nested too deeply")
    return _rewrite_json(value, said, text, field)


def _rewrite_json(value: str, said: Any, text: Callable[[str, str], str], field: str) -> str:
    """`value`, which says `said`, as it was written unless anything in it is replaced."""
    made = rewrite(said, text, field)
    return value if made == said else json.dumps(made, ensure_ascii=False)


def _json_of(value: str) -> Any:
    """What a text says as JSON, None where readers could disagree about it."""
    try:
        said = DECODER.decode(value)
    except (ValueError, RecursionError):  # a Reject is a ValueError
        return None
    return None if deeper(said, DEEPEST) else said


def _parsed(content: dict[str, Any]) -> dict[str, Any]:
    """A record with tools, calls or other rare parts: checked by the code that training uses."""
    try:
        return dict(records.parse(content).content)
    except DataError as error:
        raise Reject("invalid_record", str(error)) from None


def _normal(kind: str, content: dict[str, Any]) -> dict[str, Any]:
    """A pair, a labelled or an extracted row, checked; an answer must follow its schema."""
    try:
        content = normal(kind, content)
    except Fault as fault:
        raise Reject(fault.code, fault.sentence) from None
    if kind == EXTRACTED:
        refuse_unlike(content["answer"], content["schema"])
    return _parsed(content)


def numbered(block: Block) -> Iterator[tuple[int, bytes | Reject | dict[str, Any]]]:
    """Rows that are not blank lines, each with its number in the source."""
    if block.rows is not None:
        yield from enumerate(block.rows, block.first)
        return
    for offset, line in enumerate(block.lines.split(b"\n")):
        stripped = line.strip()
        if block.first + offset == 1:
            stripped = stripped.removeprefix(b"\xef\xbb\xbf")
        if stripped:
            yield block.first + offset, stripped


def canonical_bytes(content: dict[str, Any], *, plain: bool) -> bytes:
    """records.canonical as UTF-8; orjson writes the same bytes 8 us sooner, save for floats."""
    try:
        if plain:
            return orjson.dumps(content, option=SORTED)
        return records.canonical(content).encode("utf-8")
    except (UnicodeEncodeError, orjson.JSONEncodeError):
        raise Reject(*LONE_SURROGATE) from None


def excerpt(
    raw: bytes | Reject | dict[str, Any], source: str, line: int, reject: Reject, masks: Redactor
) -> dict[str, Any]:
    """What rejected.jsonl says of a row: it is masked, whatever the recipe keeps."""
    if isinstance(raw, dict):
        start = json.dumps(raw, ensure_ascii=False, default=str)[: 8 * EXCERPT]
    else:
        start = "" if isinstance(raw, Reject) else raw[: 8 * EXCERPT].decode("utf-8", "replace")
    why = _shown(reject.sentence, masks)
    return {"source": source, "line": line, "reason": reject.code, "why": why,
            "start": _shown(start, masks)[:EXCERPT]}  # fmt: skip


def _shown(text: str, masks: Redactor) -> str:
    """What may be written of a row that was not cleaned."""
    plain = CONTROLS.sub("", text.encode("utf-8", "replace").decode("utf-8"))
    plain = ESCAPES.sub(" ", plain)
    return masks.redact(plain, "")[0]
