"""A page as one self-contained HTML file: no script, no font, no address but those of links."""

from __future__ import annotations

import base64
import itertools
import re
from importlib import resources
from typing import Any

from jinja2 import Environment
from markdown_it import MarkdownIt

from sinkwindow_lab.render.markdown import Page


def html_page(page: Page) -> str:
    """Write a page as HTML; its pictures are embedded, its level 2 headings become contents below the title."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("image", _image)
    parser.add_render_rule("table_open", lambda *_: '<div class="scroll" tabindex="0"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = parser.parse(page.markdown)
    headings = [(one, words) for one, words in itertools.pairwise(tokens) if one.type == "heading_open"]
    titles = [(one.tag, _anchor(_words(inline)), _words(inline)) for one, inline in headings]
    for (one, _), (_, address, _) in zip(headings, titles, strict=True):
        one.attrSet("id", address)
    environment = Environment(autoescape=True, trim_blocks=True, keep_trailing_newline=True)
    template = environment.from_string(resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(
        title=titles[0][2],
        contents=[(address, words) for tag, address, words in titles if tag == "h2"],
        head=parser.renderer.render(tokens[:3], parser.options, {}),  # the title: its opening, its words, its end
        body=parser.renderer.render(tokens[3:], parser.options, {"figures": page.figures}),
    )


def _words(inline: Any) -> str:
    return "".join(one.content for one in inline.children)


def _anchor(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def _image(renderer: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    """Embed a picture of the page, so that the file needs no other; the page's own colors apply inside it."""
    file = str(tokens[index].attrGet("src")).rpartition("/")[2].removesuffix(".svg")
    address = "data:image/svg+xml;base64," + base64.b64encode(env["figures"][file].encode()).decode()
    caption = renderer.renderInlineAsText(tokens[index].children, options, env)
    shown = '<img src="{{ address }}" alt="{{ caption }}"><span class="caption">{{ caption }}</span>'
    return Environment(autoescape=True).from_string(shown).render(address=address, caption=caption)
