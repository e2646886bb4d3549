"""What each layer of a model is: whether it rotates, which window it brings itself; and which models are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PreTrainedConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Families that call their own attention rather than transformers' AttentionInterface: `steps.py` runs them.
OWN_ATTENTION = frozenset({"bloom", "falcon", "mpt"})
ABSOLUTE = frozenset({"biogpt", "gpt2", "gpt_bigcode", "gpt_neo", "opt", "xglm"})
NO_KEYS = frozenset({"falcon_mamba", "mamba", "mamba2", "recurrent_gemma", "rwkv"})
SLIDING, FULL = "sliding_attention", "full_attention"


def check_model(config: PreTrainedConfig) -> None:
    """Refuse a model that the rule does not fit.

    Raises:
        ValueError: If its positions, its keys or its layers are not of a kind that the rule speaks of.
    """
    reason = _refusal(config, config.model_type)
    if reason:
        raise ValueError(f"model of type {config.model_type!r} {reason}: the rule does not fit, take another model")


def _refusal(config: PreTrainedConfig, kind: str) -> str:
    """Return why a model is refused, empty if it is not."""
    if config.is_encoder_decoder:
        return "is an encoder-decoder, whose decoder does not attend to its own tokens alone"
    if getattr(config, "kv_lora_rank", None):
        return "caches latent keys and values (MLA), not keys that a rotation could move"
    if kind in ABSOLUTE:
        return "adds learned absolute positions to its inputs, so that a token has no rank"
    if kind in NO_KEYS:
        return "keeps a state rather than keys and values, so that there is nothing to evict"
    other = set(getattr(config, "layer_types", None) or ()) - {SLIDING, FULL}
    return f"has layers of type {sorted(other)}, of which the reference knows nothing" if other else ""


def has_alibi(config: PreTrainedConfig) -> bool:
    """Tell whether distances enter as a bias on the scores, so that the order of the keys says everything."""
    return config.model_type in {"bloom", "mpt"} or bool(getattr(config, "alibi", False))


def has_rope(config: PreTrainedConfig, layer: int) -> bool:
    """Tell whether a layer rotates.

    SmolLM3 marks each layer, Cohere 2 and EXAONE 4 rotate in sliding layers only (EXAONE 4 everywhere if none slides).
    """
    if has_alibi(config):
        return False
    marks = getattr(config, "no_rope_layers", None)  # 1 where there is RoPE, whatever the name suggests
    if marks:
        return bool(marks[layer])
    if config.model_type == "cohere2" or (config.model_type == "exaone4" and config.sliding_window is not None):
        return bool(config.layer_types[layer] == SLIDING)
    return True


def own_windows(config: PreTrainedConfig) -> list[int | None]:
    """Return each layer's own sliding window [tokens], None where the rule holds.

    A model whose every layer slides follows the rule as if none did: the rule's list then has to fit that window.
    """
    types = getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers
    mixed = len(set(types)) > 1
    return [config.sliding_window if mixed and kind == SLIDING else None for kind in types]


def last_tokens(num_tokens: int, window: int) -> list[list[int]]:
    """Return what each query sees under a layer's own window, which counts the query's token: no sinks, no buffer."""
    return [list(range(max(0, token - window + 1), token + 1)) for token in range(num_tokens)]


def configs_of(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Return every config below `model`; in a composite model a layer reads another than the top one."""
    found = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in found if isinstance(config, PreTrainedConfig)}.values())
