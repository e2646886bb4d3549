"""Read a model's rotary embeddings: the frequencies of each layer and how its channels form pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sinkwindow_reference.models.layers import attending, check_model, has_rope

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Families whose RoPE pairs the channels (2i, 2i + 1); all others pair (i, i + pairs). Each is tested.
INTERLEAVED = frozenset(
    {"codegen", "cohere", "cohere2", "cohere2_moe", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "gptj", "helium"}
)
BACKWARDS = frozenset({"nanochat"})  # rotates by minus its angles


class Rope(NamedTuple):
    """The rotary embedding of a layer.

    Attributes:
        inv_freq: Angle per position of each pair of channels `[pairs]` [rad]; empty if the layer does not rotate.
        interleaved: How channels form pairs, see `rotate`.
    """

    inv_freq: torch.Tensor
    interleaved: bool


def ropes_of(model: PreTrainedModel) -> list[Rope]:
    """Return the rotary embedding of each layer of `model` that attends.

    Raises:
        ValueError: If the model is refused (`check_model`), has neither RoPE nor ALiBi, or its rotary modules differ.
    """
    config = model.config.get_text_config()
    check_model(config)
    sign = -1 if config.model_type in BACKWARDS else 1
    ropes = []
    for layer, kind in attending(config).items():
        frequencies = _layer_frequencies(model, kind) if has_rope(config, layer) else torch.zeros(0)
        ropes.append(Rope(sign * frequencies, config.model_type in INTERLEAVED))
    return ropes


def _layer_frequencies(model: PreTrainedModel, layer_type: str) -> torch.Tensor:
    """Return the frequencies `[pairs]` of a layer that rotates."""
    found = [freq for module in model.modules() if (freq := _frequencies(module, layer_type)) is not None]
    if not found:
        raise ValueError(
            f"model of type {model.config.model_type!r} has no module with inv_freq: the reference supports only "
            "rotary position embeddings (RoPE) and ALiBi"
        )
    if any(not torch.equal(found[0], other) for other in found):
        raise ValueError(
            f"model of type {model.config.model_type!r} has rotary modules with different frequencies: the reference "
            "supports one for each type of layer"
        )
    return found[0]


def _frequencies(module: torch.nn.Module, layer_type: str) -> torch.Tensor | None:
    """Return the frequencies `[pairs]` of a module, None if it is not rotary.

    Dynamic rope types overwrite inv_freq after a long call but keep the original; others may have an original too, and
    do not rotate by it after a cast. Gemma 3 has one for each type of layer. GPT-J and CodeGen store a table of sines:
    plain RoPE with base 10,000.
    """
    if hasattr(module, "embed_positions") and hasattr(module, "pos_embd_dim"):
        width = int(module.pos_embd_dim)  # type: ignore[arg-type]  # nn.Module types its attributes as tensors
        return torch.as_tensor(1.0 / (10_000 ** (torch.arange(0, width, 2, dtype=torch.int64) / width)))
    kind: Any = getattr(module, "rope_type", "default")
    kind = kind.get(layer_type) if isinstance(kind, dict) else kind
    kept = ("original_inv_freq", "inv_freq") if kind in {"dynamic", "longrope"} else ("inv_freq",)
    for name in [*(f"{layer_type}_{name}" for name in kept), *kept]:
        chosen = getattr(module, name, None)
        if isinstance(chosen, torch.Tensor):
            return chosen
    return None
