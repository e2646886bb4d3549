"""One environment per peer in `.peers/`, built once and reused while its requirements stay the same."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

HOME: Final = Path(".peers")
TORCH: Final = "torch==2.13.0"  # installed first, so that packages that depend on it do not install another build
REQUIREMENTS: Final[dict[str, tuple[str, ...]]] = {
    "attention_sinks": ("attention_sinks==0.4.0", "transformers==4.34.0", "numpy<2", "accelerate==0.24.1", "einops"),
    "sink_cache": ("transformers==4.48.3", "numpy<2"),
    "kvpress": ("kvpress==0.5.5", "transformers==4.57.*"),
}
PYTHON: Final = "python3.11"  # the newest version for which the tokenizers release of the oldest peer has a wheel
BUILT: Final = "requirements.txt"  # written last; an environment without it is incomplete


class BuildError(Exception):
    """An environment could not be built; the message is the last line that pip printed."""


def interpreter(name: str) -> str:
    """Return the Python interpreter of a peer's environment, built if missing or outdated; others use ours.

    Raises:
        BuildError: if the environment cannot be built.
    """
    if name not in REQUIREMENTS:
        return sys.executable
    folder = (HOME / name).resolve()
    wanted = "\n".join((TORCH, *REQUIREMENTS[name]))
    python = folder / "bin" / "python"
    built = folder / BUILT
    if not (built.is_file() and built.read_text(encoding="utf-8") == wanted):
        _build(folder, python, REQUIREMENTS[name])
        built.write_text(wanted, encoding="utf-8")
    return str(python)


def _build(folder: Path, python: Path, requirements: tuple[str, ...]) -> None:
    sys.stderr.write(f"building {folder.name}: {', '.join(requirements)}\n")
    if folder.exists():
        shutil.rmtree(folder)
    chosen = shutil.which(PYTHON)
    if chosen is None:
        raise BuildError(f"{PYTHON} is not on the path: install it")
    pip = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    for command in ((chosen, "-m", "venv", str(folder)), (*pip, TORCH), (*pip, TORCH, *requirements)):
        run = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if run.returncode:
            lines = [line for line in run.stdout.splitlines() if line.startswith("ERROR")] or ["no message"]
            raise BuildError(f"{Path(command[0]).name} failed: {lines[-1].removeprefix('ERROR: ')[:200]}")
