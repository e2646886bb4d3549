"""A tiny random model of every family that the cache supports, and of every family that it refuses.

Weights have a standard deviation of 0.3: with the usual 0.02 a wrong position hardly changes the logits. Models have 64
positions, so that positions are rebased often, and layers with a sliding window of their own have one that is shorter
than most streams. Run as a script, this file prints the table in docs/support.md:
`python tests/families.py > docs/support.md`.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from sinkwindow import StreamingCache, supports
from sinkwindow.model.versions import too_old
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
GPT: Final = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": TRAINED}
EXPERTS: Final = {"experts_implementation": "eager"}  # grouped matrix products do not support float64
FALCON: Final = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": TRAINED}
LATENT: Final = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
LONGROPE: Final = {
    "rope_type": "longrope",
    "factor": 2.0,
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 48,
}


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


PAIRS: Final = "RoPE, interleaved"
PARTIAL: Final = "RoPE, partial"
EAGER_WITH_SINKS: Final[dict[str, Any]] = {"attention": ("eager",), "bound": FLOAT32_ISLAND}  # flex needs a GPU
OWN: Final[dict[str, Any]] = {"attention": ("sdpa", "eager")}  # Falcon implements both itself
# MPT and BLOOM cast scores to float32 whatever their dtype, where a float64 mask becomes -inf and padding NaN.
EAGER: Final[dict[str, Any]] = {"attention": ("eager",), "bound": FLOAT32_ISLAND, "dtype": torch.float32}
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
    "mixtral": _family("mixtral", "Mixtral", {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2, **EXPERTS}),
    "qwen2": _family("qwen2", "Qwen2, Qwen2.5", GQA),
    "qwen2_windows": _family(
        "qwen2",
        "Qwen2 with windows",
        {k: v for k, v in {**MIXED, "use_sliding_window": True}.items() if k != "head_dim"},
        "RoPE; window in some layers",
    ),
    "qwen3": _family("qwen3", "Qwen3", HEAD_DIM),
    "qwen3_moe": _family(
        "qwen3_moe",
        "Qwen3-MoE",
        {**HEAD_DIM, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, **EXPERTS},
    ),
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
        "RoPE; window in some layers",
        **NO_SDPA,
    ),
    "gemma3_text": _family(
        "gemma3_text", "Gemma 3", {**MIXED, "query_pre_attn_scalar": 8}, "RoPE of two kinds; window in some layers"
    ),
    "gpt_oss": _family(
        "gpt_oss",
        "GPT-OSS",
        {
            **MIXED,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            **EXPERTS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        },
        "RoPE; window in some layers; learned sinks",
        **EAGER_WITH_SINKS,
    ),
    "olmo2": _family("olmo2", "OLMo 2", GQA),
    "cohere": _family("cohere", "Cohere (Command R)", {**GQA, "logit_scale": 1.0}, PAIRS),
    "cohere2": _family(
        "cohere2",
        "Cohere 2 (Command R7B)",
        {k: v for k, v in {**MIXED, "logit_scale": 1.0}.items() if k != "head_dim"},
        "RoPE, interleaved, only in the layers with a window",
    ),
    "granite": _family("granite", "Granite", GQA),
    "starcoder2": _family("starcoder2", "StarCoder2", {**GQA, "sliding_window": None}),
    "smollm3": _family(
        "smollm3", "SmolLM3", {**GQA, "num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]}, "RoPE in some layers"
    ),
    "glm": _family("glm", "GLM", HEAD_DIM, PAIRS),
    "glm4": _family("glm4", "GLM-4", HEAD_DIM, PAIRS),
    "ernie4_5": _family("ernie4_5", "Ernie 4.5", HEAD_DIM, PAIRS),
}

# What this release of transformers does not have yet, and what it does not get right yet (versions.py).
for _family_name in [name for name, one in FAMILIES.items() if one.model_type not in CONFIG_MAPPING or too_old(one.model_type)]:
    del FAMILIES[_family_name]
REFUSED: Final[dict[str, Family]] = {
    "gpt2": _family("gpt2", "GPT-2", GPT, "learned, absolute"),
    "opt": _family("opt", "OPT", {**BASE, "word_embed_proj_dim": 32, "ffn_dim": 40}, "learned, absolute"),
    "deepseek_v3": _family(
        "deepseek_v3",
        "DeepSeek-V2, V3",
        {
            **BASE,
            **LATENT,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
        "RoPE and a latent",
    ),
    "t5": _family(
        "t5",
        "T5",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4},
        "bias",
    ),
    "mamba": _family("mamba", "Mamba", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}, "none"),
}


@functools.cache
def build(family: str, attention: str | None = None) -> PreTrainedModel:
    """Return a family's model. Calls with the same arguments share one object, so do not change it."""
    recipe = (FAMILIES | REFUSED)[family]
    special: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = AutoConfig.for_model(recipe.model_type, **special, **recipe.config)
    loader: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        chosen = {} if attention is None else {"attn_implementation": attention}
        model: PreTrainedModel = loader.from_config(config, **chosen)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=WEIGHT_STD)
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):  # GPT-OSS
                torch.nn.init.normal_(parameter)
    model.train(mode=False)
    torch.nn.Module.to(model, recipe.dtype)
    if recipe.dtype == torch.float64:
        keep_norms_wide(model)
    return model


def can_be_static(family: str) -> bool:
    """Return whether `static=True` is accepted for a family."""
    try:
        StreamingCache(build(family), 1, 4, 1, static=True).detach()
    except ValueError:
        return False
    return True


def _word(answer: object) -> str:
    return "yes" if answer else "no"


def table() -> str:
    """Render docs/support.md from the answers of `supports`."""
    lines = [HEAD]
    for name, family in FAMILIES.items():
        answer = supports(build(name))
        cells = (family.title, f"`{family.model_type}`", family.positions, _word(answer), _word(can_be_static(name)))
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(REFUSALS)
    for name, family in REFUSED.items():
        lines.append(f"| {family.title} | `{family.model_type}` | {supports(build(name)).reason} |")
    return "\n".join(lines) + "\n"


HEAD: Final = """\
# Supported models

Made by `python tests/families.py > docs/support.md` from the tests' models and `sinkwindow.supports`; do not
edit. Every line is a tiny random model that `tests/test_families.py` compares with the reference, in drawn splits into
calls and with padding. `supports(model)` answers for yours. Static: `tests/test_static.py` compares the steps of
`static=True`, for compiled graphs.

| family | `model_type` | positions | streams | static |
|---|---|---|---|---|"""

REFUSALS: Final = """
Where layers have a sliding window of their own, they keep it: sinks, window and buffer are the other layers'. Where all
layers have one (Mistral), num_sinks + window + buffer + 1 must fit it.

Refused, by name and reason, before anything changes:

| family | `model_type` | reason |
|---|---|---|"""


if __name__ == "__main__":
    sys.stdout.write(table())
