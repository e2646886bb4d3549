"""A page as a list of blocks, written as Markdown or as one self-contained HTML file."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")
STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --paper: #ffffff; --soft: #6a6a70; --line: #d9d9de; --band: #f4f4f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --paper: #17181a; --soft: #a0a0a8; --line: #3a3b40; --band: #212226; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; }
h2 { font-size: 1.3rem; margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1.05rem; margin-top: 1.8rem; }
p, li { max-width: 44rem; }
a { color: inherit; }
code { font-family: ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace; font-size: .9em; }
pre { background: var(--band); padding: .75rem; white-space: pre-wrap; font-size: .85rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; overflow-wrap: normal; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
table.facts td { white-space: normal; text-align: left; vertical-align: top; overflow-wrap: anywhere; min-width: 5rem; }
table.facts th { text-align: left; }
table.facts td:first-child { overflow-wrap: normal; }
figure { margin: 1.5rem 0; max-width: 40rem; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .875rem; }
nav ul { padding-left: 1.2rem; }
@media (max-width: 40rem) { th, td { padding: .3rem .4rem; } table { font-size: .8rem; } td:first-child { white-space: normal; } }
@media print {
  :root { --ink: #000; --paper: #fff; --soft: #444; --line: #bbb; --band: #f2f2f2; color-scheme: light; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  figure, tr, pre { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; } table { font-size: 7.5pt; } th, td { padding: .15rem .3rem; } td { white-space: normal; }
  th:first-child, td:first-child { position: static; }
}
"""  # noqa: E501 - CSS


@dataclass(frozen=True)
class Heading:
    """A title of level 1 to 3."""

    level: int
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph; `**bold**`, `` `code` `` and `[text](address)` are understood."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Quote:
    """A sample of text, shown verbatim."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells, as many per row as titles; numbers are aligned right, `facts` are words, aligned left."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    facts: bool = False


@dataclass(frozen=True)
class Figure:
    """A picture: a file name without extension, its content in words, and the function that draws it as SVG."""

    name: str
    caption: str
    draw: Callable[[], str]


Block = Heading | Text | Bullets | Quote | Table | Figure


def markdown(blocks: Sequence[Block], figures: str = "figures") -> str:
    """Write a page as Markdown; `figures` is the folder of the pictures, relative to the page."""
    return "\n\n".join(_markdown_block(block, figures) for block in blocks) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the lines of a Markdown table; all columns but the first are aligned right.

    Raises:
        ValueError: if a row has another number of cells.
    """
    if any(len(row) != len(header) for row in rows):
        raise ValueError(f"every row needs {len(header)} cells, one per title")
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, rule, *rows)
    )


def _markdown_block(block: Block, figures: str) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, Bullets):
        return "\n".join(f"- {item}" for item in block.items)
    if isinstance(block, Quote):
        return f"```text\n{block.text}\n```"
    if isinstance(block, Table):
        table = markdown_table(block.header, block.rows)
        return table.replace("---:", "---") if block.facts else table
    if isinstance(block, Figure):
        return f"![{block.caption}]({figures}/{block.name}.svg)"
    return block.text


def html_page(title: str, blocks: Sequence[Block]) -> str:
    """Write a page as one self-contained HTML file: no script, no font, no address.

    The level 2 headings become a table of contents after the first heading of level 1.
    """
    parts: list[str] = []
    contents = _contents(blocks)
    for block in blocks:
        parts.append(_html_block(block))
        if isinstance(block, Heading) and block.level == 1:
            parts.append(contents)
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
    )
    return head + "\n".join(parts) + "\n</main>\n</body>\n</html>\n"


def anchor(text: str) -> str:
    """Return a heading's address on its page."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def inline(text: str) -> str:
    """Return the HTML of a paragraph's text."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(_code(part) if part.startswith("`") and part != "`" else _words(part) for part in parts)


def _code(part: str) -> str:
    return f"<code>{html.escape(part[1:-1])}</code>"


def _words(part: str) -> str:
    safe = html.escape(part, quote=False)
    safe = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", safe)
    return LINK.sub(r'<a href="\2">\1</a>', safe)


def _contents(blocks: Sequence[Block]) -> str:
    titles = [block.text for block in blocks if isinstance(block, Heading) and block.level == 2]  # noqa: PLR2004
    items = "".join(f'<li><a href="#{anchor(title)}">{inline(title)}</a></li>' for title in titles)
    return f'<nav aria-label="Contents"><ul>{items}</ul></nav>'


def _html_block(block: Block) -> str:
    if isinstance(block, Heading):
        return f'<h{block.level} id="{anchor(block.text)}">{inline(block.text)}</h{block.level}>'
    if isinstance(block, Bullets):
        return "<ul>" + "".join(f"<li>{inline(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Quote):
        return f"<pre>{html.escape(block.text)}</pre>"
    if isinstance(block, Table):
        return _html_table(block)
    if isinstance(block, Figure):
        return f"<figure>\n{block.draw()}\n<figcaption>{inline(block.caption)}</figcaption>\n</figure>"
    return "\n".join(f"<p>{inline(part)}</p>" for part in block.text.split("\n\n"))


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{inline(cell)}</th>' for cell in table.header)
    rows = "".join("<tr>" + "".join(f"<td>{inline(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    kind = ' class="facts"' if table.facts else ""
    whole = f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{whole}</div>'
