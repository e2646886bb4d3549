"""One quick request to the hub before its clients start their long retries."""

from __future__ import annotations

from typing import Literal, NamedTuple

from sinkwindow_lab.errors import require

TIMEOUT = 10.0  # of the one request [s]


class Answer(NamedTuple):
    """Whether the hub answered, a refusal included, and the commit of the branch, so that a result can name it."""

    reachable: bool
    commit: str | None


def ask(kind: Literal["model", "dataset"], place: str, branch: str | None = None) -> Answer:
    """Ask the hub for the commit of a branch; None is the main one. Files may be cached if it is not reachable."""
    hub = require("huggingface_hub")
    hub.utils.logging.set_verbosity_error()  # its log of retries fills the screen; our own message names the failure
    try:
        info = hub.HfApi().repo_info(place, repo_type=kind, revision=branch, timeout=TIMEOUT)
    except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError):
        return Answer(reachable=True, commit=None)
    except Exception:  # noqa: BLE001 - every HTTP client has its own kinds of "no connection"
        return Answer(reachable=False, commit=None)
    return Answer(reachable=True, commit=info.sha)
