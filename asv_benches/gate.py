"""Read the results that asv has saved and distinguish "failed" from "nothing ran", which asv's exit code does not.

`python asv_benches/gate.py --newer-than STAMP` reads every result file written since the stamp file was touched.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OK, NOTHING_RAN, FAILED, MISSING = 0, 3, 4, 5  # asv uses 1 for "slower" and 2 for a usage error
NOT_RESULTS = {"machine.json", "benchmarks.json"}
GPU = "'cuda'"  # as asv writes a parameter


@dataclass
class Findings:
    """How many numbers were measured in one or more runs, and which failed or are missing."""

    measured: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def code(self) -> int:
        """Exit status: the worst finding."""
        if self.failed:
            return FAILED
        if not self.measured:
            return NOTHING_RAN
        return MISSING if self.missing else OK

    def text(self) -> str:
        """Return the findings, one line each."""
        lines = [f"{self.measured} measured, {self.skipped} skipped, {len(self.failed)} failed"]
        lines += [f"failed: {name}" for name in self.failed]
        lines += [f"missing: {name}" for name in self.missing]
        if not self.measured:
            lines.append("nothing ran: no number was measured")
        return "\n".join(lines)


def inspect(benchmarks: dict[str, Any], results: dict[str, Any], *, gpu: bool, history: bool, into: Findings) -> None:
    """Count the numbers of one run of asv as measured, skipped, failed or missing.

    Without a GPU, combinations on it may be skipped; a commit of the `history` may be older than its benchmarks.
    """
    columns: list[str] = results["result_columns"]
    commit = str(results.get("commit_hash", ""))[:8]
    for name, benchmark in benchmarks.items():
        if not isinstance(benchmark, dict):  # the file's own version number
            continue
        entry = results["results"].get(name)
        if entry is None:
            if not history:
                into.missing.append(f"{commit} {name}")
            continue
        values = dict(zip(columns, entry, strict=False)).get("result")
        chosen = list(itertools.product(*benchmark["params"]))
        for combination, value in zip(chosen, values or [None] * len(chosen), strict=True):
            where = f"{commit} {name}({', '.join(combination)})"
            if value is None:
                into.failed.append(where)
            elif not math.isnan(value):
                into.measured += 1
            elif history or (GPU in combination and not gpu):
                into.skipped += 1
            else:
                into.missing.append(where)


def result_files(folder: Path, stamp: Path | None) -> list[Path]:
    """Return the result files of all machines written after the stamp."""
    files = [path for path in folder.glob("*/*.json") if path.name not in NOT_RESULTS]
    if stamp is not None:
        files = [path for path in files if path.stat().st_mtime_ns >= stamp.stat().st_mtime_ns]
    return sorted(files)


def judge(
    folder: Path, stamp: Path | None, *, gpu: bool = False, complete: str | None = None, selected: str = ""
) -> Findings:
    """Check what was written since a file was touched; commit `complete`, or all, must have all that is selected."""
    findings = Findings()
    index = folder / "benchmarks.json"
    files = result_files(folder, stamp)
    if not index.is_file() or not files:
        return findings
    benchmarks = json.loads(index.read_text(encoding="utf-8"))
    expected = {name: one for name, one in benchmarks.items() if re.search(selected, name)}
    for file in files:
        results = json.loads(file.read_text(encoding="utf-8"))
        history = complete is not None and results["commit_hash"] != complete
        inspect(expected, results, gpu=gpu, history=history, into=findings)
    return findings


def main(arguments: list[str] | None = None) -> int:
    """Print the findings and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path(".asv/results"))
    parser.add_argument("--newer-than", type=Path, metavar="STAMP")
    parser.add_argument("--selected", default="", help="expect only benchmarks whose name matches this pattern")
    parser.add_argument("--gpu", action="store_true", help="this machine has a GPU: no benchmark may be skipped")
    parser.add_argument("--complete", help="full hash of the only commit that must be complete; all by default")
    options = parser.parse_args(arguments)
    findings = judge(
        options.results, options.newer_than, gpu=options.gpu, complete=options.complete, selected=options.selected
    )
    sys.stdout.write(findings.text() + "\n")
    return findings.code


if __name__ == "__main__":
    sys.exit(main())
