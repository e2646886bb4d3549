"""Plant regressions in a scratch clone and test that the gate of pull requests reports each, and nothing else.

`nox -s planted_regressions` writes the table to docs/benchmarks.md, between its marks. Every commit is built into asv's
own environment, as for a pull request; only the benchmarks that the planted regressions affect run.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sinkwindow_lab.render import markdown, marked

ROOT: Final = Path(__file__).resolve().parent.parent
DOCUMENT: Final = Path("docs", "benchmarks.md")
PLACE: Final = "planted"
PLANTED_IN: Final = Path("optimized", "sinkwindow", "__init__.py")
TIMED: Final = r"CacheWork|WholeText\."  # the times that the planted regressions affect
FACTOR: Final = 1.25  # for a shared machine; a dedicated runner uses 1.15
GIT: Final = ("git", "-c", "user.name=planted", "-c", "user.email=planted@localhost", "-c", "commit.gpgsign=false")


@dataclass(frozen=True)
class Plant:
    """A planted regression: a change appended to the package's `__init__`, and what the gate must report.

    Attributes:
        name: for the table.
        code: the code to append.
        seen_in: regular expression for the benchmark that must be reported as worse; empty if none may be.
    """

    name: str
    code: str
    seen_in: str


PLANTS: Final = (
    Plant("nothing but a comment", "# the same program", ""),
    Plant(
        "slower: every layer's update waits 1 ms",
        """
import time as _time
_update = StreamingCache.update
def _late(self, *args, **kwargs):
    _time.sleep(1e-3)
    return _update(self, *args, **kwargs)
StreamingCache.update = _late
""",
        r"CacheWork\.time_update",
    ),
    Plant(
        "larger: as many free slots as tokens",
        """
from sinkwindow.storage import slots as _slots
_slots.SLACK_SHARE = 1
""",
        r"CacheBytes\.track_bytes",
    ),
    Plant(
        "wrong: positions stop at the 64th",
        """
from sinkwindow.lanes import LaneCall as _LaneCall
_positions = _LaneCall.positions
_LaneCall.positions = lambda self, device: _positions(self, device).clamp(max=64)
""",
        r"Perplexity\.track_perplexity",
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What the gate reported for a planted regression."""

    plant: Plant
    code: int
    worse: tuple[str, ...]

    @property
    def right(self) -> bool:
        """Whether the gate accepted or rejected the change as it must, and for the right reason."""
        if not self.plant.seen_in:
            return self.code == 0
        return self.code != 0 and any(re.search(self.plant.seen_in, line) for line in self.worse)


def worse_lines(output: str) -> tuple[str, ...]:
    """Return the rows of asv's table that report a regression (`+`) or a new failure (`!`)."""
    rows = (line.strip() for line in output.splitlines())
    return tuple(row for row in rows if re.match(r"\|\s*[+!]\s*\|", row))


def git(clone: Path, *arguments: str) -> str:
    """Run git in the clone and return what it prints."""
    run = subprocess.run([*GIT, *arguments], cwd=clone, check=True, capture_output=True, text=True)
    return run.stdout.strip()


def plant_commit(clone: Path, plant: Plant, number: int) -> str:
    """Commit a planted regression to a new branch from the base; return its hash."""
    git(clone, "checkout", "-q", "-B", f"planted-{number}", "base")
    file = clone / PLANTED_IN
    file.write_text(file.read_text(encoding="utf-8") + f"\n{plant.code}\n", encoding="utf-8")
    git(clone, "commit", "-q", "-a", "-m", plant.name)
    return git(clone, "rev-parse", "HEAD")


def judge(clone: Path, plant: Plant, number: int) -> Outcome:
    """Run the gate of pull requests on the base and the planted regression."""
    head = plant_commit(clone, plant, number)
    git(clone, "checkout", "-q", "main")  # use the gate and the benchmarks of the base
    command = [sys.executable, "asv_benches/compare.py", "--factor", str(FACTOR), "--bench", TIMED, "base", head]
    run = subprocess.run(command, cwd=clone, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(f"== {plant.name}: exit {run.returncode}\n{run.stdout}", flush=True)
    return Outcome(plant, run.returncode, worse_lines(run.stdout))


def cell(text: str) -> str:
    """Return the benchmark of a row with the values of both commits."""
    columns = [column.strip() for column in text.strip("|").split("|")]
    return f"`{columns[-1]}`: {columns[1]} to {columns[2]}"


def table(outcomes: list[Outcome], commit: str) -> str:
    """Render the outcomes, with up to three worse figures each."""
    rows = []
    for one in outcomes:
        first = sorted(one.worse, key=lambda row: re.search(one.plant.seen_in or "$", row) is None)[:3]
        more = f"; {len(one.worse) - 3} more" if len(one.worse) > len(first) else ""
        rows.append((one.plant.name, str(one.code), f"{'; '.join(map(cell, first)) or 'nothing'}{more}"))
    origin = f"Written by `nox -s planted_regressions` at commit {commit[:8]}, factor {FACTOR} for times."
    return f"{origin}\n\n{markdown.table(('planted', 'exit status', 'reported as worse'), rows, words=True)}"


def main(arguments: list[str] | None = None) -> int:
    """Run the gate on all planted regressions, write the table, and fail if the gate was wrong about one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-write", action="store_true", help="do not change docs/benchmarks.md")
    options = parser.parse_args(arguments)
    marked.check(ROOT / DOCUMENT, PLACE)
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        clone = Path(folder, "clone")
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        git(clone, "checkout", "-q", "-B", "main")
        git(clone, "branch", "base")
        commit = git(clone, "rev-parse", "HEAD")
        outcomes = [judge(clone, plant, number) for number, plant in enumerate(PLANTS)]
    rendered = table(outcomes, commit)
    print(rendered)
    if not options.no_write:
        marked.fill(ROOT / DOCUMENT, {PLACE: rendered})
    wrong = [one.plant.name for one in outcomes if not one.right]
    print(f"the gate was wrong about: {', '.join(wrong)}" if wrong else "the gate was right about all of them")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
