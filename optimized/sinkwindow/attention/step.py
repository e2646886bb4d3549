"""The attention of a compiled step: one query per row, heads of a group as queries of their common head.

Under ``torch.compile`` the ``sdpa`` of transformers copies grouped keys for every head where there is a mask (measured:
1.05x to 1.08x of a step of SmolLM2-135M at batch 1, 1.77x at batch 8). Uncompiled, it does what this function does.

While a graph is traced, the model's config names this attention (``model/hooks.py``). Where a model breaks the graph,
code runs in between and sees the name, and a failure there leaves it until the next call with a cache, or until the
last cache is detached. So for every other call it is ``sdpa``, mask included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from collections.abc import Callable

STEP_NAME = "sinkwindow_step"
# Whether this code is traced, in this thread. `torch.compiler.is_compiling` is also true beside a thread that compiles.
is_tracing = torch.compiler.is_dynamo_compiling
Function = TypeVar("Function", bound="Callable[..., Any]")
uncompiled: Callable[[Function], Function] = torch.compiler.disable  # typed


def step_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend with one query per row; registered with ``transformers.AttentionInterface``.

    Args:
        module: Ignored in a step.
        query: ``[batch, heads, 1, head_dim]``.
        key: ``[batch, kv_heads, slots, head_dim]``.
        value: ``[batch, kv_heads, slots, value_dim]``.
        attention_mask: ``[batch, 1, 1, slots]`` bool, True where a slot is visible.
        scaling: Factor of the scores; ``head_dim ** -0.5`` when ``None``.
        **kwargs: Ignored in a step.

    Returns:
        Attention output ``[batch, 1, heads, value_dim]``, and no weights.
    """
    batch, heads, _, width = query.shape
    if not (is_tracing() and _is_step(query, attention_mask, kwargs)):
        sdpa: Callable[..., tuple[Tensor, None]] = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    grouped = query.reshape(batch, key.shape[1], -1, width)
    output = nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(batch, 1, heads, -1), None


def _is_step(query: Tensor, mask: Tensor | None, more: dict[str, Any]) -> bool:
    """Return whether a traced call can be a step's: another one may see the name too."""
    one_each = query.shape[2] == 1 and mask is not None and mask.shape[1:3] == (1, 1)
    return one_each and not more.get("dropout")


AttentionInterface.register(STEP_NAME, step_attention)
AttentionMaskInterface.register(STEP_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
