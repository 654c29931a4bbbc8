"""report.html of a dataset: what its owner wants to see before signing for it, in one file."""
# ruff: noqa: E501 - lines of HTML and CSS

import html
import json
from collections.abc import Iterable, Mapping
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tuneloom.data.card import balance
from tuneloom.data.payloads import shown
from tuneloom.data.signoff import open_points
from tuneloom.data.store import read_column

SAMPLES = 8
COLOURS = {
    "kept": "#2f7d5b",
    "deduplicated": "#8a97a8",
    "quarantined": "#d08a1d",
    "rejected": "#b8423a",
}
STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5c6675; --line: #d9dee5; --paper: #fff; --tint: #f5f7f9 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa5b4; --line: #39424f; --paper: #14181e;
  --tint: #1c222b } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem;
  margin: 2.5rem auto; padding: 0 1.25rem }
h1 { font-size: 1.7rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem }
p { margin: .35rem 0 } .soft { color: var(--soft) } code, pre { font: 13px/1.5 ui-monospace, monospace }
table { border-collapse: collapse; max-width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .28rem .8rem .28rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: break-word; padding-right: 1.6rem; white-space: pre-line }
td code { overflow-wrap: anywhere }
table + table { margin-top: 1rem }
th { font-weight: 600; color: var(--soft) } .n { text-align: right; white-space: nowrap }
.flow { display: flex; height: 1.5rem; border-radius: 4px; overflow: hidden; margin: .8rem 0 }
.flow span { min-width: 3px } .key { display: inline-block; width: .75rem; height: .75rem; border-radius: 2px;
  margin-right: .45rem }
