"""The page on which a person reads golden rows and decides: static, no server, nothing is sent.

The file that it saves is what `tuneloom golden action=decide decisions=FILE` takes.
"""
# ruff: noqa: E501 - lines of HTML, CSS and JavaScript

import html

from tuneloom.data.curate import Row
from tuneloom.data.payloads import shown


def text_of(row: Row) -> str:
    """A record as a person reads it."""
    return "\n\n".join(f"{name}: {text}" for name, text in shown(row.record.content))


def page(name: str, rows: list[Row]) -> str:
    """The review page: read, choose, save; nothing leaves the browser but the file that is saved."""
    items = "".join(
        f'<article data-id="{row.record.id}"><pre>{html.escape(text_of(row))}</pre>'
        f"<p>{html.escape(row.record.source)} · proposed by {html.escape(row.proposed_by)}"
        f"{' · approved by ' + html.escape(', '.join(row.approved_by)) if row.approved_by else ''}</p>"
        '<label><input type="radio" value="approve"> approve</label> '
        '<label><input type="radio" value="refuse"> refuse</label> '
        '<input class="note" placeholder="note" aria-label="note"></article>'
        for row in rows
    )
    return (
        PAGE.replace("{name}", html.escape(name))
        .replace("{count}", f"{len(rows):,}")
        .replace("{items}", items)
    )


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Review: {name}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem 6rem }
article { border-top: 1px solid #8886; padding: .8rem 0 } pre { white-space: pre-wrap; overflow-wrap: anywhere;
  font: 14px/1.5 ui-monospace, monospace; margin: 0 } p { margin: .3rem 0; opacity: .65 }
label { margin-right: 1rem } .note { width: 18rem; font: inherit }
footer { position: fixed; bottom: 0; left: 0; right: 0; padding: .8rem 1rem; background: Canvas;
  border-top: 1px solid #8886; display: flex; gap: 1rem; justify-content: center; align-items: center }
</style>
<h1>Review: {name}</h1><p>{count} rows wait. Decide, give your name, save the file, and enter it with
<code>tuneloom golden name={name} action=decide decisions=decisions.jsonl</code>.</p>
{items}
<footer><input id="by" placeholder="your name" aria-label="your name"><button id="save">Save decisions</button>
<span id="left"></span></footer>
<script>
const rows = [...document.querySelectorAll("article")];
rows.forEach(a => a.querySelectorAll("input[type=radio]").forEach(r => { r.name = a.dataset.id; r.onchange = count }));
function chosen() {
  const by = document.getElementById("by").value.trim();
  return rows.flatMap(a => { const r = a.querySelector("input:checked");
    return r ? [{ id: a.dataset.id, decision: r.value, by, note: a.querySelector(".note").value }] : [] });
}
function count() { document.getElementById("left").textContent = `${chosen().length} of ${rows.length} decided` }
document.getElementById("save").onclick = () => {
  if (!document.getElementById("by").value.trim()) { document.getElementById("by").focus(); return }
  const text = chosen().map(d => JSON.stringify(d) + "\\n").join("");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  link.download = "decisions.jsonl"; link.click();
};
count();
</script></html>
"""
