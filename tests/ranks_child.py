"""One rank of a run, for `test_lab_ranks.py`: the command line over a tiny plan, with a fault of one rank.

The environment may have `FAULT`, such as `1 kill 5`: which rank, what it does, and before which of its calls.
A rank that the launcher starts again has no fault.
"""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

from lab_tiny import TINY
from sinkwindow_lab.cli import main
from sinkwindow_lab.reports.tables import plan
from sinkwindow_lab.ways.sessions import Session

if TYPE_CHECKING:
    import torch

feed, calls = Session.feed, list[int]()
rank, fault, call = os.environ.get("FAULT", "- none 0").split()


def faulty(self: Session, ids: torch.Tensor, *, last_only: bool = False) -> torch.Tensor:
    """Feed a session, slowly, until the fault is due."""
    time.sleep(0.05)
    calls.append(1)
    if os.environ["RANK"] == rank and len(calls) == int(call):
        if fault == "raise":
            raise ZeroDivisionError("a mistake in the code")
        if fault == "sleep":
            time.sleep(1e6)
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault])
    return feed(self, ids, last_only=last_only)


if __name__ == "__main__":
    plan.QUICK = TINY
    if fault != "none" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        Session.feed = faulty  # type: ignore[method-assign]
    main()
