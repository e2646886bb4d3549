"""Check the published pages in a headless Chromium: each benchmark has a graph, and each graph has points.

`nox -s bench` measures; `nox -s bench_site` publishes and checks. Screenshots are saved to .asv/screenshots.
"""

from __future__ import annotations

import functools
import http.server
import json
import math
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from selenium import webdriver
from selenium.common.exceptions import JavascriptException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).resolve().parent.parent
SCREENSHOTS: Final = ROOT / ".asv" / "screenshots"
FLAGS: Final = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1000",
)
# asv's pages load these files from content delivery networks. The test must not depend on those, so npm installs the
# same releases (of stupidtable, which sorts the columns of a table, the only release on npm).
LIBRARIES: Final = {
    "jquery-3.3.1.min.js": ("jquery@3.3.1", "dist/jquery.min.js"),
    "jquery.flot.min.js": ("flot@0.8.3", "jquery.flot.js"),
    "jquery.flot.time.min.js": ("flot@0.8.3", "jquery.flot.time.js"),
    "jquery.flot.selection.min.js": ("flot@0.8.3", "jquery.flot.selection.js"),
    "jquery.flot.categories.min.js": ("flot@0.8.3", "jquery.flot.categories.js"),
    "jquery.flot.orderBars.js": ("flot-orderbars@1.0.0", "js/jquery.flot.orderBars.js"),
    "stupidtable.min.js": ("stupid-table-plugin@1.1.3", "stupidtable.js"),
    "md5.min.js": ("blueimp-md5@2.19.0", "js/md5.min.js"),
    "bootstrap.min.js": ("bootstrap@3.1.1", "dist/js/bootstrap.min.js"),
    "bootstrap.min.css": ("bootstrap@3.1.1", "dist/css/bootstrap.min.css"),
}
REMOTE: Final = re.compile(r'(src|href)="https://[^"]*/([^"/]+)"(?: integrity="[^"]*")?')
# The number of points in each series that flot has drawn.
POINTS: Final = """
const plot = $('#main-graph').data('plot');
return plot ? plot.getData().map(series => series.data.filter(point => point[1] !== null).length) : [];
"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Log nothing."""


def _measured() -> list[str]:
    """Return the names of the benchmarks with at least one number in the saved results."""
    names = set()
    for file in (ROOT / ".asv" / "results").glob("*/*.json"):
        if file.name == "machine.json":
            continue
        saved = json.loads(file.read_text(encoding="utf-8"))
        at = saved["result_columns"].index("result")
        for name, entry in saved["results"].items():
            if any(value is not None and not math.isnan(value) for value in entry[at] or []):
                names.add(name)
    return sorted(names)


MEASURED: Final = _measured()


def test_something_was_measured() -> None:
    """There are saved results; without them, the other tests would check nothing."""
    assert MEASURED, "no results in .asv/results: run nox -s bench first"


def _make_local(html: Path, store: Path) -> None:
    """Copy the libraries next to the pages and make the pages load the copies."""
    packages = sorted({package for package, _ in LIBRARIES.values()})
    install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(store), *packages]
    subprocess.run(install, check=True)
    for name, (package, file) in LIBRARIES.items():
        shutil.copy(store / "node_modules" / package.rpartition("@")[0] / file, html / name)
    index = html / "index.html"
    page, changed = REMOTE.subn(r'\1="\2"', index.read_text(encoding="utf-8"))
    assert changed >= len(LIBRARIES), "asv's page loads other libraries now: update LIBRARIES"
    index.write_text(page, encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the published pages on this machine, without files from the network; return the address."""
    html = tmp_path_factory.mktemp("html")
    subprocess.run(["asv", "publish", "--no-pull", "--html-dir", str(html)], cwd=ROOT, check=True)
    _make_local(html, tmp_path_factory.mktemp("npm"))
    handler = functools.partial(_Quiet, directory=str(html))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Return Debian's Chromium with an empty profile."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    yield driver
    driver.quit()


def _points(driver: Any) -> list[int]:
    counts: list[int] = driver.execute_script(POINTS)
    return counts


@pytest.mark.parametrize("name", MEASURED)
def test_graph_has_points(name: str, site: str, browser: webdriver.Chrome) -> None:
    """The page of a benchmark draws a line with at least one point."""
    browser.get("about:blank")  # a change of the fragment alone would not load the page again
    browser.get(f"{site}#{name}")
    WebDriverWait(browser, 30, ignored_exceptions=[JavascriptException]).until(lambda one: sum(_points(one)) > 0)
    browser.save_screenshot(str(SCREENSHOTS / f"{name}.png"))


def test_overview_shows_all_benchmarks(site: str, browser: webdriver.Chrome) -> None:
    """The first page names every benchmark."""
    browser.get("about:blank")
    browser.get(site)
    links = "return [...document.querySelectorAll('#summarygrid-display a')].map(a => a.getAttribute('href'))"

    def shown(driver: webdriver.Chrome) -> bool:
        hrefs = " ".join(filter(None, driver.execute_script(links)))
        return all(name in hrefs for name in MEASURED)

    WebDriverWait(browser, 30).until(shown)
    browser.save_screenshot(str(SCREENSHOTS / "overview.png"))
