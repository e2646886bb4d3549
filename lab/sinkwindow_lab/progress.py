"""Progress on standard error; standard output is for results."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from sinkwindow_lab.errors import printable, say

if TYPE_CHECKING:
    from typing_extensions import Self

EVERY = 10.0  # without a terminal, how often a line shows what several processes do [s]
WIDE = 80  # a terminal that has room for a bar [columns]


class Reporter:
    """Is told what is being measured; this one shows nothing."""

    def begin(self, label: str, total: int) -> None:
        """Begin the next measurement: its name and its number of steps."""

    def advance(self, steps: int = 1) -> None:
        """Count steps as done."""

    def found(self, words: str) -> None:
        """Show a number that is finished."""


class Bars(Reporter):
    """One bar for all measurements and one for the current one; plain lines if there is no terminal."""

    def __init__(self, measurements: int) -> None:
        """Prepare the bars for a number of measurements."""
        self._console = Console(file=sys.stderr)
        # The words take what the numbers leave, also on a narrow terminal, where there is no room for a bar as well.
        words = TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True))
        bar = [BarColumn()] if self._console.width >= WIDE else []
        columns = (words, *bar, MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=self._console, expand=True, disable=not self._console.is_terminal)
        self._all = self._progress.add_task("measurements", total=measurements)
        self._current: TaskID | None = None
        self._count, self._measurements = 0, measurements

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, label: str, total: int) -> None:
        """Begin the next measurement: its name and its number of steps."""
        if self._current is not None:
            self._progress.remove_task(self._current)
            self._progress.advance(self._all)
        self._count += 1
        if not self._console.is_terminal:
            say(f"[{self._count}/{self._measurements}] {label}")
        self._current = self._progress.add_task(printable(label), total=total)

    def advance(self, steps: int = 1) -> None:
        """Count steps as done."""
        if self._current is not None:
            self._progress.advance(self._current, steps)

    def found(self, words: str) -> None:
        """Show a number that is finished, above the bars."""
        self._progress.console.print(f"  {printable(words)}", markup=False, highlight=False, soft_wrap=True)


class Together(Bars):
    """What several processes do: a bar for each; if there is no terminal, a line for all of them, every ten seconds."""

    def __init__(self, units: int, processes: int) -> None:
        """Prepare a bar for all units and one for each process."""
        super().__init__(units)
        tasks = [self._progress.add_task(f"rank {rank}", total=None) for rank in range(processes)]
        self._tasks, self._shown = tasks, time.monotonic() - EVERY

    def show(self, finished: int, beats: Mapping[int, Mapping[str, Any]]) -> None:
        """Show how many units are finished, and what each process tells of itself (`pulse.py`)."""
        told, now = [], time.monotonic()
        self._progress.update(self._all, completed=finished)
        for rank, one in sorted(beats.items()):
            task, words = self._tasks[rank], f"rank {rank} ({one['host']}): {one['doing']}"
            self._progress.update(task, description=printable(words), completed=one["steps"], total=one["total"])
            told.append(words + (f", {one['steps']:,} of {one['total']:,}" if one["total"] else ""))
        if not self._console.is_terminal and now - self._shown >= EVERY:
            say(f"[{finished}/{self._measurements}] {'; '.join(told)}")
            self._shown = now
