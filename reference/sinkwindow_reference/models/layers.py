"""Read a model's config: which models are refused, which layers use RoPE, and which have a sliding window."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PretrainedConfig as PreTrainedConfig  # its name before transformers 5.0

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Families that do not use transformers' AttentionInterface: `steps` runs them.
OWN_ATTENTION = frozenset({"bloom", "falcon", "gpt_neox_japanese", "mpt"})
ABSOLUTE = frozenset({"biogpt", "gpt2", "gpt_bigcode", "gpt_neo", "opt", "xglm"})
# Their scores depend on more than unrotated queries and keys and their ranks.
OTHER_SCORES = frozenset({"beam", "doge", "hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text"})
NO_KEYS = frozenset({"falcon_mamba", "mamba", "mamba2", "recurrent_gemma", "rwkv"})
# Families in which only sliding layers use RoPE; the latter ones in all layers if there is no sliding window.
ROPE_IF_SLIDING = frozenset({"afmoe", "cohere2", "cohere2_moe", "flint", "lara_mini"})
ROPE_UNLESS_FULL = frozenset({"exaone4", "exaone_moe", "kolibri1"})
SLIDING, FULL = "sliding_attention", "full_attention"
ATTENDING = (SLIDING, FULL, "hybrid", "hybrid_sliding")
NOT_ATTENDING = ("conv", "linear_attention", "mlp", "moe")  # these keep a state of their own, or none
NO_ROPE = frozenset({"kimi_linear", "nemotron_h"})


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
    if getattr(config, "kv_lora_rank", None) and kind not in NO_ROPE:
        return "caches latent keys and values (MLA), which cannot be rotated"
    if kind in ABSOLUTE:
        return "adds learned absolute positions to its inputs, so that tokens cannot be at their ranks"
    if kind in OTHER_SCORES:
        return "computes scores that depend on more than unrotated queries, keys and their ranks"
    if kind in NO_KEYS:
        return "keeps a state rather than keys and values, so that there is nothing to evict"
    other = set(getattr(config, "layer_types", None) or ()).difference(ATTENDING, NOT_ATTENDING)
    return f"has layers of type {sorted(other)}, which the reference does not support" if other else ""


def has_alibi(config: PreTrainedConfig) -> bool:
    """Return whether the model uses ALiBi, a bias on the scores by distance."""
    return config.model_type in {"bloom", "mpt"} or bool(getattr(config, "alibi", False))


def has_rope(config: PreTrainedConfig, layer: int) -> bool:
    """Return whether a layer uses RoPE.

    SmolLM3 has a flag for each layer, Beam a rotary embedding only for its sliding layers.
    """
    family = config.model_type
    if has_alibi(config) or family in NO_ROPE or (family == "zamba2" and not config.use_mem_rope):
        return False
    if family == "granitemoehybrid" and config.position_embedding_type != "rope":
        return False
    flags = getattr(config, "no_rope_layers", None)  # 1 means RoPE, despite the name
    if flags:
        return bool(flags[layer])
    if getattr(config, "prefix_dense_sliding_window_pattern", 0) == 1 and config.mlp_layer_types[layer] == "dense":
        return True  # Cohere 2 MoE: its first layers
    kind = (getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers)[layer]
    if config.model_type in ROPE_IF_SLIDING or (
        config.model_type in ROPE_UNLESS_FULL and config.sliding_window is not None
    ):
        return bool(kind == SLIDING)
    parameters = getattr(config, "rope_parameters", None) or {}
    return kind not in parameters or parameters[kind] is not None


def own_windows(config: PreTrainedConfig) -> list[int | None]:
    """Return the sliding window of each layer [tokens], None where the rule applies.

    If all layers are sliding, the rule applies to all; `check_layer` then requires its lists to fit the window.
    """
    types = list(attending(config).values())
    mixed = len(set(types)) > 1
    return [config.sliding_window if mixed and "sliding" in kind else None for kind in types]


def attending(config: PreTrainedConfig) -> dict[int, str]:
    """Return the types of the layers that attend, by their index."""
    types = getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers
    return {layer: kind for layer, kind in enumerate(types) if kind in ATTENDING}


def check_lengths(config: PreTrainedConfig, longest: int) -> None:
    """Refuse lists in which the model would scale queries by their rank: here all positions are 0.

    Raises:
        ValueError: If `longest` [tokens] is beyond the length that Ministral 3 was first trained on.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    limit = rope["original_max_position_embeddings"] if "llama_4_scaling_beta" in rope else None
    if limit is not None and longest > limit:
        raise ValueError(f"the model scales queries beyond {limit} tokens, the rule attends to {longest}: lower window")


def last_tokens(num_tokens: int, window: int) -> list[list[int]]:
    """Return the natural indices that each query attends to in a sliding layer, its own included."""
    return [list(range(max(0, token - window + 1), token + 1)) for token in range(num_tokens)]


def configs_of(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Return every config in `model`; layers of a composite model do not use the top one."""
    found = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in found if isinstance(config, PreTrainedConfig)}.values())
