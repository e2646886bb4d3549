"""Write results atomically."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from sinkwindow_lab.errors import LabError


def output_folder(path: Path) -> Path:
    """Create a folder for results and return its path; it may exist."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"--out {path}: cannot make this folder ({error.strerror}); choose another one") from error
    return path


def output_file(option: str, path: Path) -> Path:
    """Check before measuring that a file can be written there; `option` is its name on the command line."""
    if path.is_dir() or not path.parent.is_dir():
        raise LabError(f"{option} {path}: needs a file name in a folder that exists")
    return path


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file in one step: readers see the old text or the new one, also after a crash.

    Raises:
        OSError: if the folder cannot be written; the old file is then untouched.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one step, as `write_text` does.

    Raises:
        OSError: if the folder cannot be written; the old file is then untouched.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)  # mkstemp makes the file private; a result should be readable by everybody
        Path(temporary).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(temporary).unlink()
        raise
