"""The command `sinkwindow`: import the lab's dependencies, or name the extra that installs them."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import NoReturn

from sinkwindow_lab.errors import INTERRUPTED, Interrupted, LabError, explain, say


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line with `arguments`, without the program's name (`sys.argv` by default).

    Where torchrun or accelerate has started several processes, this is one of them.

    Raises:
        SystemExit: always: 0 when all went well, 1 when `verify` finds the cache wrong, 2 after a user's error (one
            line on standard error), 130 after Ctrl-C (one line, which says what is kept).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # results are shown whatever letters the terminal knows
    try:
        from sinkwindow_lab.ranks import joined

        with joined(sys.argv[1:] if arguments is None else arguments):
            _run(arguments)
    except (LabError, ModuleNotFoundError) as error:
        _end(error)


def _run(arguments: Sequence[str] | None) -> NoReturn:
    try:
        from sinkwindow_lab.commands import app

        given = None if arguments is None else list(arguments)
        status = app(args=given, prog_name="sinkwindow", standalone_mode=False) or 0
        if status == INTERRUPTED:  # typer turned a Ctrl-C into it
            say("interrupted: nothing is written")
    except Interrupted as kept:
        say(f"interrupted: {kept}")
        status = INTERRUPTED
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # the help, which it has shown
            raise SystemExit(2) from error
        _end(error)
    raise SystemExit(status)


def _end(error: Exception) -> NoReturn:
    """End with one line if it tells the user what to do, with a traceback otherwise."""
    line = explain(error)
    if line is None:
        raise error
    say(f"error: {line}")
    raise SystemExit(2) from error
