"""What the cache must know of a model: where its decoder is, how each layer rotates, which windows it brings itself."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from sinkwindow.attention.rotation import Rotary
from sinkwindow.model.refusals import parallel_refusal, refusal
from sinkwindow.model.rope import (
    LENGTH_DEPENDENT_ROPE,
    Switch,
    buffer_name,
    frequencies,
    has_alibi,
    has_table,
    pairing,
    rope_types,
    rotary_modules,
    scales_queries,
    trained_length,
)
from sinkwindow.model.state_layers import BOTH, NEITHER, STATE_ONLY, state_refusal, states_of
from sinkwindow.model.versions import INSTALLED, too_old

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SLIDING = "sliding_attention"
FULL = "full_attention"


class UnsupportedModelError(ValueError):
    """The model is not known to stream exactly; the message says why and what to use instead."""


@dataclass(frozen=True, slots=True)
class Family:
    """What a model of a tested family does not tell of itself.

    Attributes:
        only_sliding_rotate: Whether layers without a sliding window have no RoPE, if the configuration names a window.
        own_attention: Whether the model bypasses ``AttentionInterface``: a call is then split where it evicts.
        counts_columns: Whether its ALiBi counts columns, padding included: then there must be none between tokens.
    """

    only_sliding_rotate: bool = False
    own_attention: bool = False
    counts_columns: bool = False


# Families that tests/families.py or tests/verdicts.py compares with the reference; the rest is read off the model.
PLAIN = (
    "apertus", "apertus1p5_text", "arcee", "aria_text", "bitnet", "codegen", "cohere", "cohere_compass_text", "cwm",
    "dbrx", "dots1", "emu3_text_model", "ernie4_5", "ernie4_5_moe", "exaone", "flex_olmo", "gemma", "gemma2",
    "gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "glm", "glm4", "glm4_moe", "gpt_neox",
    "gpt_oss", "gptj", "granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared", "helium",
    "hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2", "jetmoe",
    "laguna", "llama", "mellum", "mimo_v2_flash", "minimax_m2", "ministral", "ministral3", "mistral", "mixtral",
    "modernbert-decoder", "moshi", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "persimmon", "phi",
    "phi3", "phimoe", "qwen2", "qwen2_5_vl_text", "qwen2_moe", "qwen2_vl_text", "qwen3", "qwen3_moe",
    "qwen3_vl_moe_text", "qwen3_vl_text", "sarvam_moe", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2",
    "vaultgemma",
)  # fmt: skip
# The same of tests/hybrids.py: some of their layers keep a state.
HYBRIDS = (
    "bamba", "falcon_h1", "granitemoehybrid", "kimi_linear", "lara_mini", "lfm2", "lfm2_moe", "lfm3", "nemotron_h",
    "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "zamba2", "zaya",
)  # fmt: skip
FAMILIES: dict[str, Family] = {
    **dict.fromkeys((*PLAIN, *HYBRIDS), Family()),
    **dict.fromkeys(
        ("afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe", "flint", "kolibri1", "lara_mini"),
        Family(only_sliding_rotate=True),
    ),
    **dict.fromkeys(("bloom", "falcon", "gpt_neox_japanese"), Family(own_attention=True)),
    "mpt": Family(own_attention=True, counts_columns=True),
}


UNKNOWN = (
    "is not known to stream exactly: no test of this release compares it with the reference. "
    "sinkwindow verify --untested does; docs/verdicts.md lists what is tested."
)


@dataclass(frozen=True, slots=True)
class LayerKind:
    """How a group of layers streams.

    Attributes:
        rotary: How they rotate; without RoPE a rotation of no channels.
        window: Their own sliding window [tokens] in a model that mixes kinds; ``None`` where the stream's rule holds.
        layers: Their indices.
        layer_type: What the model calls them, and the mask that they take.
    """

    rotary: Rotary
    window: int | None
    layers: list[int]
    layer_type: str = FULL


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
        return self.ok


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the cache reads off a model once.

    Attributes:
        num_layers: Decoder layers.
        kinds: The layers by kind; the first one follows the stream's rule.
        own_attention: See ``Family``.
        counts_columns: See ``Family``.
        trained_length: Positions that the model was trained on [tokens]; ``None`` where it knows none.
        length_dependent: Whether positions must stay below it: frequencies depend on the largest, or there is a table.
        has_table: Whether positions, or columns where they are counted, index a table of that length.
        scales_queries: Whether queries are scaled by position beyond that length.
        native_window: The sliding window that all layers share [tokens], or ``None``.
        borrowers: The types of the last layers, which attend to the keys of an earlier one of their type.
        switch: Where stock code changes over to other frequencies, if anywhere.
        changes: Whether frequencies depend on the largest position of a call, of other callers too.
        given: The family by name, for the settings of the cache, if the caller gave it.
        states: How many states each layer keeps that keeps any.
    """

    num_layers: int
    kinds: list[LayerKind]
    own_attention: bool
    counts_columns: bool
    trained_length: int | None
    length_dependent: bool
    has_table: bool
    scales_queries: bool
    native_window: int | None
    borrowers: list[str]
    switch: Switch | None
    changes: bool
    states: dict[int, int]
    given: dict[str, dict[str, bool]]

    @property
    def longest(self) -> int | None:
        """The length that no list may exceed [tokens], ``None`` where there is none."""
        return self.trained_length if self.has_table or self.scales_queries else None


