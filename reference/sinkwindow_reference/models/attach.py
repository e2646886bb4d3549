"""Use rank attention in a Hugging Face model within a `with` block."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import AttentionInterface

from sinkwindow_reference.attention import rank_attention
from sinkwindow_reference.models.checks import check_layer
from sinkwindow_reference.models.layers import configs_of, last_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel

    from sinkwindow_reference.models.rope import Rope

NAME = "sinkwindow_reference"


@dataclass
class Plan:
    """What the attention function needs to know about the current forward pass.

    Attributes:
        retained: For each query the natural indices that it attends to.
        ropes: The rotary embedding of each layer.
        windows: The sliding window of each layer [tokens], None where `retained` applies.
        upcast: See `rank_attention`.
        calls: How many attention layers have used the plan so far.
    """

    retained: list[list[int]]
    ropes: list[Rope]
    windows: list[int | None]
    upcast: bool
    calls: int = 0


# A context variable, because not every model family passes keyword arguments on to its attention function.
_plan: ContextVar[Plan] = ContextVar("_plan")


def _attention(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,  # noqa: ARG001 - some models pass it by name
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention with the signature that transformers expects. Return `[batch, tokens, heads, head_dim]`."""
    plan = _plan.get()
    rope, window = plan.ropes[plan.calls], plan.windows[plan.calls]
    plan.calls += 1
    retained = plan.retained if window is None else last_tokens(len(plan.retained), window)
    check_layer(kwargs, max(map(len, retained)))
    output = rank_attention(
        query, key, value, retained, rope.inv_freq.to(query.device),
        scaling=scaling, interleaved=rope.interleaved, softcap=softcap, sink_logits=s_aux, upcast=plan.upcast,
    )  # fmt: skip
    return output.transpose(1, 2).contiguous(), None


@contextmanager
def use_rank_attention(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """Use `plan` in every attention layer of `model`; on exit, restore its attention implementation.

    Raises:
        ValueError: If some layer did not call the attention function, so that its result does not follow the rule.
    """
    configs = configs_of(model)
    before = [(config, config._attn_implementation) for config in configs]  # noqa: SLF001 - no public getter
    AttentionInterface.register(NAME, _attention)
    token = _plan.set(plan)
    try:
        for config in configs:
            config._attn_implementation = NAME  # noqa: SLF001
        yield
    finally:
        _plan.reset(token)
        for config, name in before:
            config._attn_implementation = name  # noqa: SLF001
    layers = len(plan.ropes)
    if plan.calls != layers:
        raise ValueError(
            f"model of type {model.config.model_type!r} sent {plan.calls} of its {layers} layers through "
            f"transformers' AttentionInterface: the reference needs a model in which every layer uses it"
        )
