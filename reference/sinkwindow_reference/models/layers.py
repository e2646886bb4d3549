"""Read a model's config: which models are refused, which layers use RoPE, and which have a sliding window."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PretrainedConfig as PreTrainedConfig  # its name before transformers 5.0

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Families that do not use transformers' AttentionInterface: `steps` runs them.
OWN_ATTENTION = frozenset({"bloom", "falcon", "mpt"})
ABSOLUTE = frozenset({"biogpt", "gpt2", "gpt_bigcode", "gpt_neo", "opt", "xglm"})
NO_KEYS = frozenset({"falcon_mamba", "mamba", "mamba2", "recurrent_gemma", "rwkv"})
SLIDING, FULL = "sliding_attention", "full_attention"


def check_model(config: PreTrainedConfig) -> None:
    """Refuse a model to which the rule does not apply.

    Raises:
        ValueError: If the rule is not defined for its positions, its keys or its layers.
    """
    reason = _refusal(config, config.model_type)
    if reason:
        raise ValueError(f"model of type {config.model_type!r} {reason}: the rule does not fit, use another model")


def _refusal(config: PreTrainedConfig, kind: str) -> str:
    """Return why a model is refused, empty if it is not."""
    if config.is_encoder_decoder:
        return "is an encoder-decoder, and its decoder attends to more than its own tokens"
    if getattr(config, "kv_lora_rank", None):
        return "caches latent keys and values (MLA), which cannot be rotated"
    if kind in ABSOLUTE:
        return "adds learned absolute positions to its inputs, so that tokens cannot be at their ranks"
    if kind in NO_KEYS:
        return "keeps a state rather than keys and values, so that there is nothing to evict"
    other = set(getattr(config, "layer_types", None) or ()) - {SLIDING, FULL}
    return f"has layers of type {sorted(other)}, which the reference does not support" if other else ""


def has_alibi(config: PreTrainedConfig) -> bool:
    """Return whether the model uses ALiBi, a bias on the scores by distance."""
    return config.model_type in {"bloom", "mpt"} or bool(getattr(config, "alibi", False))


def has_rope(config: PreTrainedConfig, layer: int) -> bool:
    """Return whether a layer uses RoPE.

    SmolLM3 has a flag for each layer. Cohere 2 and EXAONE 4 use RoPE only in sliding layers (EXAONE 4 in all if none
    is sliding).
    """
    if has_alibi(config):
        return False
    flags = getattr(config, "no_rope_layers", None)  # 1 means RoPE, despite the name
    if flags:
        return bool(flags[layer])
    if config.model_type == "cohere2" or (config.model_type == "exaone4" and config.sliding_window is not None):
        return bool(config.layer_types[layer] == SLIDING)
    return True


def own_windows(config: PreTrainedConfig) -> list[int | None]:
    """Return the sliding window of each layer [tokens], None where the rule applies.

    If all layers are sliding, the rule applies to all; `check_layer` then requires its lists to fit the window.
    """
    types = getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers
    mixed = len(set(types)) > 1
    return [config.sliding_window if mixed and kind == SLIDING else None for kind in types]


def last_tokens(num_tokens: int, window: int) -> list[list[int]]:
    """Return the natural indices that each query attends to in a sliding layer, its own included."""
    return [list(range(max(0, token - window + 1), token + 1)) for token in range(num_tokens)]


def configs_of(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Return every config in `model`; layers of a composite model do not use the top one."""
    found = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in found if isinstance(config, PreTrainedConfig)}.values())