def supports(model: nn.Module, family: Family | None = None) -> Support:
    """Return whether ``StreamingCache(model, family=family)`` works, without touching the model.

    Args:
        model: Any module; only ``transformers`` models of a known family are supported, and what has one for its texts.
        family: What ``sinkwindow_lab.measure.untested.check_untested`` has found, for a model that is not in the table.

    Returns:
        A truthy or falsy answer with its reason.

    Examples:
        >>> supports(torch.nn.Linear(2, 2)).reason
        'model must be a transformers PreTrainedModel, got Linear.'
    """
    try:
        inspect_model(model, family)
    except UnsupportedModelError as error:
        return Support(ok=False, reason=str(error))
    return Support(ok=True)


def inspect_model(model: nn.Module, family: Family | dict[str, bool] | None = None) -> ModelFacts:
    """Read what the cache needs off a model.

    Args:
        model: The model.
        family: Its family, as a dict where a file has kept it, if it is not to be that of its ``model_type``.

    Raises:
        TypeError: The family is no ``Family``.
        UnsupportedModelError: The model is not of a family that is known to stream exactly.
    """
    if not isinstance(model, PreTrainedModel):
        name = type(model).__name__
        raise UnsupportedModelError(f"model must be a transformers PreTrainedModel, got {name}.{_inner(model)}")
    decoder = decoder_of(model)
    config = decoder.config
    given = Family(**family) if isinstance(family, dict) else family
    if given is not None and not isinstance(given, Family):
        raise TypeError(f"family must be a Family, as check_untested of the lab returns it, or None, got {given!r}.")
    known = FAMILIES.get(config.model_type)
    if given is not None and known is not None and given != known:
        raise UnsupportedModelError(f"family must be left out: model_type {config.model_type!r} is known as {known}.")
    family = given or known
    reason = "" if config.model_type in FAMILIES else refusal(decoder)
    if reason or family is None:
        raise UnsupportedModelError(f"model_type {config.model_type!r} {reason or UNKNOWN}")
    kind, outer = config.model_type, model.config.model_type
    old = too_old(kind) or too_old(outer, is_image_text=decoder is not model.base_model)
    if old := old or (too_old(f"{kind}, longrope") if "longrope" in rope_types(decoder) else ""):
        raise UnsupportedModelError(old)
    if _attends_by_itself(decoder) and not family.own_attention:
        raise UnsupportedModelError(
            f"model_type {config.model_type!r} bypasses AttentionInterface in transformers {INSTALLED}, "
            "which it came to later: pip install -U transformers."
        )
    if reason := config_refusal(config) or _changes_scale(decoder):
        raise UnsupportedModelError(reason)
    if reason := state_refusal(decoder, is_hybrid=config.model_type in HYBRIDS) or parallel_refusal(model):
        raise UnsupportedModelError(f"model_type {config.model_type!r} {reason}")
    windows, states = _windows(config), states_of(config)
    if not windows:  # a drafter of Gemma 4
        raise UnsupportedModelError(
            f"model_type {config.model_type!r} has no layer with keys of its own here: give the cache to the model "
            "whose keys it reads."
        )
    kinds = _kinds(decoder, family, windows)
    native = None if None in windows.values() else next(iter(windows.values()))
    length = getattr(config, "original_max_position_embeddings", None)
    changes = bool(rope_types(decoder) & LENGTH_DEPENDENT_ROPE)
    return ModelFacts(
        num_layers=config.num_hidden_layers,
        kinds=kinds,
        own_attention=family.own_attention,
        counts_columns=family.counts_columns or bool(states),
        trained_length=trained_length(config),
        length_dependent=changes or has_table(decoder) or scales_queries(config),
        has_table=family.counts_columns or has_table(decoder),
        scales_queries=scales_queries(config),
        native_window=native,
        borrowers=_borrowers(config),
        switch=None if length is None else Switch(type(decoder).__module__, length),
        changes=changes,
        states=states,
        given={} if given is None else {"family": asdict(given)},
    )


