"""A tiny random model of every family that the cache supports.

Weights have a standard deviation of 0.3: with the usual 0.02 a wrong position hardly changes the logits. Models have 64
positions, so that positions are rebased often, and layers with a sliding window of their own have one that is shorter
than most streams.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Final

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from releases import as_released
from sinkwindow import StreamingCache
from sinkwindow.model.versions import since, too_old
from wide_norms import keep_norms_wide

VOCABULARY: Final = 50
TRAINED: Final = 64  # positions [tokens]
OWN_WINDOW: Final = 12  # sliding window of the layers that have one of their own [tokens]
WEIGHT_STD: Final = 0.3
FLOAT32_ISLAND: Final = 1e-4  # allowed logit difference where a part of the model works in float32; measured: 1e-5
EXACT: Final = 1e-9

SIZES: Final = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
BASE: Final[dict[str, Any]] = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": TRAINED}
GQA: Final = {**BASE, "num_key_value_heads": 2}
HEAD_DIM: Final = {**GQA, "head_dim": 8}
MIXED: Final = {
    **HEAD_DIM,
    "num_hidden_layers": 4,
    "sliding_window": OWN_WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
NO_HEAD_DIM: Final[dict[str, Any]] = {name: value for name, value in MIXED.items() if name != "head_dim"}
GPT: Final = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": TRAINED}
EXPERTS: Final[dict[str, Any]] = {"experts_implementation": "eager"}  # grouped products do not support float64
LOCAL: Final = {"num_local_experts": 4, "num_experts_per_tok": 2, **EXPERTS}
MOE: Final = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, **EXPERTS}
# Routers that compute in float32 choose all experts: rounding must not decide between two of them.
GROUPS: Final = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
ROUTED: Final = {"n_routed_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 16, **GROUPS, **EXPERTS}
ERNIE: Final = {"moe_num_experts": 4, "moe_k": 4, "moe_intermediate_size": 16, **EXPERTS}
# Gemma 3n and 4: embeddings for each layer, and the last two layers attend to the keys of the first two.
PER_LAYER: Final = {
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
}
IDS: Final = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)  # where None is no id
DEFAULT_ROPE: Final = {"rope_type": "default", "rope_theta": 100.0}
YARN: Final = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 2.0, "original_max_position_embeddings": 32}
SCALED: Final = {**YARN, "llama_4_scaling_beta": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0}
JETMOE: Final = {name: value for name, value in GQA.items() if name != "num_attention_heads"} | {"kv_channels": 8}
FALCON: Final = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": TRAINED}
LONGROPE: Final = {
    "rope_type": "longrope",
    "factor": 2.0,
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 48,
}
# Families that continuous batching serves: transformers tells their cache of the batch, and all layers have one rule.
# fmt: off
BATCHED: Final = {
    "llama", "llama_linear", "llama_yarn", "llama_llama3", "mixtral", "qwen2", "qwen3", "qwen3_moe", "phi",
    "phi3", "persimmon", "gemma", "olmo2", "cohere", "granite", "starcoder2", "glm", "glm4", "ernie4_5",
    "ernie4_5_moe", "apertus", "arcee", "dots1", "gemma3_full", "glm4_moe", "granitemoe", "helium", "jetmoe",
    "minimax_m2", "nanochat", "olmo", "olmoe", "phimoe", "qwen2_moe", "seed_oss",
}
# fmt: on


@dataclass(frozen=True)
class Family:
    """How to build a family's tiny model, and what to expect of it.

    Attributes:
        model_type: Its name in transformers.
        title: Its usual name.
        positions: How the model encodes positions.
        config: Arguments of its configuration.
        attention: Attention implementations that it supports, its default first.
        bound: Largest allowed difference between its logits and the reference's.
        dtype: float64 where the model supports it.
    """

    model_type: str
    title: str
    positions: str
    config: dict[str, Any]
    attention: tuple[str, ...] = ("sdpa", "eager", "flex_attention")
    bound: float = EXACT
    dtype: torch.dtype = torch.float64


def _family(model_type: str, title: str, config: dict[str, Any], positions: str = "RoPE", **more: Any) -> Family:
    return Family(model_type, title, positions, config, **more)


def _llama(rope_type: str, **rope: Any) -> Family:
    parameters = {"rope_type": rope_type, "rope_theta": 100.0, **rope}
    return _family(
        "llama", f"Llama, rope type {rope_type}", {**GQA, "rope_parameters": parameters}, f"RoPE, {rope_type}"
    )


WINDOWS: Final = "RoPE; window in some layers"
ONLY_WITH_WINDOW: Final = "only in the layers with a window"
ONLY_WINDOWS: Final = f"RoPE, {ONLY_WITH_WINDOW}"
SHARED: Final = "RoPE of two kinds; window in some layers; layers that share keys"
PAIRS: Final = "RoPE, interleaved"
PARTIAL: Final = "RoPE, partial"
EAGER_WITH_SINKS: Final[dict[str, Any]] = {"attention": ("eager",), "bound": FLOAT32_ISLAND}  # flex needs a GPU
EAGER_ONLY: Final[dict[str, Any]] = {"attention": ("eager",)}  # it implements nothing else
OWN: Final[dict[str, Any]] = {"attention": ("sdpa", "eager")}  # Falcon implements both itself
# MPT and BLOOM cast scores to float32 whatever their dtype, where a float64 mask becomes -inf and padding NaN.
EAGER: Final[dict[str, Any]] = {"attention": ("eager",), "bound": FLOAT32_ISLAND, "dtype": torch.float32}
ISLAND: Final[dict[str, Any]] = {"bound": FLOAT32_ISLAND}  # a router in float32
NO_FLEX: Final[dict[str, Any]] = {"attention": ("sdpa", "eager")}  # transformers refuses flex_attention
# Eager attention computes its softmax in float32 whatever the model's dtype.
NO_SDPA: Final[dict[str, Any]] = {"attention": ("eager", "flex_attention"), "bound": FLOAT32_ISLAND}
FAMILIES: Final[dict[str, Family]] = {
    "llama": _family("llama", "Llama", GQA),
    "llama_linear": _llama("linear", factor=2.0),
    "llama_dynamic": _llama("dynamic", factor=2.0),
    "llama_yarn": _llama("yarn", factor=4.0, original_max_position_embeddings=16),
    "llama_longrope": _family(
        "llama", "Llama, rope type longrope", {**GQA, "rope_parameters": LONGROPE}, "RoPE, longrope"
    ),
    "llama_llama3": _llama(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    ),
    "mistral": _family("mistral", "Mistral", {**GQA, "sliding_window": TRAINED}),
    "mixtral": _family("mixtral", "Mixtral", {**GQA, **LOCAL}),
    "qwen2": _family("qwen2", "Qwen2, Qwen2.5", GQA),
    "qwen2_windows": _family("qwen2", "Qwen2 with windows", {**NO_HEAD_DIM, "use_sliding_window": True}, WINDOWS),
    "qwen3": _family("qwen3", "Qwen3", HEAD_DIM),
    "qwen3_moe": _family("qwen3_moe", "Qwen3-MoE", {**HEAD_DIM, **MOE}),
    "gpt_neox": _family("gpt_neox", "GPT-NeoX, Pythia", BASE, PARTIAL),
    "gptj": _family("gptj", "GPT-J", {**GPT, "rotary_dim": 4}, "RoPE, interleaved, partial"),
    "codegen": _family("codegen", "CodeGen", {**GPT, "rotary_dim": 4}, "RoPE, interleaved, partial"),
    "phi": _family("phi", "Phi", GQA, PARTIAL),
    "phi3": _family("phi3", "Phi-3, Phi-4", {**GQA, "sliding_window": None}),
    "phi3_longrope": _family(
        "phi3",
        "Phi-3, longrope",
        {**GQA, "sliding_window": None, "original_max_position_embeddings": 48, "rope_parameters": LONGROPE},
        "RoPE, longrope",
    ),
    "stablelm": _family("stablelm", "StableLM", GQA, PARTIAL, **NO_FLEX),
    "persimmon": _family("persimmon", "Persimmon", BASE, PARTIAL, **NO_FLEX),
    "nemotron": _family("nemotron", "Nemotron", GQA, PARTIAL),
    "falcon": _family("falcon", "Falcon", {**FALCON, "alibi": False}, **OWN),
    "falcon_alibi": _family(
        "falcon", "Falcon with ALiBi", {**FALCON, "alibi": True, "multi_query": False}, "ALiBi", **OWN
    ),
    "mpt": _family(
        "mpt",
        "MPT",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "max_seq_len": TRAINED,
            "expansion_ratio": 2,
        },
        "ALiBi",
        **EAGER,
    ),
    "bloom": _family(
        "bloom", "BLOOM", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "ALiBi", **EAGER
    ),
    "gemma": _family("gemma", "Gemma", HEAD_DIM),
    "gemma2": _family(
        "gemma2",
        "Gemma 2",
        {**MIXED, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
        WINDOWS,
        **NO_SDPA,
    ),
    "gemma3_text": _family(
        "gemma3_text", "Gemma 3", {**MIXED, "query_pre_attn_scalar": 8}, "RoPE of two kinds; window in some layers"
    ),
    "gpt_oss": _family(
        "gpt_oss",
        "GPT-OSS",
        {**MIXED, **LOCAL, "rope_parameters": DEFAULT_ROPE},
        f"{WINDOWS}; learned sinks",
        **EAGER_WITH_SINKS,
    ),
    "olmo2": _family("olmo2", "OLMo 2", GQA),
    "cohere": _family("cohere", "Cohere (Command R)", {**GQA, "logit_scale": 1.0}, PAIRS),
    "cohere2": _family(
        "cohere2", "Cohere 2 (Command R7B)", {**NO_HEAD_DIM, "logit_scale": 1.0}, f"{PAIRS}, {ONLY_WITH_WINDOW}"
    ),
    "granite": _family("granite", "Granite", GQA),
    "starcoder2": _family("starcoder2", "StarCoder2", {**GQA, "sliding_window": None}),
    "smollm3": _family(
        "smollm3", "SmolLM3", {**GQA, "num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]}, "RoPE in some layers"
    ),
    "glm": _family("glm", "GLM", HEAD_DIM, PAIRS),
    "glm4": _family("glm4", "GLM-4", HEAD_DIM, PAIRS),
    "ernie4_5": _family("ernie4_5", "Ernie 4.5", HEAD_DIM, PAIRS),
    "ernie4_5_moe": _family("ernie4_5_moe", "Ernie 4.5 MoE", {**GQA, **ERNIE}, PAIRS, **ISLAND),
    "afmoe": _family("afmoe", "AFMoE (Trinity)", {**MIXED, **MOE, "num_experts_per_tok": 4}, ONLY_WINDOWS, **ISLAND),
    "apertus": _family("apertus", "Apertus", {**GQA, "rope_parameters": DEFAULT_ROPE}),
    "arcee": _family("arcee", "Arcee", GQA),
    "cohere2_moe": _family("cohere2_moe", "Cohere 2 MoE", {**MIXED, **MOE}, f"{PAIRS}, {ONLY_WITH_WINDOW}"),
    "cwm": _family("cwm", "CWM", {**MIXED, "rope_parameters": DEFAULT_ROPE, **IDS}, WINDOWS),
    "dots1": _family("dots1", "dots.llm1", {**GQA, **ROUTED}, **ISLAND),
    "exaone4": _family("exaone4", "EXAONE 4", NO_HEAD_DIM, ONLY_WINDOWS),
    "gemma3_sliding": _family(
        "gemma3_text",
        "Gemma 3, all layers with a window",
        {**HEAD_DIM, "sliding_window": TRAINED, "layer_types": ["sliding_attention"] * 2, "query_pre_attn_scalar": 8},
    ),
    "gemma3_full": _family(
        "gemma3_text",
        "Gemma 3, no layer with a window",
        {**HEAD_DIM, "layer_types": ["full_attention"] * 2, "query_pre_attn_scalar": 8},
    ),
    "gemma3n_text": _family(
        "gemma3n_text",
        "Gemma 3n",
        {**MIXED, **PER_LAYER, "laurel_rank": 4, "activation_sparsity_pattern": None},
        SHARED,
    ),
    "gemma4_text": _family("gemma4_text", "Gemma 4", {**MIXED, **PER_LAYER, "global_head_dim": 16}, SHARED),
    "glm4_moe": _family("glm4_moe", "GLM-4.5, GLM-4.6", {**HEAD_DIM, **ROUTED}, PARTIAL, **ISLAND),
    "gpt_neox_japanese": _family(
        "gpt_neox_japanese",
        "GPT-NeoX Japanese",
        {k: v for k, v in BASE.items() if k != "intermediate_size"},
        **EAGER_ONLY,
    ),
    "granite_swa": _family("granite_swa", "Granite SWA", NO_HEAD_DIM, f"{WINDOWS}; learned sinks", **EAGER_WITH_SINKS),
    "granitemoe": _family("granitemoe", "Granite MoE", {**GQA, **LOCAL}),
    "helium": _family("helium", "Helium", HEAD_DIM, PAIRS),
    "jetmoe": _family("jetmoe", "JetMoe", {**JETMOE, **LOCAL}),
    "mimo_v2_flash": _family(
        "mimo_v2_flash",
        "MiMo-V2-Flash",
        {**MIXED, **ROUTED, "v_head_dim": 4},
        f"{WINDOWS}; learned sinks",
        **EAGER_WITH_SINKS,
    ),
    "minimax_m2": _family(
        "minimax_m2", "MiniMax-M2", {**HEAD_DIM, **LOCAL, "num_experts_per_tok": 4, "rotary_dim": 4}, PARTIAL, **ISLAND
    ),
    "ministral": _family("ministral", "Ministral", MIXED, WINDOWS),
    "ministral3": _family(
        "ministral3", "Ministral 3", {**HEAD_DIM, "rope_parameters": SCALED}, "RoPE, yarn; queries scaled by position"
    ),
    "modernbert-decoder": _family(
        "modernbert-decoder",
        "ModernBERT decoder",
        {**BASE, "layer_types": MIXED["layer_types"][:2], "local_attention": 2 * OWN_WINDOW, **IDS},
        "RoPE of two kinds; window in some layers",
    ),
    "nanochat": _family("nanochat", "nanochat", GQA, "RoPE, backwards"),
    "olmo": _family("olmo", "OLMo", GQA),
    "olmo3": _family("olmo3", "OLMo 3", NO_HEAD_DIM, WINDOWS),
    "olmoe": _family("olmoe", "OLMoE", {**GQA, "num_experts": 4, "num_experts_per_tok": 2, **EXPERTS}, **NO_FLEX),
    "phimoe": _family("phimoe", "Phi-3.5-MoE", {**GQA, **LOCAL, "sliding_window": None}),
    "phimoe_longrope": _family(
        "phimoe",
        "Phi-3.5-MoE, longrope",
        {
            **GQA,
            **LOCAL,
            "sliding_window": None,
            "rope_parameters": {**LONGROPE, "short_mscale": 1.2, "long_mscale": 1.4},
        },
        "RoPE, longrope",
    ),
    "qwen2_moe": _family("qwen2_moe", "Qwen2-MoE", {**GQA, **MOE, "shared_expert_intermediate_size": 16}),
    "seed_oss": _family("seed_oss", "Seed-OSS", HEAD_DIM),
    "vaultgemma": _family("vaultgemma", "VaultGemma", {**MIXED, "query_pre_attn_scalar": 8}, WINDOWS, **NO_SDPA),
}

# What this release of transformers does not have yet, or does not get right yet (versions.py), and why.
LATE: Final = {
    name: why or f"this transformers has no {family.model_type}"
    for name, family in FAMILIES.items()
    for why in [too_old(family.model_type) or too_old(name.replace("_longrope", ", longrope"))]
    if why or family.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
}
for _name in LATE:
    del FAMILIES[_name]


@functools.cache
def build(family: str, attention: str | None = None) -> PreTrainedModel:
    """Return a family's model. Calls with the same arguments share one object, so do not change it."""
    if family in LATE:
        pytest.skip(LATE[family])  # on old releases alone: tests/test_versions.py
    recipe = FAMILIES[family]
    return made(recipe, attention)


