"""A document of headings, paragraphs, lists, tables and pictures, written as Markdown or as one HTML file.

Parts hold plain text from any source; `markdown` and `as_html` escape it.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of text."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list with bullets."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Bold:
    """A table cell in bold."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table. The first column has names, the others numbers, which are aligned to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str | Bold]]


@dataclass(frozen=True)
class Picture:
    """A picture with its caption; `path` is relative to the document's folder."""

    path: str
    text: str


Part = Heading | Paragraph | Items | Table | Picture


def clean(text: str) -> str:
    """Return a text on one line, with unprintable characters removed."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


# --- Markdown -------------------------------------------------------------------------------------------


def markdown(parts: Sequence[Part]) -> str:
    """Write the parts as GitHub's Markdown, with aligned tables."""
    return "\n\n".join(map(_markdown, parts)) + "\n"


def _markdown(part: Part) -> str:
    match part:
        case Heading(text, level):
            return f"{'#' * level} {_escaped(text)}"
        case Paragraph(text):
            return _escaped(text)
        case Items(texts):
            return "\n".join(f"- {_escaped(text)}" for text in texts)
        case Picture(path, text):
            return f"![{_escaped(text)}]({path})"
        case Table(head, rows):
            return _markdown_table(head, rows)


def _escaped(text: str) -> str:
    """Escape only what Markdown would read as markup, so that the text stays readable."""
    text = re.sub(r"[\\`*<>|~$#]|(?<!\w)_|_(?!\w)|&(?=#?\w+;)|\](?=[(\[:])", r"\\\g<0>", clean(text))
    return re.sub(r"^(?=[-+=]|\[.\] )", r"\\", re.sub(r"^(\d+)([.)])", r"\1\\\2", text))


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str | Bold]]) -> str:
    lines = [[_inner(cell) for cell in line] for line in (head, *rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))


def _inner(cell: str | Bold) -> str:
    """Escape a table cell, which cannot begin a list."""
    return f"**{_inner(cell.text)}**" if isinstance(cell, Bold) else _escaped("." + clean(cell))[1:]


# --- HTML -----------------------------------------------------------------------------------------------

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 76rem; padding: 0 1.5rem; }
h1, h2, h3 { line-height: 1.2; margin: 2em 0 .6em; } h1 { margin-top: 0; } h2 { border-bottom: 2px solid #ccc; }
.wide { overflow-x: auto; margin: 1em 0; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .7em; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
thead th { border-bottom: 2px solid #888; vertical-align: bottom; white-space: normal; min-width: 4.5em; }
tbody tr:hover td { background: #f3f6fa; }
figure { margin: 1.5em 0; } img { max-width: 100%; height: auto; } figcaption { color: #555; font-size: 13px; }
p, li { max-width: 60rem; overflow-wrap: anywhere; }
@media (max-width: 700px) {
  body { padding: 0 .8rem; } figure { overflow-x: auto; } figure img { max-width: none; width: 42rem; }
}
@media print { .wide { overflow: visible; } }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # no external content


def as_html(title: str, parts: Sequence[Part], folder: Path) -> str:
    """Write the parts as one HTML file with embedded pictures, without scripts and links.

    Args:
        folder: the folder that the paths of pictures are relative to.
    """
    body = "\n".join(_html(part, folder) for part in parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _text(text: str) -> str:
    return html.escape(clean(text))


def _html(part: Part, folder: Path) -> str:
    match part:
        case Heading(text, level):
            return f"<h{level}>{_text(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_text(text)}</p>"
        case Items(texts):
            return "<ul>\n" + "\n".join(f"<li>{_text(text)}</li>" for text in texts) + "\n</ul>"
        case Picture(path, text):
            content = (folder / path).read_bytes()
            width = (
                int.from_bytes(content[16:20], "big") * 96 // 150
            )  # browser pixels (96 dpi) for a picture of 150 dpi
            source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
            image = f'<img alt="{_text(text)}" width="{width}" src="{source}">'
            return f"<figure>{image}<figcaption>{_text(text)}</figcaption></figure>"
        case Table(head, rows):
            first = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in head)
            rest = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
            table = f"<table>\n<thead><tr>{first}</tr></thead>\n<tbody>\n{rest}\n</tbody>\n</table>"
            return f'<div class="wide">{table}</div>'


def _cell(cell: str | Bold) -> str:
    return f"<td><b>{_text(cell.text)}</b></td>" if isinstance(cell, Bold) else f"<td>{_text(cell)}</td>"
