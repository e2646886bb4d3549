"""Follow pages word for word, as a new user would: `python first_hour.py FOLDER PAGE...`, in an empty environment.

FOLDER is a copy of the project; this file uses the standard library alone. Shell and Python blocks run in order, Python
blocks without a shell block between them as one program. The run fails on the first error or warning. Blocks of another
kind, such as those for nox, which have a second word behind their language, are run by CI itself.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What pip says depends on its configuration; it fails by its exit status.
PIP = ("pip ", "sinkwindow fetch-defaults")
TROUBLE = re.compile(r"warn|deprecat|error|traceback", re.IGNORECASE)
SHOWN = 400  # characters of each output that are shown


def programs(page: Path) -> list[tuple[str, str]]:
    """Return the programs of a page: each line of a shell block, and all Python blocks up to the next shell block."""
    found: list[tuple[str, str]] = []
    for language, blocks in itertools.groupby(BLOCK.findall(page.read_text(encoding="utf-8")), key=lambda one: one[0]):
        text = "\n".join(text for _, text in blocks)
        found += [("python", text)] if language == "python" else [("sh", line) for line in text.splitlines() if line]
    return found


def run(language: str, text: str, folder: Path, environment: dict[str, str]) -> None:
    """Run a program and show what it took; a `SystemExit` if it fails or warns."""
    command = [sys.executable, "-c", text] if language == "python" else ["sh", "-ec", text]
    begun = time.monotonic()
    result = subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, text=True)
    title = text.splitlines()[0]
    print(f"$ {title}  [{time.monotonic() - begun:.1f} s]\n{result.stdout[-SHOWN:]}", flush=True)  # noqa: T201
    if result.returncode or (TROUBLE.search(result.stderr) and not text.startswith(PIP)):
        raise SystemExit(f"{title}\nexit status {result.returncode}\n{result.stderr}")


def main(folder: Path, pages: list[str]) -> None:
    """Run all pages, each in a copy of the project, without caches, a hub and the path of this project."""
    with tempfile.TemporaryDirectory() as home:
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "LANG", "LC_"))}
        environment = {**kept, "PATH": path, "HOME": home, "HF_HUB_OFFLINE": "1"}
        for number, page in enumerate(pages):
            place = shutil.copytree(folder, Path(home, f"page-{number}"))
            for language, text in programs(place / page):
                run(language, text, place, environment)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), sys.argv[2:])