.bar { background: #2f7d5b; height: .7rem; border-radius: 2px; min-width: 1px }
pre { background: var(--tint); padding: .6rem .8rem; border-radius: 4px; white-space: pre-wrap; overflow-wrap: anywhere;
  margin: .4rem 0 }
.stop { border-left: 4px solid #b8423a; padding-left: .8rem } .fine { border-left: 4px solid #2f7d5b; padding-left: .8rem }
details summary { cursor: pointer } .role { color: var(--soft) }
@media print { body { margin: 0 } details { display: none } }
"""


def report(folder: Path, manifest: dict[str, Any]) -> str:
    """The page, from the files of a finished dataset folder."""
    name = f"{manifest['name']}@{manifest['id']}"
    parts = [
        _heading(name, manifest), _open(manifest), _flow(manifest), _licence(manifest),
        _privacy(manifest),
        _splits(manifest), _lengths(manifest), _rejects(folder), _aside(folder),
        _samples(folder, manifest), _sources(manifest), _recipe(manifest),
    ]  # fmt: skip
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(name)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def escape(value: object) -> str:
    """Text for HTML: rows are hostile until shown to be harmless."""
    return html.escape(str(value))


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table; numbers stand to the right."""
    listed = [list(row) for row in rows]
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in listed)
    first = listed[0] if listed else []
    right = [' class="n"' if isinstance(value, int) else "" for value in first]
    cells = "".join(
        f"<th{place}>{escape(name)}</th>" for name, place in zip_longest(head, right, fillvalue="")
    )
    return f"<table><tr>{cells}</tr>{body}</table>"


def _cell(value: object) -> str:
    if isinstance(value, int):
        return f'<td class="n">{value:,}</td>'
    return f"<td>{value if isinstance(value, Html) else escape(value)}</td>"


class Html(str):
    """Text that is HTML already."""


def _heading(name: str, manifest: Mapping[str, Any]) -> str:
    files = sum("sha256" in part for part in manifest["created_from"])
    splits = ", ".join(f"{s} {part['rows']:,}" for s, part in manifest["splits"].items())
    return (
        f"<h1>{escape(name)}</h1><p>{manifest['counts']['kept']:,} records from "
        f"{manifest['counts']['in']:,} rows in {files} {'file' if files == 1 else 'files'}: {splits}.</p>"
        '<p class="soft">The twelve digits are the digest of all that manifest.json says, the digests of '
        "rows and sources among it. Equal rows and an equal recipe give them again on any machine.</p>"
    )


def _open(manifest: Mapping[str, Any]) -> str:
    """What the owner should know before signing, first of all."""
    points = "".join(f"<li>{escape(point)}</li>" for point in open_points(manifest))
    return f"<h2>Before you sign</h2><ul>{points}</ul>" if points else ""


def _flow(manifest: Mapping[str, Any]) -> str:
    """Where every row went: the parts add up to the rows in."""
    counts = manifest["counts"]
    totals = {"kept": counts["kept"]} | {
        fate: sum(counts[fate].values()) for fate in ("deduplicated", "quarantined", "rejected")
    }
    bar = "".join(
        f'<span style="flex:{n};background:{COLOURS[fate]}" title="{fate} {n:,}"></span>'
        for fate, n in totals.items() if n
    )  # fmt: skip
    rows = [
        (Html(f'<span class="key" style="background:{COLOURS.get(what.split(":")[0], "transparent")}">'
              f"</span>{escape(what)}"), number, f"{number / max(1, counts['in']):.2%}")
        for what, number in balance(counts)
    ]  # fmt: skip
    extra = ""
    if manifest["against"]:
        names = ", ".join(escape(entry["name"]) for entry in manifest["against"])
        hits = (
            table(["known to, by", "rows"], manifest["leaks"].items()) if manifest["leaks"] else ""
        )
        extra = f"<p>Compared with {names}: {'' if hits else 'no row is known there.'}</p>{hits}"
    if manifest["label_conflicts"]:
        fate = "set aside" if "label_conflict" in counts["quarantined"] else "kept"
        extra += (f"<p>{manifest['label_conflicts']:,} rows answer a question that another row answers "
                 f"differently; they are {fate}.</p>")  # fmt: skip
    if issues := manifest.get("label_issues"):
        extra += (f"<p>Labels held against the words of their rows: {issues['suspected']:,} of "
                  f"{issues['checked']:,} look wrong; {issues['unchecked']:,} rows could not be judged.</p>")  # fmt: skip
    return f'<h2>Every row accounted for</h2><div class="flow">{bar}</div>{table(["", "rows", ""], rows)}{extra}'


def _licence(manifest: Mapping[str, Any]) -> str:
    licence = manifest["licence"]
    rows = [(name, number) for name, number in licence["licences"].items()]
    if licence["blockers"]:
        blocked = table(["source", "rows", "why"],
                        [(b["source"], b["rows"], b["reason"]) for b in licence["blockers"]])  # fmt: skip
        said = (f'<div class="stop"><p>Not cleared for {escape(licence["use"])} use: '
                f"{licence['rows_to_drop']:,} rows stand in the way.</p>{blocked}</div>")  # fmt: skip
    else:
        said = f'<div class="fine"><p>No source stands in the way of {escape(licence["use"])} use.</p></div>'
    effective = f"<p>Together: <code>{escape(licence['effective'])}</code></p>"
    return f"<h2>Licence and consent</h2>{said}{table(['licence', 'rows'], rows)}{effective}"


def _privacy(manifest: Mapping[str, Any]) -> str:
    """What was found, and what the recipe says to do with it."""
    if "privacy" not in manifest["recipe"]:
        return ""  # a mixture: its parts' reports say it
    privacy = manifest["recipe"]["privacy"]
    rows = [(entity, number, (privacy["actions"] or {}).get(entity, privacy["default"]))
            for entity, number in manifest["found"].items()]  # fmt: skip
    rows += [(why.removeprefix("privacy_"), number, "drop: these rows are left out")
             for why, number in manifest["counts"]["quarantined"].items() if why.startswith("privacy_")]  # fmt: skip
    found = table(["found", "times", "action"], rows) if rows else "<p>Nothing was found.</p>"
    changed = (
        table(["repaired text", "rows"], manifest["sanitised"].items())
        if manifest["sanitised"]
        else ""
    )
    return (
        f"<h2>Personal data, secrets, repairs</h2>{found}{changed}"
        f'<p class="soft">Engine: {escape(privacy["engine"])}; secrets: {escape(privacy["secrets"])}. '
        "Names and street addresses have no form that a pattern could find: this page does not promise "
        "that none is left.</p>"
    )


def _splits(manifest: Mapping[str, Any]) -> str:
    splits = manifest["splits"]
    if manifest["labels"]:
        rows: list[list[object]] = [
            [
                label,
                *(by.get(s, 0) for s in splits),
                _bar(sum(by.values()), _most(manifest["labels"])),
            ]
            for label, by in manifest["labels"].items()
        ]
    else:
        rows = [["all rows", *(part["rows"] for part in splits.values()), ""]]
    digests = table(
        ["split", "rows", "digest"], [(s, p["rows"], p["digest"]) for s, p in splits.items()]
    )
    return f"<h2>Splits</h2>{table(['label', *splits, ''], rows)}<br>{digests}"


def _most(labels: Mapping[str, Mapping[str, int]]) -> int:
    return max(sum(by.values()) for by in labels.values())


def _bar(number: int, most: int) -> Html:
    return Html(f'<div class="bar" style="width:{14 * number / max(1, most):.2f}rem"></div>')


def _lengths(manifest: Mapping[str, Any]) -> str:
    lengths = manifest["lengths"]
    most = max(lengths["rows"], default=1)
    rows = [
        (f"up to {edge:,}", n, _bar(n, most))
        for edge, n in zip(lengths["up_to"], lengths["rows"], strict=True)
    ]
    return f"<h2>Characters a record</h2>{table(['characters', 'rows', ''], rows)}"


def _rejects(folder: Path) -> str:
    """The first rejects of each reason; their text was masked when they were written."""
    firsts: dict[str, list[dict[str, Any]]] = {}
    with (folder / "rejected.jsonl").open(encoding="utf-8") as file:
        for line in file:
            reject = json.loads(line)
            group = firsts.setdefault(reject["reason"], [])
            if len(group) < 3:
                group.append(reject)
    if not firsts:
        return ""
    rows = [(r["reason"], f"{r['source']}:{r['line']}", r["why"], Html(f"<code>{escape(r['start'])}</code>"))
            for reason in sorted(firsts) for r in firsts[reason]]  # fmt: skip
    return f"<h2>Rejected, the first of each reason</h2>{table(['reason', 'where', 'why', 'start'], rows)}"


def _aside(folder: Path) -> str:
    """The first rows set aside for each reason, where their text is kept."""
    firsts: dict[str, list[dict[str, Any]]] = {}
    for batch in pq.ParquetFile(folder / "set_aside.parquet").iter_batches(2_000):
        for row in batch.to_pylist():
            group = firsts.setdefault(row["reason"], [])
            if len(group) < 3 and row["record"]:
                group.append(row)
    rows = [(row["reason"], f"{row['source']}:{row['line']}", Html(_turns(row["record"], 300)),
             row.get("note") or "")
            for reason in sorted(firsts) for row in firsts[reason]]  # fmt: skip
    noted = any(row[3] for row in rows)
    cut: list[tuple[object, ...]] = [*rows] if noted else [row[:3] for row in rows]
    head = ["reason", "where", "record", *(["note"] if noted else [])]
    return f"<h2>Set aside, the first of each reason</h2>{table(head, cut)}" if rows else ""


def _samples(folder: Path, manifest: dict[str, Any]) -> str:
    """The first rows of each split; their order by id makes them a random sample."""
    parts = []
    for split in manifest["splits"]:
        records = islice(
            read_column(folder, manifest, split, "record"), SAMPLES if split == "train" else 3
        )
        read = "".join(f"<pre>{_turns(record, 1500)}</pre>" for record in records)
        if read:
            parts.append(f"<h2>From {escape(split)}</h2>{read}")
    return "".join(parts)


def _turns(record: str, limit: int) -> str:
    """A record as a person reads it, cut at a length."""
    return "\n".join(
        f'<span class="role">{escape(role)}</span> {escape(text[:limit])}{"…" if len(text) > limit else ""}'
        for role, text in shown(json.loads(record))
    )


def _sources(manifest: Mapping[str, Any]) -> str:
    if manifest["mixture"]:
        shares = [(p["dataset"], p["rows"], f"{p['share']:.2%}", f"{p['epochs']:.2f}", p["held_out"])
                  for p in manifest["mixture"]]  # fmt: skip
        head = ["part", "train rows", "share", "epochs", "left out: held out by a part"]
        return f"<h2>Mixture</h2>{table(head, shares)}"
    rows = []
    for part in manifest["created_from"]:
        if "dataset" in part:
            rows.append((f"{part['dataset']}, its keys of {part['split']}", "", "", "", "", ""))
        else:
            said = part["provenance"]
            rows.append((part["name"], part["rows"], part["kept"], said["owner"] or "unknown",
                         f"{said['licence'] or 'unknown'}; consent: {said['consent'] or 'unknown'}"
                         + (f" until {said['consent_until']}" if said["consent_until"] else ""),
                         Html(f"<code>{escape(part['sha256'][:16])}</code>")))  # fmt: skip
    head = ["made from", "rows", "kept", "owner", "terms", "sha256"]
    refused = manifest.get("refused_files")
    closed = (
        table(["refused file", "why"], [(r["name"], r["why"]) for r in refused]) if refused else ""
    )
    return f"<h2>Sources</h2>{table(head, rows)}{closed}"


def _recipe(manifest: Mapping[str, Any]) -> str:
    text = json.dumps(manifest["recipe"], indent=1, ensure_ascii=False, sort_keys=True)
    return f"<h2>Recipe</h2><details><summary>{escape(manifest['config_digest'])}</summary><pre>{escape(text)}</pre></details>"
