"""Why a model cannot stream, as precisely as its modules and its configuration tell."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from sinkwindow.model.state_layers import OWN_STATE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from transformers import PreTrainedModel

INSTEAD: Final = "use a DynamicCache."
# Modules and buffers that hold one vector for each absolute position.
POSITIONS: Final = re.compile(r"(^|\.)(wpe|pos_encoding|positions?_embed\w*|embed_positions)(\.|$)")
OTHER_INPUTS: Final = re.compile(r"vision|image|audio|speech")  # in names of modules
RELATIVE: Final = re.compile(r"relative|rel_attn$|position_bias$")
# What cannot be read off a model.
NAMED: Final = {
    **OWN_STATE,
    "beam": f"scales the queries of its layers without RoPE by their position in the whole text: {INSTEAD}",
    "blt": f"attends to patches of bytes, whose ends later bytes decide: {INSTEAD}",
    "diffllama": f"attends twice in each layer, which the reference does not, so nothing proves it exact: {INSTEAD}",
    "doge": f"makes a bias of the cached values and adds it to its mask: {INSTEAD}",
    **dict.fromkeys(
        ("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text"),
        f"scales channels of queries and keys after rotating them, so that scores depend on positions: {INSTEAD}",
    ),
}
LOOPS: Final = ("loop_num_passes", "n_recurrent_loops")  # in configurations of models that run layers again
INDEXES: Final = re.compile("index|sparse|compressed")  # in types of layers that choose what they attend to
KEY_PROJECTIONS: Final = ("k_proj", "qkv_proj", "query_key_value")  # in plans of tensor parallelism
INDEX_SIZES: Final = ("index_topk", "index_topk_blocks")


def refusal(decoder: PreTrainedModel) -> str:
    """Return what about a model does not stream, and what to use instead; empty if nothing is known of it.

    Args:
        decoder: The module whose forward receives the cache.
    """
    return next(_reasons(decoder), "")


def _reasons(decoder: PreTrainedModel) -> Iterator[str]:  # noqa: C901 - a list, the most telling ones first
    config = decoder.config
    types = list(getattr(config, "layer_types", None) or ())
    names = [name for name, _ in (*decoder.named_modules(), *decoder.named_buffers())]
    text = [name for name in names if not OTHER_INPUTS.search(name)]
    if getattr(config, "is_encoder_decoder", False):
        yield "is an encoder-decoder: its decoder attends to an encoder, and a stream of tokens has none."
    if config.model_type in NAMED:
        yield NAMED[config.model_type]
    if _some(decoder, "kv_lora_rank"):
        yield f"caches latent keys and values (MLA), whose sinks cannot be moved by rotating keys: {INSTEAD}"
    if any(map(POSITIONS.search, text)) or hasattr(decoder, "pos_encoding"):
        yield f"has absolute position embeddings in its inputs: cached tokens cannot move to new ranks; {INSTEAD}"
    if any(map(INDEXES.search, types)) or any(hasattr(config, name) for name in INDEX_SIZES):
        yield f"chooses the tokens to attend to by an index (sparse attention), which cannot evict: {INSTEAD}"
    if "chunked_attention" in types:
        yield f"attends within chunks of the text (chunked_attention), and a stream evicts inside of them: {INSTEAD}"
    if any(map(RELATIVE.search, text)) or hasattr(config, "rel_extent"):
        yield f"has a bias by relative position in its scores, which a stream would have to make: {INSTEAD}"
    if any(hasattr(config, name) for name in LOOPS):
        yield f"runs its layers several times for each token, with keys of their own each time: {INSTEAD}"
    if _some(decoder, "cross_attn", "crossattention", "encoder_attn"):
        yield f"has layers that attend to something other than its own tokens (cross-attention): {INSTEAD}"
    if getattr(config, "prefix_lm", False):
        yield f"lets the tokens of a prompt attend to each other (prefix_lm), which a stream never does: {INSTEAD}"
    if len(text) < len(names):
        yield f"takes images or sound in the same call as its tokens, which a stream cannot place: {INSTEAD}"
    if getattr(decoder, "_is_stateful", False):
        yield "keeps a state of fixed size instead of keys and values: it streams without a cache like this."


def parallel_refusal(model: PreTrainedModel) -> str:
    """Return what is wrong with how a model is split over ranks, and what to do instead; empty if nothing is.

    Args:
        model: As ``from_pretrained`` has returned it: it alone knows how it was split.
    """
    if getattr(model, "_pp_stage", None) is not None:
        return (
            "is split into stages (pp_size), and a stage has the keys of some layers only: use tp_size, or device_map "
            "in one process."
        )
    size, plan = getattr(model, "_tp_size", None) or 1, getattr(model, "_tp_plan", None) or {}
    split = {name.rpartition(".")[2] for name, style in plan.items() if style == "colwise"}
    if size == 1 or split.isdisjoint(KEY_PROJECTIONS):
        return ""
    config = model.config.get_text_config()
    named = [count for name, count in vars(config).items() if name.endswith("key_value_heads") and count]
    uneven = [count for count in named or [config.num_attention_heads] if count % size]
    if not uneven:
        return ""
    return (
        f"has {uneven[0]} heads of keys and values, which tp_size={size} does not divide: use a tp_size that does, or "
        "device_map in one process."
    )


def _some(decoder: nn.Module, *names: str) -> bool:
    """Return whether a module of the model has one of these attributes."""
    return any(getattr(part, name, None) is not None for part in decoder.modules() for name in names)