def decoder_of(model: nn.Module) -> PreTrainedModel:
    """Return the module whose forward receives the cache: in an image-text model that of its text model."""
    decoder = cast("PreTrainedModel", model.base_model)
    if isinstance(getattr(decoder.config, "text_config", None), transformers.PretrainedConfig):
        text: object = decoder.get_decoder()  # type: ignore[no-untyped-call]  # transformers is not typed there
        return cast("PreTrainedModel", getattr(text, "base_model", decoder))
    return decoder


def _inner(model: object) -> str:
    """Return advice where a module wraps a model that is supported, as those of PEFT and ``torch.compile`` do."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return " Prompt learning of PEFT puts virtual tokens in front of every call, where a stream has none."
    parts = model.named_modules() if isinstance(model, nn.Module) else ()
    for name, part in parts:
        if isinstance(part, PreTrainedModel) and supports(part):
            return f" It wraps a {type(part).__name__}: pass model.{name}, and call the wrapper as before."
    return ""


def config_refusal(config: PreTrainedConfig) -> str:
    """Return which entry of a configuration a cache cannot serve, empty if none: asked for each call, as it may change.

    Before transformers 5.21 models with a softcap lose it by default.
    """
    everywhere = getattr(config, "use_bidirectional_attention", None) in (True, "all")  # "vision" is for images alone
    if everywhere or getattr(config, "is_causal", None) is False:
        return (
            f"model_type {config.model_type!r} with is_causal=False or use_bidirectional_attention lets tokens attend "
            "to later ones, which a StreamingCache never does: use a DynamicCache."
        )
    if getattr(config, "attn_logit_softcapping", None) is not None and config._attn_implementation == "sdpa":  # noqa: SLF001
        return (
            f"model_type {config.model_type!r} has an attn_logit_softcapping, which attn_implementation='sdpa' leaves "
            "out: load it with attn_implementation='eager'."
        )
    return ""


def _changes_scale(decoder: PreTrainedModel) -> str:
    """Return what is wrong with a Phi-3.5-MoE that has other frequencies than longrope."""
    others = rope_types(decoder) - {"default", "longrope"}
    if decoder.config.model_type != "phimoe" or not others:
        return ""
    return (
        f"model_type 'phimoe' with rope type {', '.join(others)}, other than default and longrope, changes its scale "
        "at original_max_position_embeddings: use a DynamicCache."
    )


def _attends_by_itself(decoder: nn.Module) -> bool:
    """Return whether none of the files that define a model's parts uses ``AttentionInterface``.

    That depends on the release: GPT-J and CodeGen came to it with transformers 5.24.
    """
    files = {type(part).__module__ for part in decoder.modules() if part is not decoder}
    return not any(hasattr(sys.modules.get(file), "ALL_ATTENTION_FUNCTIONS") for file in files)


def layer_devices(decoder: PreTrainedModel, count: int) -> list[torch.device | None]:
    """Return the device of each decoder layer, ``None`` where it is off-loaded or cannot be told."""
    stacks = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    found = [next(layer.parameters(), None) for layer in stacks[0]] if stacks else [None] * count
    return [None if weight is None or weight.is_meta else weight.device for weight in found]


def _windows(config: PreTrainedConfig) -> dict[int, int | None]:
    """Return the own sliding window of each layer that attends to keys of its own [tokens], ``None`` without one."""
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if layer_types is None:
        return dict.fromkeys(range(config.num_hidden_layers), window)
    layer_types = layer_types[: len(layer_types) - len(_borrowers(config))]
    unknown = set(layer_types) - {SLIDING, FULL, *BOTH, *STATE_ONLY, *NEITHER}
    if unknown:
        raise UnsupportedModelError(
            f"model_type {config.model_type!r} has layers of type {', '.join(sorted(unknown))}, which "
            "are not known to stream: use a DynamicCache."
        )
    attending = {layer: kind for layer, kind in enumerate(layer_types) if kind not in STATE_ONLY + NEITHER}
    return {layer: window if "sliding" in kind else None for layer, kind in attending.items()}


def _borrowers(config: PreTrainedConfig) -> list[str]:
    """Return the types of the last layers, which attend to the keys of an earlier layer of their type (Gemma 3n, 4)."""
    count = getattr(config, "num_kv_shared_layers", None) or 0
    return list(config.layer_types[-count:]) if count else []


def _kinds(decoder: PreTrainedModel, family: Family, windows: dict[int, int | None]) -> list[LayerKind]:
    """Group the layers; where all of them slide, the stream's rule takes the place of their window."""
    slides = any(window is not None for window in windows.values())
    mixed = slides and None in windows.values()
    only_sliding = family.only_sliding_rotate and getattr(decoder.config, "sliding_window", None) is not None
    types = getattr(decoder.config, "layer_types", None) or [FULL] * len(windows)
    marked: dict[Any, bool] = {}
    for part in decoder.modules():
        if hasattr(part, "use_rope") or getattr(part, "force_rope", False):
            marked[part.layer_idx] = bool(getattr(part, "use_rope", True))
    groups: dict[tuple[int | None, str, bool], list[int]] = {}
    for layer, window in windows.items():
        rotates = marked.get(layer, not (only_sliding and window is None))
        groups.setdefault((window if mixed else None, types[layer], rotates), []).append(layer)
    kinds = []
    for (window, layer_type, rotates), layers in groups.items():
        rotary = _rotary(decoder, layer_type) if rotates else NO_ROPE
        kinds.append(LayerKind(rotary, window, layers, layer_type))
    return sorted(kinds, key=lambda kind: kind.window is not None)


NO_ROPE = Rotary(torch.zeros(0, dtype=torch.float32, device="cpu"))


def _rotary(decoder: PreTrainedModel, layer_type: str) -> Rotary:
    """Return how a type of layer rotates: not at all with ALiBi, or where it has no frequencies and others do."""
    modules = rotary_modules(decoder)
    names = {module: buffer_name(module, layer_type) for module in modules}
    # A rotary module may have frequencies for other types of layers only.
    found = [frequencies(module, name) for module, name in names.items() if hasattr(module, name)]
    if has_alibi(decoder.config) or ((modules or states_of(decoder.config)) and not found):
        return NO_ROPE
    if not found:
        raise UnsupportedModelError(f"{type(decoder).__name__} has no rotary module with frequencies.")
    if any(not torch.equal(found[0], other.to(found[0].device)) for other in found[1:]):
        raise UnsupportedModelError(
            f"{type(decoder).__name__} has {len(modules)} rotary modules that differ where one was expected."
        )
    pairs = pairing(decoder)
    if pairs is None:
        raise UnsupportedModelError(f"{type(decoder).__name__} has no function that shows how it rotates.")
    return Rotary(found[0] * pairs.direction, pairs.interleaved)
