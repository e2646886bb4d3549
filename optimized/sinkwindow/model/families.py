"""What the cache must know of a model: where its decoder is, how each layer rotates, which windows it brings itself."""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from sinkwindow.attention.rotation import Rotary
from sinkwindow.model.versions import too_old

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedConfig

# Rope types whose frequencies switch on the largest position of a call: there, positions must stay below the
# trained length, whereas every other type only ever sees differences.
LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})
TABLE = "embed_positions"  # sines and cosines by position, which positions must not outrun
SLIDING = "sliding_attention"
FULL = "full_attention"


class UnsupportedModelError(ValueError):
    """The model is not known to stream exactly; the message says why and what to use instead."""


def _all_layers(config: PreTrainedConfig, layer: int) -> bool:  # noqa: ARG001
    return True


def _marked_layers(config: PreTrainedConfig, layer: int) -> bool:
    """SmolLM3: ``no_rope_layers`` is 1 where there is RoPE."""
    return bool(config.no_rope_layers[layer])


def _sliding_layers(config: PreTrainedConfig, layer: int) -> bool:
    """Cohere 2: only layers with a sliding window rotate."""
    return bool(config.layer_types[layer] == SLIDING)


def _unless_alibi(config: PreTrainedConfig, layer: int) -> bool:  # noqa: ARG001
    return not config.alibi


def _no_layers(config: PreTrainedConfig, layer: int) -> bool:  # noqa: ARG001
    return False


@dataclass(frozen=True, slots=True)
class Family:
    """A model family that is known to work.

    Attributes:
        interleaved: Whether RoPE pairs channels ``(2 i, 2 i + 1)`` rather than halves.
        rotates: Whether a layer has RoPE; the others have no positions, or ALiBi, which follows the order of the keys.
        own_attention: Whether the model bypasses ``AttentionInterface``: a call is then split where it evicts.
        counts_columns: Whether its ALiBi counts columns, padding included: then there must be none between tokens.
    """

    interleaved: bool = False
    rotates: Callable[[PreTrainedConfig, int], bool] = _all_layers
    own_attention: bool = False
    counts_columns: bool = False


FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        ("gemma", "gemma2", "gemma3_text", "gpt_neox", "gpt_oss", "granite", "llama", "mistral", "mixtral", "nemotron"),
        Family(),
    ),
    **dict.fromkeys(
        ("olmo2", "persimmon", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "stablelm", "starcoder2"), Family()
    ),
    **dict.fromkeys(("codegen", "cohere", "ernie4_5", "glm", "glm4", "gptj"), Family(interleaved=True)),
    "bloom": Family(rotates=_no_layers, own_attention=True),
    "cohere2": Family(interleaved=True, rotates=_sliding_layers),
    "falcon": Family(rotates=_unless_alibi, own_attention=True),
    "mpt": Family(rotates=_no_layers, own_attention=True, counts_columns=True),
    "smollm3": Family(rotates=_marked_layers),
}


@dataclass(frozen=True, slots=True)
class LayerKind:
    """How a group of layers streams.

    Attributes:
        rotary: How they rotate; without RoPE a rotation of no channels.
        window: Their own sliding window [tokens] in a model that mixes kinds; ``None`` where the stream's rule holds.
        layers: Their indices.
    """

    rotary: Rotary
    window: int | None
    layers: list[int]


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
        kinds: The layers by kind; the first one follows the stream's rule.
        own_attention: See ``Family``.
        counts_columns: See ``Family``.
        trained_length: Positions that the model was trained on [tokens]; ``None`` where it knows none.
        length_dependent: Whether positions must stay below it: frequencies depend on the largest, or there is a table.
        has_table: Whether positions, or columns where they are counted, index a table of that length.
        native_window: The sliding window that all layers share [tokens], or ``None``.
    """

    decoder: PreTrainedModel
    num_layers: int
    kinds: list[LayerKind]
    own_attention: bool
    counts_columns: bool
    trained_length: int | None
    length_dependent: bool
    has_table: bool
    native_window: int | None


def supports(model: nn.Module) -> Support:
    """Return whether ``StreamingCache(model)`` works, without touching the model.

    Args:
        model: Any module; only ``transformers`` models of a known family are supported.

    Returns:
        A truthy or falsy answer with its reason.

    Examples:
        >>> supports(torch.nn.Linear(2, 2)).reason
        'model must be a transformers PreTrainedModel, got Linear.'
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
        name = type(model).__name__
        raise UnsupportedModelError(f"model must be a transformers PreTrainedModel, got {name}.{_inner(model)}")
    decoder = cast("PreTrainedModel", model.base_model)
    config = decoder.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(_refusal(config) + _inner(model))
    if reason := too_old(config.model_type):
        raise UnsupportedModelError(reason)
    if _attends_by_itself(decoder) and not family.own_attention:
        raise UnsupportedModelError(
            f"model_type {config.model_type!r} bypasses AttentionInterface in transformers {transformers.__version__}, "
            "which it came to later: pip install -U transformers."
        )
    windows = _windows(config)
    kinds = _kinds(decoder, family, windows)
    return ModelFacts(
        decoder=decoder,
        num_layers=config.num_hidden_layers,
        kinds=kinds,
        own_attention=family.own_attention,
        counts_columns=family.counts_columns,
        trained_length=_trained_length(config),
        length_dependent=bool(_rope_types(decoder) & LENGTH_DEPENDENT_ROPE) or _has_table(decoder),
        has_table=family.counts_columns or _has_table(decoder),
        native_window=windows[0] if windows[0] is not None and None not in windows else None,
    )


