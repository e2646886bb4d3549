"""Endless generation with a fixed-size KV cache: attention sinks and a sliding window, exact at every call length.

``StreamingCache`` drops into ``generate`` of an ordinary ``transformers`` model. See its docstring for the rule, and
the folder ``reference/`` for the slow program that it is proved against.
"""

import transformers

from sinkwindow.cache import StreamingCache
from sinkwindow.events import Eviction
from sinkwindow.families import Support, UnsupportedModelError, supports
from sinkwindow.retention import Retention
from sinkwindow.stream import Snapshot
from sinkwindow.versions import check_transformers

__all__ = ["Eviction", "Retention", "Snapshot", "StreamingCache", "Support", "UnsupportedModelError", "supports"]

check_transformers(transformers.__version__)
