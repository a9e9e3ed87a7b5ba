"""Pieces of a page. Everything that is told is escaped here; nothing is loaded from anywhere.

Source: HTML Living Standard, sections 4.9 (tables) and 4.4.12 (figures).
"""

from __future__ import annotations

import base64
import html
import re
import string
from collections.abc import Sequence

_NUMBER = re.compile(r"[-+]?[\d,.]+( ?(%|s|ms|x|[KMGT]?i?B))?|[\d,.]+ to [\d,.]+|\d+:\d\d:\d\d|-|")

_STYLE = """
:root { color-scheme: light; --ink: #1a1a1a; --faint: #5c5c5c; --line: #c9c9c9; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 72rem; background: #fff; color: var(--ink);
  font: 15px/1.45 "Source Sans 3", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .6rem; padding-bottom: .2rem; border-bottom: 2px solid var(--accent); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .5rem; }
p { margin: .4rem 0; max-width: 60rem; }
.faint, figcaption, caption { color: var(--faint); font-size: .87rem; }
nav a { margin-right: 1.2rem; color: var(--accent); overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .22rem .7rem .22rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 1.5px solid var(--ink); vertical-align: bottom; }
td { overflow-wrap: break-word; }
thead + tbody td:first-child { white-space: nowrap; }
th { font-weight: 600; }
.n { text-align: right; white-space: nowrap; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: .8rem 1.4rem; }
figure { margin: .5rem 0; }
figure img { width: 100%; height: auto; display: block; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .82rem; margin: .4rem 0; }
@page { size: A4; margin: 14mm 13mm; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  .wide { overflow: visible; }
  table { font-size: 8pt; }
  th, td { padding-right: .45rem; }
  .figures { grid-template-columns: 1fr 1fr; }
  .run { break-before: page; }
  h2, h3, caption { break-after: avoid; }
  figure, tr, pre { break-inside: avoid; }
  thead { display: table-header-group; }
}
"""

_PAGE = string.Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
$body
</body>
</html>
"""
)


def escape(text: object) -> str:
    """Text as it may stand anywhere in a page, attributes included."""
    return html.escape(str(text), quote=True)


def page(title: str, parts: Sequence[str]) -> str:
    """The whole page; `parts` are pieces made here."""
    return _PAGE.substitute(title=escape(title), style=_STYLE, body="\n".join(filter(None, parts)))


def _attribute(name: str, value: str) -> str:
    return f' {name}="{escape(value)}"' if value else ""


def heading(level: int, text: str, anchor: str = "") -> str:
    """A heading, perhaps to be linked to."""
    return f"<h{level}{_attribute('id', anchor)}>{escape(text)}</h{level}>"


def paragraph(text: str, style: str = "") -> str:
    """A paragraph."""
    return f"<p{_attribute('class', style)}>{escape(text)}</p>"


def code(text: str) -> str:
    """A command, as it was given."""
    return f"<pre>{escape(text)}</pre>"


def contents(entries: Sequence[tuple[str, str]]) -> str:
    """Links to (anchor, text)."""
    links = "".join(f'<a href="#{escape(anchor)}">{escape(text)}</a>' for anchor, text in entries)
    return f"<nav>{links}</nav>"


def section(parts: Sequence[str], style: str = "") -> str:
    """Pieces that belong together; those of style "run" begin a page in print."""
    return f"<section{_attribute('class', style)}>\n" + "\n".join(filter(None, parts)) + "\n</section>"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table that can be copied; columns of numbers are set to the right. Nothing without rows.

    Args:
        headers: of the columns; empty: the first column names the rows.
        rows: texts, as many as there are headers.
        caption: above it.
    """
    if not rows:
        return ""
    styles = [_attribute("class", "n") if _is_numeric(column) and headers else "" for column in zip(*rows, strict=True)]
    parts = ['<div class="wide"><table>']
    if caption:
        parts.append(f"<caption>{escape(caption)}</caption>")
    if headers:
        cells = "".join(f'<th scope="col"{s}>{escape(h)}</th>' for s, h in zip(styles, headers, strict=True))
        parts.append(f"<thead><tr>{cells}</tr></thead>")
    parts.append("<tbody>")
    for first, *rest in rows:
        begin = f"<td{styles[0]}>{escape(first)}</td>" if headers else f'<th scope="row">{escape(first)}</th>'
        cells = "".join(f"<td{style}>{escape(cell)}</td>" for style, cell in zip(styles[1:], rest, strict=True))
        parts.append(f"<tr>{begin}{cells}</tr>")
    parts.append("</tbody></table></div>")
    return "\n".join(parts)


def picture(svg: bytes, caption: str) -> str:
    """A picture that is part of the page.

    Args:
        svg: the drawing.
        caption: what is to be seen, also for those who cannot.
    """
    data = base64.b64encode(svg).decode()
    text = escape(caption)
    return f'<figure><img alt="{text}" src="data:image/svg+xml;base64,{data}"><figcaption>{text}</figcaption></figure>'


def figures(pictures: Sequence[str]) -> str:
    """Pictures side by side where there is room."""
    return '<div class="figures">' + "\n".join(pictures) + "</div>" if pictures else ""


def _is_numeric(column: Sequence[str]) -> bool:
    return any(column) and all(_NUMBER.fullmatch(cell) for cell in column)
