"""The errors that the command line shows as a single line instead of a traceback."""

from __future__ import annotations

import importlib
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# What torch and Python say of memory that cannot be had, and of sizes that no memory has; the classes do not tell.
NO_MEMORY = re.compile(
    r"can't allocate memory|out of memory|Storage size calculation overflowed|multiplication overflow"
    r"|into an index-sized integer|Overflow when unpacking long"
)
DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # they reorder a line
LONGEST = 1000  # characters of a line that is shown whole
INFINITE = float("inf")
INTERRUPTED = 130  # the exit status, as of a shell: 128 + SIGINT


class LabError(ValueError):
    """Something the user can fix: a name, a file, a missing extra, an unreachable hub."""


class Interrupted(Exception):  # noqa: N818 - not an error
    """The user ended a command that keeps what it has finished; its words say what, and how to go on."""


@contextmanager
def keeping(words: Callable[[], str]) -> Iterator[None]:
    """Turn a Ctrl-C within the block into `Interrupted`."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(words()) from error


def require(module: str) -> Any:
    """Import and return a dependency of the lab, by its dotted name."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise LabError(_missing(error)) from error


def check_number(option: str, value: float, least: float, most: float = INFINITE) -> None:
    """Check that the value of an option lies between two numbers and is finite; `option` ends with a space or `=`."""
    if not least <= value <= most or value == INFINITE:
        words = f"to {most:g}" if most < INFINITE else "or more" if value < INFINITE else "or more, and finite"
        raise LabError(f"{option}{value} must be {least:g} {words}")


def printable(words: str) -> str:
    """Return words of which nothing acts on a terminal: line ends, escapes, marks of direction are shown as escapes.

    Spaces of all kinds and joiners of letters, which many languages need, are shown as they are.
    """
    return "".join(one if one.isprintable() or _is_harmless(one) else ascii(one)[1:-1] for one in words)


def _is_harmless(letter: str) -> bool:
    return unicodedata.category(letter) in {"Zs", "Cf"} and letter not in DIRECTIONS


def say(what: str, *, err: bool = True) -> None:
    """Show lines, on standard error unless they are results; no name in them acts."""
    print("\n".join(map(printable, what.splitlines())), file=sys.stderr if err else sys.stdout, flush=True)


def explain(error: Exception) -> str | None:
    """Return in one line what a user can do about an error; None if there is nothing, as for a mistake in the code."""
    if isinstance(error, LabError):
        words = str(error)
    elif isinstance(error, ModuleNotFoundError):
        words = _missing(error)
    elif isinstance(error, OSError):
        words = f"{error}: free this place, or choose another one"
    elif isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
        reason = str(error).partition(". ")[0] or type(error).__name__
        words = f"not enough memory ({reason}): choose smaller sizes, or a smaller --dtype"
    elif hasattr(error, "format_message"):  # typer's own: options that are unknown, or have a value of another kind
        path = getattr(getattr(error, "ctx", None), "command_path", "sinkwindow")
        words = f"{error.format_message().rstrip('.')}; {path} --help lists what is possible"
    else:
        return None
    line = printable(" ".join(words.split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"


def _missing(error: ModuleNotFoundError) -> str:
    extra = "eval" if str(error.name).partition(".")[0] == "lm_eval" else "lab"
    return f"the lab needs the module {error.name!r}: pip install 'sinkwindow[{extra}]'"
