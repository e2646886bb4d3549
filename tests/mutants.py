"""Print what became of mutants, by module; fail below LEAST percent: `python tests/mutants.py FOLDER LEAST`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

CAUGHT = {"by tests": (1, 3), "by mypy": (37,), "timeouts": (-24, 24, 36, 152, 255)}  # exit codes


def main(folder: str, least: str) -> str | None:
    """Print the table; return an error if too few mutants are caught."""
    found = {
        f"`{meta.relative_to(folder).with_suffix('')}`": [
            code for code in json.loads(meta.read_text("utf-8"))["exit_code_by_key"].values() if code is not None
        ]
        for meta in sorted(Path(folder).rglob("*.meta"))
    }
    sys.stdout.write(f"| module | mutants | {' | '.join(CAUGHT)} | survived | caught |\n|---|{'---:|' * 6}\n")
    share = 0.0
    for name, codes in {**found, "all": [code for one in found.values() for code in one]}.items():
        if codes:
            caught = [sum(code in kind for code in codes) for kind in CAUGHT.values()]
            share = 100 * sum(caught) / len(codes)
            cells = (name, len(codes), *caught, len(codes) - sum(caught), f"{share:.1f}%")
            sys.stdout.write(f"| {' | '.join(map(str, cells))} |\n")
    return f"less than {least}% caught" if share < float(least) else None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
