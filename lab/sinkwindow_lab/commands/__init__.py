"""The commands of `sinkwindow`. Results go to standard output or files, progress to standard error."""

from sinkwindow_lab.commands import use, measure, maintain  # noqa: I001 - the help lists groups in this order
from sinkwindow_lab.commands.options import app

__all__ = ["app", "maintain", "measure", "use"]
