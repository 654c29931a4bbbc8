"""card.md: what a dataset holds, on one page, every figure taken from its manifest."""

from typing import Any


def card(manifest: dict[str, Any]) -> str:
    """The card of a dataset as Markdown."""
    counts = manifest["counts"]
    lines = [f"# {manifest['name']}@{manifest['id']}", "", "| what | rows |", "|---|---:|"]
    lines += [f"| {what} | {rows:,} |" for what, rows in balance(counts)]
    lines += ["", "| split | rows |", "|---|---:|"]
    lines += [f"| {name} | {part['rows']:,} |" for name, part in manifest["splits"].items()]
    if manifest["labels"]:
        head = list(manifest["splits"])
        lines += ["", "| label | " + " | ".join(head) + " |", "|---|" + "---:|" * len(head)]
        for label, by_split in manifest["labels"].items():
            cells = " | ".join(f"{by_split.get(name, 0):,}" for name in head)
            lines.append(f"| {label} | {cells} |")
    lines += ["", "| made from | rows | digest |", "|---|---:|---|"]
    for part in manifest["created_from"]:
        if "dataset" in part:
            lines.append(f"| split {part['split']} of {part['dataset']} | | |")
        else:
            lines.append(f"| {part['name']} | {part['rows']:,} | `{part['sha256'][:16]}` |")
    return "\n".join(lines) + "\n"


def balance(counts: dict[str, Any]) -> list[tuple[str, int]]:
    """Rows in, and each place they went; the places add up to the rows in."""
    rows = [("rows in", counts["in"])]
    for fate in ("rejected", "deduplicated", "quarantined"):
        rows += [(f"{fate}: {why}", number) for why, number in sorted(counts[fate].items())]
    return [*rows, ("kept", counts["kept"])]
