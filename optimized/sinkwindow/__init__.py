"""Endless generation with a fixed-size KV cache: attention sinks and a sliding window, exact at every call length.

``StreamingCache`` drops into ``generate`` of an ordinary ``transformers`` model. See its docstring for the rule, and
the folder ``reference/`` for the slow program that it is proved against.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinkwindow.cache import StreamingCache
    from sinkwindow.chat import Chat
    from sinkwindow.model.families import Family, Support, UnsupportedModelError, supports
    from sinkwindow.retention import Retention
    from sinkwindow.stream.events import Eviction
    from sinkwindow.stream.state import Snapshot

__all__ = [
    "Chat",
    "Eviction",
    "Family",
    "Retention",
    "Snapshot",
    "StreamingCache",
    "Support",
    "UnsupportedModelError",
    "supports",
]
__version__: str

_MODULES = {
    "Chat": "chat",
    "Eviction": "stream.events",
    "Family": "model.families",
    "Retention": "retention",
    "Snapshot": "stream.state",
    "StreamingCache": "cache",
    "Support": "model.families",
    "UnsupportedModelError": "model.families",
    "supports": "model.families",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``sinkwindow --help`` needs neither torch nor transformers."""
    if name == "__version__":
        found: Any = importlib.metadata.version(__name__)
    elif name in _MODULES:
        importlib.import_module("sinkwindow.model.versions")  # first, since others fail on an unsupported transformers
        found = getattr(importlib.import_module(f"sinkwindow.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
