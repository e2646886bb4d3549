"""The page of supported models: `python tests/support.py > docs/support.md`.

`nox -s compat` adds what the tests say of a release, `python tests/support.py REPORT`, to docs/results/releases.json,
and writes the page (`--page`). `nox -s distributed` adds what they say of families on ranks, with
`--parallel`, to docs/results/parallel.json.
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

from families import BATCHED, FAMILIES, build, can_be_static
from hybrids import HYBRIDS, type_of
from hybrids import build as build_hybrid
from sinkwindow import supports
from sinkwindow.model.versions import EXACT_SINCE, INSTALLED, NEWEST_TESTED

if TYPE_CHECKING:
    from collections.abc import Mapping

PAGE: Final = Path(__file__).parents[1] / "docs" / "support.md"
RESULTS: Final = PAGE.parent / "results" / "releases.json"
PARALLEL: Final = RESULTS.with_name("parallel.json")
NEEDS: Final = "needs transformers"  # how reasons of tests/releases.py begin
OURS: Final = {*EXACT_SINCE, *(family.model_type for family in FAMILIES.values()), *map(type_of, HYBRIDS)}
# The law that a family which streams keeps; its tests are named by family.
LAW: Final = re.compile(
    r"test_(?:the_family_streams_as_the_reference_says|a_hybrid_streams_as_the_reference_says)\[(.+)\]"
)
# The same of ranks.
RANKS: Final = re.compile(r"test_ranks_compute_what_one_process_does\[(.+)\]")
SPLIT: Final = {"its heads": "yes", "all heads": "yes, all heads on each rank"}


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
        "model_types": sorted(OURS.intersection(CONFIG_MAPPING)),
        "skipped": {why: sorted(set(names)) for why, names in sorted(skipped.items()) if why.startswith(NEEDS)},
    }


def read_parallel(report: str) -> dict[str, dict[str, str]]:
    """Return what `tests/test_distributed.py` has recorded of each family: the heads on a rank, the largest error."""
    found: dict[str, dict[str, str]] = {}
    for case in ET.parse(report).getroot().iter("testcase"):  # noqa: S314 - written by pytest
        recorded = {one.get("name", ""): one.get("value", "") for one in case.iter("property")}
        if law := RANKS.fullmatch(case.get("name", "")):
            found |= {law[1]: recorded} if recorded and case.find("failure") is None else {}
    return found


def load() -> dict[str, Any]:
    """Return the results of all releases, the oldest first."""
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return dict(sorted(found.items(), key=lambda one: Version(one[0])))


def page() -> str:
    """Return docs/support.md."""
    lines = [HEAD]
    rows = [(name, family.title, family.model_type, family.positions) for name, family in FAMILIES.items()]
    rows += [(name, f"{name}, hybrid", type_of(name), "as configured; states") for name in HYBRIDS]
    found = json.loads(PARALLEL.read_text(encoding="utf-8"))
    for name, title, model_type, positions in rows:
        model = build(name) if name in FAMILIES else build_hybrid(name)
        answers = ["yes" if answer else "no" for answer in (supports(model), can_be_static(model))]
        ranks = SPLIT.get(found.get(name, {}).get("parallel"), "not tested") if model.tp_plan else "no plan"
        streams = "yes" if name in BATCHED else "no"
        lines.append(f"| {' | '.join((title, f'`{model_type}`', positions, *answers, ranks, streams))} |")
    return "\n".join([*lines, MIDDLE, *releases()]) + "\n"


def releases() -> list[str]:
    """Return the table of families and releases, and the laws that a release does not keep."""
    families = {name: (family.title, family.model_type) for name, family in FAMILIES.items()}
    families |= {name: (f"{name}, hybrid", type_of(name)) for name in HYBRIDS}
    found = load()
    lines = [RELEASES.format(torch=", ".join(sorted({one["torch"] for one in found.values()})))]
    lines += [f"| family | {' | '.join(found)} |", f"|---|{'---|' * len(found)}"]
    for name, (title, model_type) in families.items():
        lines.append(f"| {title} | {' | '.join(_cell(name, model_type, one) for one in found.values())} |")
    counts = " | ".join(str(len(one["families"])) for one in found.values())
    lines += [f"| **families that stream** | {counts} |"]
    lines += [f"| **tests passed** | {' | '.join(format(one['passed'], ',') for one in found.values())} |", LAWS]
    laws: dict[str, dict[str, list[str]]] = {}
    for release, one in found.items():
        for why, names in one["skipped"].items():
            laws.setdefault(why, {})[release] = names
    for why, by_release in sorted(laws.items(), key=lambda law: Version(law[0].split()[2].rstrip(":"))):
        names = [f"`{name}`" for name in sorted({name for names in by_release.values() for name in names})]
        more = f" and {len(names) - SHOWN} others" if len(names) > SHOWN else ""
        lines.append(
            f"- {why[0].upper()}{why[1:]}. Not run on {', '.join(by_release)}: {', '.join(names[:SHOWN])}{more}."
        )
    lines.append(GATES)
    gates = sorted(EXACT_SINCE.items(), key=lambda gate: (Version(gate[1][0]), gate[0]))
    return [*lines, *(f"- `{name}`: {release}; {why}" for name, (release, why) in gates)]


def _cell(name: str, model_type: str, found: Mapping[str, Any]) -> str:
    if name in found["families"]:
        return "yes"
    return "refused" if model_type in found["model_types"] else "-"


HEAD: Final = """\
# Supported models

