"""Base against head, both built and measured in this run, on this machine: the gate of pull requests.

Two passes of `asv continuous`: figures that are the same in every run (perplexity, bytes) may not worsen at all; times
may by the factor, and only where asv finds the samples apart. Rounds of both commits are interleaved, so that a slow
minute hits both. A failed benchmark fails the gate, and so does a run that measured nothing.
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
EXACT_FACTOR = 1.0001  # one in the fifth digit; six are deterministic
SLOWER = 1


def passes(base: str, head: str, factor: float, bench: str | None) -> list[list[str]]:
    """Lists the two commands, exact figures first.

    Args:
        base: commit to compare with.
        head: commit to judge.
        factor: largest allowed growth of a time.
        bench: expression that narrows the timed benchmarks down.
    """
    command = ["asv", "continuous", "--show-stderr", "--interleave-rounds"]
    return [
        [*command, "--factor", str(EXACT_FACTOR), "--bench", EXACT, base, head],
        [*command, "--factor", str(factor), "--bench", bench or f"^(?!.*({EXACT}))", base, head],
    ]


def comparison(command: list[str]) -> list[str]:
    """Gives the command that shows what did run: `asv continuous` compares nothing where a benchmark failed.

    Args:
        command: one of `passes`.
    """
    factor, commits = command[command.index("--factor") + 1], command[-2:]
    return ["asv", "compare", "--only-changed", "--factor", factor, *commits]


def compare(base: str, head: str, *, factor: float, bench: str | None, gpu: bool, root: Path) -> int:
    """Runs both passes to their end, whatever the first one says.

    Args:
        base: commit to compare with.
        head: commit to judge.
        factor: largest allowed growth of a time.
        bench: expression that narrows the timed benchmarks down; everything by default.
        gpu: whether there is a GPU.
        root: the repository.

    Returns:
        0 when nothing worsened, `SLOWER` when something did, else one of the gate's codes.
    """
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
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help="commit to compare with, such as origin/main")
    parser.add_argument("head", help="commit to judge, such as HEAD")
    parser.add_argument("--factor", type=float, default=1.15, help="largest allowed growth of a time")
    parser.add_argument("--bench", help="expression that narrows the timed benchmarks down")
    parser.add_argument("--gpu", action="store_true", help="there is a GPU")
    options = parser.parse_args(arguments)
    root = Path(__file__).resolve().parent.parent
    return compare(options.base, options.head, factor=options.factor, bench=options.bench, gpu=options.gpu, root=root)


if __name__ == "__main__":
    sys.exit(main())
