"""Read every page in a headless Chromium, as on a desk and on a phone, light and dark: `nox -s docs_site`.

The pages are those of build/site, and the lab's report made from docs/results. Screenshots stay in build/screenshots.
"""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from playwright.sync_api import Page, sync_playwright

from sinkwindow_lab import cli

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser

ROOT: Final = Path(__file__).resolve().parent.parent.parent
SITE: Final = ROOT / "build" / "site"
SHOTS: Final = ROOT / "build" / "screenshots"
LOOK: Final = Path(__file__).with_name("look.js").read_text(encoding="utf-8")
PAGES: Final = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
PICTURES: Final = sorted(path.relative_to(SITE).as_posix() for path in (SITE / "docs").rglob("*.svg"))
# Faults that the look must find, as JavaScript, and words of what it says.
PLANTED: Final = {
    "contrast": "document.querySelector('article p').style.color = '#888'",
    "pixels wide": "document.querySelector('article p').style.width = '3000px'",
    "cut td": "document.querySelector('.md-typeset__scrollwrap').style.overflow = 'clip'",
    "a first column takes": "document.querySelector('article td').style.minWidth = '300px'",
    "a first column leaves": "document.querySelector('article th').style.position = 'static'",
    "cut label": "document.querySelector('text').setAttribute('x', -50)",
    "contrast 1": "document.querySelector('text').style.fill = '#eee'",
}
REPORT: Final = "report/report.html"
SIZES: Final = {"desk": {"width": 1280, "height": 900}, "phone": {"width": 400, "height": 800}}
SCHEMES: Final[tuple[Any, ...]] = ("light", "dark")
# Of pages that show the pictures: this site's, GitHub's, and plain ones.
PAPER: Final = {"light": ["#ffffff", "#f6f8fa"], "dark": ["#0b0c0f", "#0d1117", "#22272e", "#000000"]}


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serve files without a log."""

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the site, and the report beside it, at an address."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(SITE, folder, dirs_exist_ok=True)
    with pytest.raises(SystemExit) as ended:
        cli.main(["render", str(ROOT / "docs/results/paper_tables.json"), "--out", str(folder / "report")])
    assert ended.value.code == 0
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}/"
        serving.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start the Chromium of this machine: nothing is downloaded."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert chromium, "install chromium: no browser is downloaded for this test"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


def _open(browser: Browser, server: str, path: str, size: str, scheme: Any) -> tuple[Page, list[str]]:
    """Return a page, and what was asked for in vain or elsewhere, a list that goes on growing."""
    page, wrong = browser.new_page(viewport=SIZES[size], color_scheme=scheme), list[str]()  # type: ignore[arg-type]
    inside = (server, "data:", "blob:")
    page.on("request", lambda one: None if one.url.startswith(inside) else wrong.append(f"elsewhere: {one.url}"))
    page.on("response", lambda one: wrong.append(f"{one.status}: {one.url}") if one.status >= 400 else None)
    page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
    page.goto(server + path, wait_until="networkidle")
    if not path.endswith(".svg"):
        page.add_style_tag(content="* { transition: none !important; animation: none !important }")  # at their ends
    return page, wrong


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("path", [*PAGES, REPORT])
def test_a_page_can_be_read(browser: Browser, server: str, path: str, size: str, scheme: str) -> None:
    """Nothing is cut, all text has a contrast of 4.5, the page loads nothing from elsewhere and nothing in vain."""
    page, wrong = _open(browser, server, path, size, scheme)
    name = path.removesuffix(".html").removesuffix("/index").replace("/", "-")
    page.screenshot(path=SHOTS / f"{name}-{size}-{scheme}.png", full_page=True)
    found = page.evaluate(LOOK, [])
    page.close()
    assert found + wrong == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("path", PICTURES)
def test_labels_of_a_picture_can_be_read(browser: Browser, server: str, path: str, scheme: str) -> None:
    """Each label is inside its picture and has a contrast of 4.5 on each background on which it may be shown."""
    page, wrong = _open(browser, server, path, "desk", scheme)
    found = page.evaluate(LOOK, PAPER[scheme])
    page.close()
    assert found + wrong == []


@pytest.mark.parametrize("fault", PLANTED)
def test_a_fault_is_seen(browser: Browser, server: str, fault: str) -> None:
    """The look finds what is made unreadable on purpose."""
    picture = "'text'" in PLANTED[fault]
    path = "docs/figures/rule.svg" if picture else "docs/peers/"
    page, _ = _open(browser, server, path, "phone", "light")
    assert page.evaluate(LOOK, PAPER["light"]) == []
    page.evaluate(PLANTED[fault])
    found = page.evaluate(LOOK, PAPER["light"])
    page.close()
    assert any(fault in one for one in found)


def test_pictures_follow_the_page(browser: Browser, server: str) -> None:
    """On a dark page a picture has the ink for dark pages, and its background is the page's."""
    page, _ = _open(browser, server, "docs/diagrams/", "desk", "dark")
    styles = page.eval_on_selector_all("article img", "all => all.map(one => getComputedStyle(one).colorScheme)")
    assert styles
    assert set(styles) == {"dark"}
    page.close()


def test_no_link_is_broken(browser: Browser, server: str) -> None:
    """Each link to this site finds its page and, there, its place; the navigation has every page."""
    links: dict[str, str] = {}
    places: dict[str, set[str]] = {}
    for path in [*PAGES, REPORT]:
        page, _ = _open(browser, server, path, "desk", "light")
        url = page.url
        places[url.removesuffix("index.html")] = set(page.eval_on_selector_all("[id]", "all => all.map(one => one.id)"))
        links |= dict.fromkeys(page.eval_on_selector_all("a[href]", "all => all.map(one => one.href)"), path)
        page.close()
    ours = {link: path for link, path in links.items() if link.startswith(server)}
    assert len(ours) > len(PAGES)
    for link, path in ours.items():
        target, place = urldefrag(link)
        if target in places:
            assert not place or unquote(place) in places[target], f"{path}: no place {link}"
        else:
            assert _is_file(browser, target), f"{path}: no page {link}"
    linked = {urlsplit(link).path for link in ours}
    lost = [path for path in PAGES if path != "404.html" and f"/{path.removesuffix('index.html')}" not in linked]
    assert lost == []


def _is_file(browser: Browser, target: str) -> bool:
    """Return whether the server has it."""
    page = browser.new_page()
    answer = page.request.get(target)
    page.close()
    return answer.ok


def test_search_finds(browser: Browser, server: str) -> None:
    """A word of the reference leads to its page."""
    page, wrong = _open(browser, server, "", "desk", "light")
    page.keyboard.press("Control+k")
    page.keyboard.type("batch_repeat_interleave", delay=20)
    page.get_by_text("Repeat every row").wait_for()
    page.screenshot(path=SHOTS / "search-desk-light.png")
    page.close()
    assert wrong == []


def test_code_is_highlighted(browser: Browser, server: str) -> None:
    """Keywords have a color of their own, without any script."""
    page, _ = _open(browser, server, "docs/start/", "desk", "light")
    colors = "(all) => new Set(all.map(one => getComputedStyle(one).color)).size"
    assert page.eval_on_selector_all("article pre span", colors) >= 3
    page.close()
