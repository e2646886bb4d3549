"""What the cache must know of a model: where its decoder is, how it rotates, which windows it brings itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from sinkwindow.rotation import Rotary

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["Support", "UnsupportedModelError", "inspect_model", "supports"]

# Rope types whose frequencies switch on the largest position of a call: there, positions must stay below the
# trained length, whereas every other type only ever sees differences.
LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


class UnsupportedModelError(ValueError):
    """The model is not known to stream exactly; the message says why and what to use instead."""


@dataclass(frozen=True, slots=True)
class Family:
    """A model family that is known to work, and how it pairs the rotated channels."""

    interleaved: bool = False


FAMILIES: dict[str, Family] = {
    "gpt_neox": Family(),
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
}


@dataclass(frozen=True, slots=True)
class Support:
    """Whether a model can stream, and why not.

    Attributes:
        ok: Whether ``StreamingCache`` accepts the model.
        reason: One sentence; empty when ``ok``.
    """

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        """Read as the answer itself."""
        return self.ok


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the cache reads off a model once.

    Attributes:
        decoder: The module whose forward receives the cache: hooks go here.
        num_layers: Decoder layers that hold keys and values.
        rotary: How all layers rotate.
        trained_length: ``max_position_embeddings`` [tokens].
        length_dependent: Whether the rotation's frequencies depend on the largest position.
        native_window: The model's own sliding window [tokens], or ``None``.
    """

    decoder: PreTrainedModel
    num_layers: int
    rotary: Rotary
    trained_length: int
    length_dependent: bool
    native_window: int | None


def supports(model: nn.Module) -> Support:
    """Tell whether ``StreamingCache(model)`` works, without touching the model.

    Args:
        model: Any module; only ``transformers`` models of a known family are supported.

    Returns:
        A truthy or falsy answer with its reason.
    """
    try:
        inspect_model(model)
    except UnsupportedModelError as error:
        return Support(ok=False, reason=str(error))
    return Support(ok=True)


def inspect_model(model: nn.Module) -> ModelFacts:
    """Read what the cache needs off a model.

    Raises:
        UnsupportedModelError: The model is not of a family that is known to stream exactly.
    """
    if not isinstance(model, PreTrainedModel):
        msg = f"model must be a transformers PreTrainedModel, got {type(model).__name__}."
        raise UnsupportedModelError(msg)
    decoder = cast("PreTrainedModel", model.base_model)
    config = decoder.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        msg = f"model_type {config.model_type!r} is not known to stream exactly; known to work: {known}."
        raise UnsupportedModelError(msg)
    module = _rotary_module(decoder)
    return ModelFacts(
        decoder=decoder,
        num_layers=config.num_hidden_layers,
        rotary=Rotary(_frequencies(module), family.interleaved),
        trained_length=_trained_length(config, module),
        length_dependent=getattr(module, "rope_type", "default") in LENGTH_DEPENDENT_ROPE,
        native_window=_native_window(config),
    )


def rotary_modules(decoder: nn.Module) -> list[nn.Module]:
    """List the modules that turn positions into cosines and sines."""
    return [module for module in decoder.modules() if isinstance(getattr(module, "inv_freq", None), Tensor)]


def _rotary_module(decoder: PreTrainedModel) -> nn.Module:
    modules = rotary_modules(decoder)
    if len(modules) != 1:
        msg = f"{type(decoder).__name__} has {len(modules)} rotary modules where one was expected."
        raise UnsupportedModelError(msg)
    return modules[0]


def _frequencies(module: nn.Module) -> Tensor:
    """Prefer the frequencies that the module started with: dynamic types overwrite ``inv_freq`` on long calls."""
    original = getattr(module, "original_inv_freq", None)
    return cast("Tensor", original if isinstance(original, Tensor) else module.inv_freq).detach()


def _trained_length(config: PreTrainedConfig, module: nn.Module) -> int:
    """Read how far positions may go; longrope switches its factors beyond the length it was first trained on."""
    rope = getattr(config, "rope_parameters", None) or {}
    if getattr(module, "rope_type", "default") == "longrope":
        return int(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)
    return int(config.max_position_embeddings)


def _native_window(config: PreTrainedConfig) -> int | None:
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        window = getattr(config, "sliding_window", None)
    else:
        kinds = set(layer_types)
        if "sliding_attention" in kinds and len(kinds) > 1:
            msg = f"model_type {config.model_type!r} mixes layers with and without a sliding window of its own."
            raise UnsupportedModelError(msg)
        window = config.sliding_window if "sliding_attention" in kinds else None
    return None if window is None else int(window)
