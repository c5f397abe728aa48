"""Pieces of HTML that sections are made of. Everything that enters as text is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from raycomp.errors import visible
from raycomp.report.style import CSS


@dataclass(frozen=True)
class Column:
    """A table's column: its heading and the class of its cells."""

    heading: str
    css: str = ""


def page(title: str, body: str) -> str:
    """A whole document that needs no other file and no network."""
    return visible(_document(title, body), lines=True)


def _document(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A titled section; empty where it has nothing to say."""
    content = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def paragraph(line: str, css: str = "") -> str:
    """A paragraph of plain text."""
    return f"<p{_class(css)}>{escape(line)}</p>"


def code_block(source: str) -> str:
    """Text as it stands, its long lines wrapped."""
    return f"<pre><code>{escape(source)}</code></pre>"


def facts(pairs: Mapping[str, str]) -> str:
    """Names and values."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs.items())
    return f'<dl class="facts">{items}</dl>' if items else ""


def table(columns: Sequence[Column], rows: Iterable[Sequence[str]], css: str = "") -> str:
    """A table whose cells are HTML already; empty without rows. It scrolls sideways where it must."""
    head = "".join(f"<th{_class(column.css)}>{escape(column.heading)}</th>" for column in columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td{_class(c.css)}>{cell}</td>" for c, cell in zip(columns, row, strict=True)) + "</tr>"
        for row in rows
    )
    if not body:
        return ""
    return (
        f'<div class="wide"><table{_class(css)}><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
    )


def figure(caption: str, drawing: str) -> str:
    """A chart under its caption; empty without a chart."""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{drawing}</figure>" if drawing else ""


def dotted(name: str) -> str:
    """A module's name that may break after its dots."""
    return escape(name).replace(".", ".<wbr>")


def _class(css: str) -> str:
    return f' class="{css}"' if css else ""
