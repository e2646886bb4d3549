"""Write results atomically, into places that are checked before anything is measured."""

from __future__ import annotations

import importlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from sinkwindow_lab.errors import LabError

PREFIX = ".unfinished-"  # of temporary files; not the file's own name, which may be as long as names can be


def output_folder(path: Path, named: str | None = None) -> Path:
    """Create a folder in which files can be written, and return its path; errors call it `named`, or `--out PATH`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path, prefix=PREFIX):
            pass
    except (OSError, ValueError) as error:  # the latter of a name that no system has
        reason = getattr(error, "strerror", None) or error
        raise LabError(f"{named or f'--out {path}'}: cannot write there ({reason}); choose another folder") from error
    return path


def output_file(option: str, path: Path) -> Path:
    """Check before measuring that a file can be written there; `option` is its name on the command line."""
    try:
        fits = stat.S_ISREG(path.stat().st_mode)  # no folder, no device
    except FileNotFoundError:
        fits = path.parent.is_dir()
    except (OSError, ValueError):  # such as a name that is too long
        fits = False
    if not fits:
        raise LabError(f"{option} {path}: needs a file name in a folder that exists")
    output_folder(path.parent, f"{option} {path}")
    return path


@contextmanager
def alone_in(folder: Path, say: Callable[[str], object]) -> Iterator[None]:
    """Keep other runs out of a folder while the block runs; wait for one that is in it, and say so.

    The lock is the system's: it leaves no file, and ends with the process. Where a folder cannot be locked (Windows,
    some network disks) runs are not kept apart; each file is still whole.
    """
    with ExitStack() as stack:
        with suppress(ImportError, OSError):
            fcntl: Any = importlib.import_module("fcntl")
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"note: another run writes into {folder}; this one waits until it ends")
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file; an `OSError` for what is no file, such as a device without an end."""
    if not path.is_file():
        raise FileNotFoundError(path)
    return path.read_text(encoding="utf-8")


def write_text(path: Path, text: str) -> Path:
    """Write a UTF-8 file in one step: readers see the old text or the new one, also after a crash."""
    return write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file in one step, as `write_text` does."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=PREFIX)
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
    return path
