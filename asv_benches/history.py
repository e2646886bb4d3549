"""Measure the last commits that can be built, those that this machine has no numbers of, and name the others.

`nox -s bench_history -- 10` measures until ten commits have numbers; further arguments are those of `asv run`. The list
is written to .asv/results/history.md; with `--list`, as in the workflow `docs`, nothing is measured for it.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
from pathlib import Path

from sinkwindow_lab.render.markdown import join, name, table

RESULTS = Path(".asv", "results")
FARTHEST = 3  # stop at so many times the commits that were asked for


def commits(count: int) -> list[tuple[str, str, str]]:
    """Return hash, date and subject of the last commits of this branch, the newest first."""
    command = ["git", "log", "--first-parent", "--format=%H%x09%cs%x09%s", f"--max-count={count}"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [(one[0], one[1], one[2]) for one in (line.split("\t", 2) for line in lines)]


def numbers(machine: str, commit: str) -> int:
    """Return how many numbers a machine has of a commit."""
    found: list[float | None] = []
    for file in (RESULTS / machine).glob(f"{commit[:8]}*.json"):
        saved = json.loads(file.read_text(encoding="utf-8"))
        column = saved["result_columns"].index("result")
        found += [value for entry in saved["results"].values() for value in entry[column] or []]
    return sum(value is not None and not math.isnan(value) for value in found)


def run(machine: str, commit: str, arguments: list[str]) -> str:
    """Build and measure a commit; return the last line that asv or pip printed about an error."""
    command = ["asv", "run", "--machine", machine, "--show-stderr", *arguments, f"{commit}^!"]
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            sys.stdout.write(line)
            last = line.strip() if "error" in line.lower() else last
    return last or f"asv ended with status {process.returncode}"


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the list, and fail if no commit has numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", nargs="?", type=int, default=10, help="commits that shall have numbers")
    parser.add_argument("--machine", default=platform.node(), help="name under which the numbers are saved")
    parser.add_argument("--list", action="store_true", help="write the list of what was measured, and measure nothing")
    options, more = parser.parse_known_args(arguments)
    subprocess.run(["asv", "machine", "--yes", "--machine", options.machine], check=True)
    file = RESULTS / "unmeasured.txt"  # asv would take a .json file for results
    known = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    reasons = dict(line.split("\t", 1) for line in known)
    rows: list[list[str]] = []
    left = options.count
    for commit, date, subject in commits(FARTHEST * options.count):
        found = numbers(options.machine, commit)
        if options.list:
            reasons.setdefault(commit, "not measured yet")
        elif not found and commit not in reasons:
            reason = run(options.machine, commit, more)
            found = numbers(options.machine, commit)
            if not found:
                reasons[commit] = reason
                file.write_text("".join(f"{one}\t{why}\n" for one, why in reasons.items()), encoding="utf-8")
        rows.append([f"`{commit[:8]}`", date, name(subject), str(found) if found else f"none: {name(reasons[commit])}"])
        left -= bool(found)
        if not left:
            break
    listed = table(("Commit", "Date", "Subject", "Numbers"), rows, words=True)
    (RESULTS / "history.md").write_text(join(["## History", listed]), encoding="utf-8")
    sys.stdout.write(f"{listed}\n")
    return int(left == options.count and not options.list)


if __name__ == "__main__":
    sys.exit(main())
