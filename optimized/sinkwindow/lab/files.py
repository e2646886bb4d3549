"""Writing results so that nothing is ever half written."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from sinkwindow.lab.errors import LabError


def output_folder(path: Path) -> Path:
    """Creates a folder for results.

    Args:
        path: the folder; existing is fine.

    Returns:
        The same path.

    Raises:
        LabError: if it cannot be made or is a file.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"--out {path}: cannot make this folder ({error.strerror}); choose another one"
        raise LabError(message) from error
    return path


def output_file(option: str, path: Path) -> Path:
    """Checks, before anything is measured, that a file can be written there.

    Args:
        option: how the user named it.
        path: the file.

    Returns:
        The same path.

    Raises:
        LabError: if its folder is missing or it is a folder itself.
    """
    if path.is_dir() or not path.parent.is_dir():
        message = f"{option} {path}: needs a file name in a folder that exists"
        raise LabError(message)
    return path


def write_text(path: Path, text: str) -> None:
    """Writes a file in one step: readers see the old text or the new one, also after a crash in the middle.

    Args:
        path: the file to write or replace.
        text: its whole content, written as UTF-8.

    Raises:
        OSError: if the folder cannot be written; the old file is then untouched.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file in one step, as `write_text` does.

    Args:
        path: the file to write or replace.
        content: its whole content.

    Raises:
        OSError: if the folder cannot be written; the old file is then untouched.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)  # mkstemp makes it private; a result is for everybody
        Path(temporary).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(temporary).unlink()
        raise