def _refusal(config: PreTrainedConfig) -> str:
    """Return why a model is not supported, as precisely as its configuration allows."""
    name = f"model_type {config.model_type!r}"
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder: its decoder attends to an encoder, and a stream of tokens has none."
    if getattr(config, "kv_lora_rank", None):
        return f"{name} caches latent keys and values (MLA), whose sinks cannot be moved by rotating keys."
    if config.model_type in {"gpt2", "gpt_neo", "opt", "gpt_bigcode", "biogpt", "xglm"}:
        return f"{name} has absolute position embeddings in its inputs: cached tokens cannot move to new ranks."
    if config.model_type in {"mamba", "mamba2", "rwkv", "falcon_mamba", "recurrent_gemma"}:
        return f"{name} keeps a state of fixed size instead of keys and values: it streams without a cache like this."
    return f"{name} is not known to stream exactly; known to work: {', '.join(sorted(FAMILIES))}."


def _inner(model: nn.Module) -> str:
    """Return advice where a model wraps one that is supported, as PEFT, ``torch.compile`` and image-text models do."""
    parts = model.named_modules() if hasattr(model, "named_modules") else ()
    for name, part in parts:
        if part is not model and isinstance(part, PreTrainedModel) and part.config.model_type in FAMILIES:
            return f" It wraps a {type(part).__name__}: pass model.{name}, and call the wrapper as before."
    return ""


def _attends_by_itself(decoder: nn.Module) -> bool:
    """Return whether none of the files that define a model's parts uses ``AttentionInterface``.

    That depends on the release: GPT-J and CodeGen came to it with transformers 5.24.
    """
    files = {type(part).__module__ for part in decoder.modules() if part is not decoder}
    return not any(hasattr(sys.modules.get(file), "ALL_ATTENTION_FUNCTIONS") for file in files)


def rotary_modules(decoder: nn.Module) -> list[nn.Module]:
    """List the modules that turn positions into cosines and sines."""
    return [module for module in decoder.modules() if _frequency_names(module)]


def _frequency_names(module: nn.Module) -> list[str]:
    """Name the buffers of frequencies: one, or one for each type of layer."""
    names = [name for name, _ in module.named_buffers(recurse=False) if name.endswith(("inv_freq", TABLE))]
    return [name for name in names if "original" not in name]


def frequencies(module: nn.Module, layer_type: str | None = None) -> Tensor:
    """Return a rotary module's frequencies, ``[pairs]``, for a type of layer where they differ.

    GPT-J and CodeGen keep a table of sines and cosines instead, made from these frequencies.
    """
    name = _buffer_name(module, layer_type)
    if name == TABLE:
        width = cast("int", module.pos_embd_dim)
        return 1.0 / (10_000 ** (torch.arange(0, width, 2, dtype=torch.int64, device="cpu") / width))
    return cast("Tensor", getattr(module, name)).detach()


def _buffer_name(module: nn.Module, layer_type: str | None) -> str:
    """Return the buffer that a rotary module's angles come from.

    The one that it started with is preferred: dynamic types overwrite theirs on long calls.
    """
    if hasattr(module, TABLE):
        return TABLE
    prefix = f"{layer_type}_" if hasattr(module, f"{layer_type}_inv_freq") else ""
    original = f"{prefix}original_inv_freq"
    return original if isinstance(getattr(module, original, None), Tensor) else f"{prefix}inv_freq"


