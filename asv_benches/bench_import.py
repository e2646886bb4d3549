"""Import time, compared with its lower bound: torch, and the parts of transformers that any cache needs."""

from __future__ import annotations

from typing import ClassVar

from .common import shown_as

STATEMENTS = {
    "torch and transformers' Cache": "from transformers import AttentionInterface, Cache",
    "sinkwindow": "import sinkwindow",
}


class Import:
    """Import time, in a fresh interpreter for each sample."""

    params: ClassVar = [list(STATEMENTS)]
    param_names: ClassVar = ["what"]
    version = "1"
    number = rounds = 1
    repeat = 5
    timeout = 300

    @shown_as("Import time")
    def timeraw_import(self, what: str) -> str:
        """Return the statement for asv to time."""
        return STATEMENTS[what]
