"""The command `sinkwindow`: import the lab's dependencies, or name the extra that installs them."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line with `arguments`, without the program's name (`sys.argv` by default).

    Raises:
        SystemExit: always: 0 when all went well, 2 after a user's error (one line on standard error).
    """
    try:
        from sinkwindow_lab.commands import app
        from sinkwindow_lab.errors import LabError
    except ModuleNotFoundError as error:
        print(f"error: the lab needs the module {error.name!r}: pip install 'sinkwindow[lab]'", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from error
    try:
        app(args=None if arguments is None else list(arguments))
    except LabError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201 - one line, whatever it quotes
        raise SystemExit(2) from error
    except ModuleNotFoundError as error:
        print(f"error: the lab needs the module {error.name!r}: pip install 'sinkwindow[lab]'", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from error
