"""Endless generation with a fixed-size KV cache: attention sinks and a sliding window, exact at every call length.

``StreamingCache`` drops into ``generate`` of an ordinary ``transformers`` model. See its docstring for the rule, and
the folder ``reference/`` for the slow program that it is proved against.
"""

from sinkwindow.cache import Eviction, StreamingCache
from sinkwindow.families import Support, UnsupportedModelError, supports
from sinkwindow.retention import Retention

__all__ = ["Eviction", "Retention", "StreamingCache", "Support", "UnsupportedModelError", "supports"]
__version__ = "0.1.0"
