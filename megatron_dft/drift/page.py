"""One self-contained HTML page: sections of text, pictures (inlined PNG) and tables.

Nothing is loaded from anywhere, so the file can be mailed. Every string that comes in is escaped
here; a page about somebody's data set shows its text and never runs it.
"""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

_STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #dde3ea; --band: #f5f7fa; --key: #1f5fa8; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 1360px; margin: 0 auto; padding: 28px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h1, h2, p, summary, figcaption { overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 6px; padding-top: 14px; border-top: 1px solid var(--line); }
p { margin: 6px 0 12px; max-width: 78ch; }
.sub, figcaption, .note { color: var(--soft); }
.verdict { background: #eef5fd; border-left: 4px solid var(--key); padding: 12px 16px; }
.verdict b { font-size: 18px; }
.meaning { border-left: 4px solid var(--key); padding: 2px 0 2px 14px; font-size: 16px; }
nav a { display: inline-block; margin-right: 14px; color: var(--key); text-decoration: none; }
figure { margin: 12px 0; } img { max-width: 100%; height: auto; display: block; }
.scroll { margin: 10px 0; overflow: auto; border: 1px solid var(--line); }
.long { max-height: 80vh; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th { position: sticky; top: 0; background: var(--band); text-align: right; cursor: pointer;
  vertical-align: bottom; }
th, td { padding: 5px 8px; border-bottom: 1px solid var(--line); }
td { text-align: right; font-variant-numeric: tabular-nums; }
td:not(.text) { white-space: nowrap; }
th:first-child, td:first-child, .text { text-align: left; }
td.text { font-family: ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--key); margin: 8px 0; }
"""

# Clicking a column's head sorts its table; cells carry their value in data-v.
_SCRIPT = """
document.querySelectorAll("th").forEach(th => th.addEventListener("click", () => {
  const body = th.closest("table").tBodies[0], i = th.cellIndex, up = th.dataset.up !== "1";
  th.dataset.up = up ? "1" : "0";
  const key = r => { const v = r.cells[i].dataset.v;
    return v === "" ? -Infinity : isNaN(v) ? v : +v; };
  [...body.rows].sort((a, b) => { const x = key(a), y = key(b);
    return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1); }).forEach(r => body.append(r));
}));
"""

_LONG = 40  # rows beyond which a table scrolls by itself

Cell = str | int | float | None


@dataclass
class Table:
    """Columns and rows; text is escaped, floats shown with four digits, None as a dash."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    folded: bool = False


@dataclass
class Picture:
    """A PNG file's bytes, its file name beside the page, and a caption."""

    name: str
    png: bytes
    caption: str = ""


@dataclass
class Section:
    """A heading, then verdict (set off in a box) or `meaning` (what the figures say here),
    paragraphs, pictures, tables in this order."""

    heading: str
    paragraphs: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    verdict: tuple[str, str] | None = field(default=None)
    meaning: str = ""


def number(value: Cell) -> str:
    """A figure as the page shows it."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value


def _breakable(name: str) -> str:
    """A column's name, escaped, that may break after _ - and / so that many columns fit."""
    return re.sub(r"([_/-])", r"\1<wbr>", html.escape(name))


def _table(table: Table) -> str:
    kinds = [isinstance(v, str) for v in table.rows[0]] if table.rows else []
    kinds += [False] * (len(table.columns) - len(kinds))
    head = "".join(
        f"<th{' class="text"' if text else ''}>{_breakable(c)}</th>"
        for c, text in zip(table.columns, kinds, strict=True)
    )
    rows = []
    for row in table.rows:
        cells = []
        for value in row:
            kind = ' class="text"' if isinstance(value, str) else ""
            raw = "" if value is None else html.escape(str(value), quote=True)
            cells.append(f'<td{kind} data-v="{raw}">{html.escape(number(value))}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    long = " long" if len(rows) > _LONG else ""
    body = (
        f'<div class="scroll{long}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    caption = html.escape(table.caption)
    if not rows:  # the caption says that there are none; a head alone looks like a fault
        return f'<p class="note">{caption}</p>' if caption else ""
    if table.folded:
        return f"<details><summary>{caption}</summary>{body}</details>"
    return (f'<p class="note">{caption}</p>' if caption else "") + body


def _section(section: Section, anchor: int) -> str:
    parts = [f'<h2 id="s{anchor}">{html.escape(section.heading)}</h2>']
    if section.verdict:
        word, reason = section.verdict
        parts.append(f'<p class="verdict"><b>{html.escape(word)}</b><br>{html.escape(reason)}</p>')
    if section.meaning:
        parts.append(f'<p class="meaning">{html.escape(section.meaning)}</p>')
    parts += [f"<p>{html.escape(p)}</p>" for p in section.paragraphs]
    for picture in section.pictures:
        data = base64.b64encode(picture.png).decode("ascii")
        caption = html.escape(picture.caption)
        parts.append(
            f'<figure><img alt="{html.escape(picture.name, quote=True)}" '
            f'src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
        )
    parts += [_table(t) for t in section.tables]
    return "\n".join(parts)


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole page as a string of HTML."""
    links = "".join(f'<a href="#s{i}">{html.escape(s.heading)}</a>' for i, s in enumerate(sections))
    body = "\n".join(_section(s, i) for i, s in enumerate(sections))
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f'<h1>{html.escape(title)}</h1><p class="sub">{html.escape(subtitle)}</p>'
        f"<nav>{links}</nav>\n{body}\n</main><script>{_SCRIPT}</script></body></html>\n"
    )
    # A path that is not UTF-8 comes with lone surrogates, which no file holds.
    return page.encode("utf-8", "replace").decode("utf-8")