def made(recipe: Family, attention: str | None = None) -> PreTrainedModel:
    """Return a new model of a family."""
    special: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = AutoConfig.for_model(recipe.model_type, **as_released(special | recipe.config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loader: Any = AutoModelForCausalLM  # untyped in transformers
        try:
            model = loader.from_config(config, attn_implementation=attention or recipe.attention[0])
        except ValueError as error:
            if since("5.24") or "does not support an attention" not in str(error):  # never skipped on the newest
                raise
            pytest.skip(f"needs transformers 5.24: before, {recipe.model_type} does not support {attention}")
        return randomize(model, recipe.dtype)


def randomize(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Give a model large random weights and a dtype, and switch dropout off."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=WEIGHT_STD)
        elif name.endswith("sinks"):  # GPT-OSS
            torch.nn.init.normal_(parameter)
        else:  # one that begins with zeros, or ones, would hide what it does
            parameter.data += torch.randn_like(parameter) / 10
    model.train(mode=False)
    torch.nn.Module.to(model, dtype)
    if dtype == torch.float64:
        keep_norms_wide(model)
    return model


def can_be_static(model: PreTrainedModel) -> bool:
    """Return whether `static=True` is accepted for a model."""
    try:
        StreamingCache(model, 1, 4, 1, static=True).detach()
    except ValueError:
        return False
    return True
