"""The one error that the command line shows as a single line instead of a traceback."""

from __future__ import annotations

import importlib
from typing import Any


class LabError(ValueError):
    """Something the user can fix: a name, a file, a missing extra, an unreachable hub."""


def require(module: str) -> Any:
    """Import and return a dependency of the lab, by its dotted name."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise LabError(f"the lab needs the module {error.name!r}: pip install 'sinkwindow[lab]'") from error
