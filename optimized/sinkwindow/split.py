"""Models that attend by themselves get a call in pieces that end where it evicts.

Within a piece all queries see one list, which the model's own causal mask describes. The pieces before the last run
inside the decoder's pre-hook; the last one is the call itself, and the post-hook puts the outputs together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sinkwindow.cache import StreamingCache
    from sinkwindow.stream import Snapshot

__all__ = ["Pieces", "run_ahead"]


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """What has run of a split call.

    Attributes:
        cache: The cache that all pieces feed.
        before: Its content before the call, for a call that fails half-way.
        outputs: Of the pieces before the last.
    """

    cache: StreamingCache
    before: Snapshot
    outputs: list[Any]

    def joined(self, last: Any) -> Any:
        """Put the pieces' outputs together: hidden states along the tokens, the rest as the last piece has it."""
        if not isinstance(last, ModelOutput):
            hidden = torch.cat([cast("Tensor", output[0]) for output in (*self.outputs, last)], dim=1)
            return (hidden, *last[1:])
        outputs = (*self.outputs, last)
        last["last_hidden_state"] = torch.cat([output["last_hidden_state"] for output in outputs], dim=1)
        if "hidden_states" in last:
            layers = zip(*(output["hidden_states"] for output in outputs), strict=True)
            last["hidden_states"] = tuple(torch.cat(states, dim=1) for states in layers)
        return last


def run_ahead(
    decoder: PreTrainedModel, cache: StreamingCache, kwargs: dict[str, Any]
) -> tuple[Pieces | None, dict[str, Any]]:
    """Run all pieces of a call but the last.

    Args:
        decoder: The decoder, about to run.
        cache: The call's cache.
        kwargs: The call's arguments by name.

    Returns:
        What has run, ``None`` if the call needs no splitting, and the arguments of the last piece.
    """
    cut = cache.first_cut(decoder, kwargs)
    if cut is None:
        return None, kwargs
    pieces = Pieces(cache, cache.snapshot(), [])
    try:
        while cut is not None:
            head, kwargs = _split(kwargs, cut, cache.get_seq_length())
            pieces.outputs.append(decoder(**head))
            cut = cache.first_cut(decoder, kwargs)
    except BaseException:
        cache.restore(pieces.before)
        raise
    return pieces, kwargs


def _split(kwargs: dict[str, Any], cut: int, seen_columns: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a call's tokens and mask after ``cut`` columns; positions are the cache's business anyway."""
    name = "input_ids" if kwargs.get("input_ids") is not None else "inputs_embeds"
    tokens = kwargs[name]
    columns = tokens.shape[1]
    head = kwargs | {"position_ids": None, name: tokens[:, :cut]}
    tail = kwargs | {"position_ids": None, name: tokens[:, cut:]}
    mask = kwargs.get("attention_mask")
    if mask is not None:
        new = mask[:, -columns:]
        past = mask[:, :-columns] if mask.shape[1] == seen_columns + columns else mask[:, :0]
        head["attention_mask"] = torch.cat((past, new[:, :cut]), dim=1)
        tail["attention_mask"] = mask if past.shape[1] else new[:, cut:]
    return head, tail