@dataclass(slots=True, eq=False)
class Frequencies:
    """The buffer that a rotary module's angles come from, as it was once.

    Attributes:
        module: The module.
        name: The buffer's name.
        buffer: The buffer, or an equal one that has taken its place.
    """

    module: weakref.ref[nn.Module]
    name: str
    buffer: Tensor

    def are_unchanged(self) -> bool:
        """Return whether the module still has these values: a move to another device keeps them, a cast need not."""
        module = self.module()
        now = getattr(module, self.name, None)
        if now is self.buffer or not isinstance(now, Tensor) or now.is_meta:  # meta: off-loaded until the module runs
            return True
        if not torch.equal(now.to("cpu", torch.float64), self.buffer.to("cpu", torch.float64)):
            return False
        self.buffer = now
        return True


def frequencies_of(decoder: nn.Module) -> list[Frequencies]:
    """Return what all rotary modules' angles come from."""
    found = []
    for module in rotary_modules(decoder):
        for name in _frequency_names(module):
            original = name.replace("inv_freq", "original_inv_freq")
            first = original if isinstance(getattr(module, original, None), Tensor) else name
            found.append(Frequencies(weakref.ref(module), first, getattr(module, first)))
    return found


def layer_devices(decoder: PreTrainedModel, count: int) -> list[torch.device | None]:
    """Return the device of each decoder layer, ``None`` where it is off-loaded or cannot be told."""
    stacks = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    found = [next(layer.parameters(), None) for layer in stacks[0]] if stacks else [None] * count
    return [None if weight is None or weight.is_meta else weight.device for weight in found]


def _windows(config: PreTrainedConfig) -> list[int | None]:
    """Return each layer's own sliding window [tokens], ``None`` where it has none."""
    count = config.num_hidden_layers
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if layer_types is None:
        return [window] * count
    unknown = set(layer_types) - {SLIDING, FULL}
    if unknown:
        raise UnsupportedModelError(
            f"model_type {config.model_type!r} has layers of type {', '.join(sorted(unknown))}, not known to stream."
        )
    return [window if kind == SLIDING else None for kind in layer_types]


def _kinds(decoder: PreTrainedModel, family: Family, windows: list[int | None]) -> list[LayerKind]:
    """Group the layers; where all of them slide, the stream's rule takes the place of their window."""
    mixed = None in windows and any(window is not None for window in windows)
    config = decoder.config
    groups: dict[tuple[int | None, bool], list[int]] = {}
    for layer, window in enumerate(windows):
        groups.setdefault((window if mixed else None, family.rotates(config, layer)), []).append(layer)
    kinds = []
    for (window, rotates), layers in groups.items():
        layer_type = FULL if windows[layers[0]] is None else SLIDING
        kinds.append(LayerKind(_rotary(decoder, family, layer_type, rotates), window, layers))
    return sorted(kinds, key=lambda kind: kind.window is not None)


def _rotary(decoder: PreTrainedModel, family: Family, layer_type: str, rotates: bool) -> Rotary:  # noqa: FBT001
    if not rotates:
        return Rotary(torch.zeros(0, device="cpu"))
    modules = rotary_modules(decoder)
    if not modules:
        raise UnsupportedModelError(f"{type(decoder).__name__} has no rotary module with frequencies.")
    found = [frequencies(module, layer_type) for module in modules]
    if any(not torch.equal(found[0], other) for other in found[1:]):
        raise UnsupportedModelError(
            f"{type(decoder).__name__} has {len(modules)} rotary modules that differ where one was expected."
        )
    return Rotary(found[0], family.interleaved)


def _rope_types(decoder: PreTrainedModel) -> set[str]:
    types: set[str] = set()
    for module in rotary_modules(decoder):
        kind = getattr(module, "rope_type", "default")
        types.update(kind.values() if isinstance(kind, dict) else (kind,))
    return types


def _has_table(decoder: PreTrainedModel) -> bool:
    return any(hasattr(module, TABLE) for module in rotary_modules(decoder))


def _trained_length(config: PreTrainedConfig) -> int | None:
    """Read how far positions may go; longrope switches its factors beyond the length it was first trained on."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return int(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    return None if length is None else int(length)
