"""The one error that the command line shows as a single line instead of a traceback."""

from __future__ import annotations

import importlib
from typing import Any


class LabError(ValueError):
    """Something the user can put right: a name, a file, a missing extra, a hub that cannot be reached."""


def require(module: str) -> Any:
    """Imports a dependency of the lab.

    Args:
        module: dotted name of the module.

    Returns:
        The module.

    Raises:
        LabError: if it is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        message = f"the lab needs the module {error.name!r}: pip install 'sinkwindow[lab]'"
        raise LabError(message) from error
