"""Look at asv's pages in a headless Chromium: `nox -s bench` measures, `nox -s bench_site` publishes and looks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
# The pages load these from content delivery networks; the same releases from npm make the test independent of those.
LIBRARIES: Final = {
    "jquery-3.3.1.min.js": "jquery@3.3.1/dist/jquery.min.js",
    "jquery.flot.min.js": "flot@0.8.3/jquery.flot.js",
    "jquery.flot.time.min.js": "flot@0.8.3/jquery.flot.time.js",
    "jquery.flot.selection.min.js": "flot@0.8.3/jquery.flot.selection.js",
    "jquery.flot.categories.min.js": "flot@0.8.3/jquery.flot.categories.js",
    "jquery.flot.orderBars.js": "flot-orderbars@1.0.0/js/jquery.flot.orderBars.js",
    "stupidtable.min.js": "stupid-table-plugin@1.1.3/stupidtable.js",
    "md5.min.js": "blueimp-md5@2.19.0/js/md5.min.js",
    "bootstrap.min.js": "bootstrap@3.1.1/dist/js/bootstrap.min.js",
    "bootstrap.min.css": "bootstrap@3.1.1/dist/css/bootstrap.min.css",
}
CHROMIUM: Final = ("chromium", "--headless", "--no-sandbox", "--allow-file-access-from-files")


def test_overview_shows_all_benchmarks(tmp_path: Path) -> None:
    """The first page names every benchmark; a picture of it is left in .asv."""
    html = tmp_path / "html"
    subprocess.run(["asv", "publish", "--no-pull", "--html-dir", html], cwd=ROOT, check=True)
    packages = sorted({file.partition("/")[0] for file in LIBRARIES.values()})
    subprocess.run(["npm", "install", "--ignore-scripts", "--prefix", html / "npm", *packages], check=True)
    for name, file in LIBRARIES.items():
        shutil.copy(html / "npm" / "node_modules" / re.sub(r"@[\d.]+", "", file), html / name)
    page = (html / "index.html").read_text(encoding="utf-8")
    local = re.sub(r'"https://[^"]*/([^"/]+)"(?: integrity="[^"]*")?', r'"\1"', page)
    (html / "local.html").write_text(local, encoding="utf-8")
    look = [
        *CHROMIUM,
        "--window-size=1400,2400",
        "--virtual-time-budget=30000",
        f"--screenshot={ROOT / '.asv' / 'overview.png'}",
        "--dump-dom",
    ]
    shown = subprocess.run([*look, f"file://{html}/local.html"], check=True, capture_output=True, text=True).stdout
    names = set(json.loads((html / "index.json").read_text(encoding="utf-8"))["benchmarks"])
    assert names
    assert not {name for name in names if f"#{name}" not in shown}
