"""The reference: attention sinks and a window, slow and easy to check.

`retention`  which tokens each query attends to: the rule, as a program on a list.
`rotation`   rotary position embedding (RoPE).
`attention`  gather a query's retained keys, rotate keys and query to their ranks, softmax, weighted sum.
`models`     the same under any Hugging Face model with RoPE or ALiBi (`reference_logits`), and a hand-written
    generation loop (`generate_by_index_select`).

The three files of the rule can be checked against section 3.2 of arXiv 2309.17453. They have no cache: each query
rotates unrotated keys again, which costs O(tokens * limit) rotations per layer.
"""

from sinkwindow_reference.attention import rank_attention
from sinkwindow_reference.models.forward import reference_logits
from sinkwindow_reference.models.loop import generate_by_index_select, stream_by_index_select
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
