"""Compare a head commit with its base, both built and measured in this run: the gate of pull requests.

There are two passes of `asv continuous`. Figures that are the same in every run (perplexity, bytes) may not get worse.
Times may grow by a factor, and a difference counts only if asv finds it statistically significant. Rounds of both
commits are interleaved, so that a slow minute affects both. If a benchmark fails, or nothing was measured, the gate
fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

try:
    from asv_benches import gate  # imported from the root, as tests do
except ModuleNotFoundError:
    import gate  # type: ignore[import-not-found, no-redef]  # started as a script

EXACT = "Perplexity|CacheBytes"
EXACT_FACTOR = 1.0001  # one in the fifth digit; six digits are deterministic
ROUNDS = ("--attribute", "rounds=2")  # of each commit; within a round, `setup_cache` interleaves combinations
SLOWER = 1


def passes(base: str, head: str, factor: float, bench: str | None) -> list[list[str]]:
    """Return the two commands, exact figures first."""
    command = ["asv", "continuous", "--show-stderr", "--interleave-rounds"]
    return [
        [*command, "--factor", str(EXACT_FACTOR), "--bench", EXACT, base, head],
        [*command, *ROUNDS, "--factor", str(factor), "--bench", bench or f"^(?!.*({EXACT}))", base, head],
    ]


def comparison(command: list[str]) -> list[str]:
    """Return the command that compares what did run: `asv continuous` compares nothing if a benchmark failed."""
    factor, commits = command[command.index("--factor") + 1], command[-2:]
    return ["asv", "compare", "--only-changed", "--factor", factor, *commits]


def compare(base: str, head: str, *, factor: float, bench: str | None, gpu: bool, root: Path) -> int:
    """Run both passes; return 0 if nothing got worse, `SLOWER` if something did, else one of the gate's codes."""
    judged = subprocess.run(["git", "rev-parse", head], cwd=root, check=True, capture_output=True, text=True)
    stamp = root / ".asv" / "started"
    stamp.parent.mkdir(exist_ok=True)
    codes = []
    for command in passes(base, head, factor, bench):
        stamp.touch()
        code = subprocess.run(command, cwd=root, check=False).returncode
        if code not in (0, SLOWER):
            subprocess.run(comparison(command), cwd=root, check=False)
        selected = command[command.index("--bench") + 1]
        complete = judged.stdout.strip()
        findings = gate.judge(root / ".asv" / "results", stamp, gpu=gpu, complete=complete, selected=selected)
        sys.stdout.write(findings.text() + "\n")
        codes.append(findings.code or code)
    return next((code for code in codes if code not in (0, SLOWER)), max(codes))


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help="commit to compare with, such as origin/main")
    parser.add_argument("head", help="commit to test, such as HEAD")
    parser.add_argument("--factor", type=float, default=1.15, help="largest allowed growth of a time")
    parser.add_argument("--bench", help="regular expression that selects the timed benchmarks")
    parser.add_argument("--gpu", action="store_true", help="this machine has a GPU")
    options = parser.parse_args(arguments)
    root = Path(__file__).resolve().parent.parent
    return compare(options.base, options.head, factor=options.factor, bench=options.bench, gpu=options.gpu, root=root)


if __name__ == "__main__":
    sys.exit(main())
