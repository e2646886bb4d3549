"""What each release of transformers keeps of the cache's laws, from the tests that ran on it.

`nox -s compat` runs this file on the report of each release: `python tests/compat.py REPORT` adds it to
docs/results/releases.json, of which docs/support.md shows a table.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from xml.etree import ElementTree as ET

import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING

if TYPE_CHECKING:
    from collections.abc import Mapping

RESULTS: Final = Path(__file__).parents[1] / "docs" / "results" / "releases.json"
# The law that a family which streams keeps; its tests are named by family.
LAW: Final = re.compile(
    r"test_(?:the_family_streams_as_the_reference_says|a_hybrid_streams_as_the_reference_says)\[(.+)\]"
)


def read(report: str) -> dict[str, Any]:
    """Return what a junit report says of the installed release: families that stream, and tests that were skipped."""
    cases = list(ET.parse(report).getroot().iter("testcase"))  # noqa: S314 - written by pytest
    skipped: dict[str, list[str]] = {}
    families: set[str] = set()
    passed = 0
    for case in cases:
        name, skip = case.get("name", ""), case.find("skipped")
        if skip is not None:
            skipped.setdefault(skip.get("message", ""), []).append(re.sub(r"\[.*", "", name))
            continue
        passed += 1
        if law := LAW.fullmatch(name):
            families.add(law[1])
    return {
        "python": platform.python_version(),
        "torch": torch.__version__.partition("+")[0],
        "passed": passed,
        "families": sorted(families),
        "model_types": sorted(CONFIG_MAPPING),
        "skipped": {why: sorted(set(names)) for why, names in sorted(skipped.items())},
    }


def load() -> dict[str, Any]:
    """Return the results of all releases, the oldest first."""
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return dict(sorted(found.items(), key=lambda one: Version(one[0])))


def section(families: Mapping[str, tuple[str, str]]) -> str:
    """Return the table of families and releases, and the laws that a release does not keep, as Markdown.

    Args:
        families: For each family its title and its ``model_type``.
    """
    found = load()
    lines = [HEAD.format(torch=", ".join(sorted({one["torch"] for one in found.values()})))]
    lines += [f"| family | {' | '.join(found)} |", f"|---|{'---|' * len(found)}"]
    for name, (title, model_type) in families.items():
        lines.append(f"| {title} | {' | '.join(_cell(name, model_type, one) for one in found.values())} |")
    counts = " | ".join(str(len(one["families"])) for one in found.values())
    lines += [f"| **families that stream** | {counts} |"]
    lines += [f"| **tests passed** | {' | '.join(format(one['passed'], ',') for one in found.values())} |", LAWS]
    laws: dict[str, dict[str, list[str]]] = {}
    for release, one in found.items():
        for why, names in one["skipped"].items():
            if "needs transformers" in why:
                laws.setdefault(why, {})[release] = names
    for why, by_release in sorted(laws.items()):
        names = sorted({name for names in by_release.values() for name in names})
        lines.append(f"- {', '.join(by_release)}: {why}. Not run: {', '.join(f'`{name}`' for name in names)}.")
    return "\n".join(lines)


def _cell(name: str, model_type: str, found: Mapping[str, Any]) -> str:
    if name in found["families"]:
        return "yes"
    return "refused" if model_type in found["model_types"] else "-"


HEAD: Final = """\
## Releases of transformers

From `nox -s compat`, which runs the cache's tests on each of these releases (torch {torch}). "yes": the family's laws
hold; "refused": `supports(model)` names the release that the family needs; "-": the release does not have the family.
"""
LAWS: Final = """
What a release itself does not offer, or gets wrong with any cache; each is refused by name, or left to the release:
"""


if __name__ == "__main__":
    results = (json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}) | {
        transformers.__version__: read(sys.argv[1])
    }
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
