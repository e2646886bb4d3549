"""Many streams on one model: sinks and a window in the continuous batching of transformers.

transformers batches requests that come and go (``generate_batch``, ``ContinuousBatchingManager``, ``transformers
serve``) over a paged cache, which grows with every request until blocks run out. Here a request keeps S + W to
S + W + B tokens, however long it runs, and gives the logits that a ``StreamingCache`` of its own would give.
"""

from sinkwindow.model.versions import BATCHES_CONTINUOUSLY, INSTALLED

if not BATCHES_CONTINUOUSLY:
    raise ImportError(
        f"sinkwindow.continuous needs transformers 5.24, you have {INSTALLED}: before, no test compares its paged "
        "cache with the reference. Use pip install -U transformers, or a StreamingCache with padded rows."
    )

from sinkwindow.continuous.manager import StreamingBatchingManager, check_contract

__all__ = ["StreamingBatchingManager", "check_contract"]
