"""Read a model's rotary embedding: its frequencies and how it pairs the channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Families whose RoPE pairs the channels (2i, 2i + 1); all others pair (i, i + pairs). Tested one by one.
INTERLEAVED = frozenset({"cohere", "ernie4_5", "glm", "glm4", "helium"})
# Families that have frequencies and still cannot run under the reference.
NO_ROPE_SOMEWHERE = "leaves RoPE out of some layers without saying which"
REFUSED = {
    **dict.fromkeys(("cohere2", "cohere2_moe", "exaone4", "exaone_moe", "llama4", "llama4_text"), NO_ROPE_SOMEWHERE),
    "falcon": "calls its own attention rather than transformers' AttentionInterface",
}


class Rope(NamedTuple):
    """What the reference needs to know to rotate as the model does.

    Attributes:
        inv_freq: Angle per position of each pair of channels `[pairs]` [rad].
        interleaved: The pairing of channels, see `rotate`.
    """

    inv_freq: torch.Tensor
    interleaved: bool


def rope_of(model: PreTrainedModel) -> Rope:
    """Return the rotary embedding of `model`.

    Raises:
        ValueError: If the model has no rotary module, several that differ, or a type that is refused.
    """
    found = [_frequencies(m) for m in model.modules() if isinstance(getattr(m, "inv_freq", None), torch.Tensor)]
    kind = model.config.model_type
    if not found:
        raise ValueError(
            f"model of type {kind!r} has no module with inv_freq: only rotary position embeddings (RoPE) have ranks"
        )
    if kind in REFUSED:
        raise ValueError(f"model of type {kind!r} {REFUSED[kind]}: the reference cannot follow, take another model")
    if any(not torch.equal(found[0], other) for other in found):
        raise ValueError(
            f"model of type {kind!r} has layers with different RoPE frequencies: the reference knows one per model"
        )
    return Rope(found[0], kind in INTERLEAVED)


def _frequencies(module: torch.nn.Module) -> torch.Tensor:
    """Return `[pairs]`; dynamic rope types overwrite inv_freq after a long call but keep the original."""
    original = getattr(module, "original_inv_freq", None)
    chosen = original if isinstance(original, torch.Tensor) else module.inv_freq
    if not isinstance(chosen, torch.Tensor):
        raise TypeError(f"inv_freq of {type(module).__name__} must be a tensor, got {type(chosen).__name__}")
    return chosen
