"""One quick question to the hub before its clients start their long retries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sinkwindow.lab.errors import require

TIMEOUT = 10.0  # for the one question [s]


@dataclass(frozen=True)
class Answer:
    """What the hub said about a model or data set.

    Attributes:
        reachable: whether it said anything, a refusal included.
        commit: what the branch stands at, so that a result can name it.
    """

    reachable: bool
    commit: str | None


def ask(kind: Literal["model", "dataset"], place: str, branch: str | None = None) -> Answer:
    """Asks the hub for the commit of a branch.

    Args:
        kind: what to ask for.
        place: its id.
        branch: None is the main one.

    Returns:
        The answer; an unreachable hub is an answer too, since files may be on this disk already.
    """
    hub = require("huggingface_hub")
    hub.utils.logging.set_verbosity_error()  # its retries fill the screen; our own message names the failure
    try:
        info = hub.HfApi().repo_info(place, repo_type=kind, revision=branch, timeout=TIMEOUT)
    except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError):
        return Answer(reachable=True, commit=None)
    except Exception:  # noqa: BLE001 - every HTTP client has its own kinds of "no connection"
        return Answer(reachable=False, commit=None)
    return Answer(reachable=True, commit=info.sha)
