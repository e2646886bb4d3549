"""Sinks and a window, the slow and obviously right way.

`retention`  the rule: a program on a list that says which tokens each query attends to.
`rotation`   RoPE.
`attention`  gather the retained keys of a query, rotate keys and query to their ranks, softmax, sum.
`layers`, `rope`, `angles`, `attach`, `steps`, `forward`  the same under any Hugging Face model with RoPE or ALiBi:
    `reference_logits`.
`loop`       a hand-written generation loop that compresses a stock cache with `index_select`.

Nothing here caches (but for `loop`) and no key ever moves: every query starts again from keys before rotation. That
costs O(tokens * limit) rotations per layer and buys code that can be checked against section 3.2 of arXiv 2309.17453.
"""

from sinkwindow_reference.attention import rank_attention
from sinkwindow_reference.forward import reference_logits
from sinkwindow_reference.loop import generate_by_index_select, stream_by_index_select
from sinkwindow_reference.retention import RetainedList, retained_after, retained_lists
from sinkwindow_reference.rotation import rotate

__all__ = [
    "RetainedList",
    "generate_by_index_select",
    "rank_attention",
    "reference_logits",
    "retained_after",
    "retained_lists",
    "rotate",
    "stream_by_index_select",
]