Made by `python tests/support.py > docs/support.md` from the tests' models and `sinkwindow.supports`; do not
edit. Every line is a tiny random model that `tests/test_families.py` or `tests/test_hybrids.py` compares with the
reference, in drawn splits into calls and with padding. `supports(model)` answers for yours. Static:
`tests/test_static.py` compares the steps of `static=True`, for compiled graphs. Tensor parallel: `nox -s distributed`
splits the model over 2 and 4 ranks, whose logits are those of one process to 1e-12 of the largest one
([how](guides/parallel.md)); transformers splits no model that it has no plan for. Many: `tests/test_continuous.py`
compares each request of a continuous batch ([how](guides/streams.md)).

| family | `model_type` | positions | streams | static | tensor parallel | many |
|---|---|---|---|---|---|---|"""
MIDDLE: Final = """
Where layers have a sliding window of their own, they keep it: sinks, window and buffer are the other layers'. Where all
layers have one (Mistral), num_sinks + window + buffer + 1 must fit it. The layers of a hybrid that attend stream; the
others keep their state.

[Verdicts](verdicts.md) has every `model_type` of transformers: those that stream, and those that are refused, by
name and reason, before anything changes.
"""
RELEASES: Final = """\
## Releases of transformers

From `nox -s compat`, which runs the cache's tests on each of these releases (torch {torch}). "yes": the family's laws
hold; "refused": `supports(model)` names the release that the family needs; "-": the release does not have the family.
"""
LAWS: Final = """
What releases do not offer, or get wrong with any cache, and what was therefore not tested on them:
"""
GATES: Final = """
Families that `supports(model)` refuses before a release:
"""
SHOWN: Final = 4  # names of tests in a line


if __name__ == "__main__":
    if sys.argv[1:2] == ["--parallel"]:
        known = json.loads(PARALLEL.read_text(encoding="utf-8")) if PARALLEL.exists() else {}
        known |= read_parallel(sys.argv[2])
        PARALLEL.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    elif sys.argv[1:] == ["--page"]:
        if INSTALLED >= NEWEST_TESTED:  # which has all families
            PAGE.write_text(page(), encoding="utf-8")
    elif sys.argv[1:]:
        known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        known[transformers.__version__] = read(sys.argv[1])
        RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    else:
        sys.stdout.write(page())
