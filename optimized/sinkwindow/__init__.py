"""Endless generation with a fixed-size KV cache: attention sinks and a sliding window, exact at every call length.

``StreamingCache`` drops into ``generate`` of an ordinary ``transformers`` model. See its docstring for the rule, and
the folder ``reference/`` for the slow program that it is proved against.
"""

import transformers

from sinkwindow.cache import StreamingCache
from sinkwindow.model.families import Support, UnsupportedModelError, supports
from sinkwindow.model.versions import check_transformers
from sinkwindow.retention import Retention
from sinkwindow.stream.events import Eviction
from sinkwindow.stream.state import Snapshot

__all__ = ["Eviction", "Retention", "Snapshot", "StreamingCache", "Support", "UnsupportedModelError", "supports"]

check_transformers(transformers.__version__)
