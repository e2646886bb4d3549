"""A verdict for every causal language model of transformers: it streams, it is refused and why, or it cannot be tried.

Each `model_type` is built from its own default configuration with sizes made small by their names, in float64, and
tried against the reference: one token per call past several evictions, and one long call. Run as a script, this file
prints docs/verdicts.md: `python tests/verdicts.py > docs/verdicts.md`.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import PretrainedConfig as PreTrainedConfig  # its name before transformers 5.0
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from families import EXACT, FLOAT32_ISLAND, OWN_WINDOW, TRAINED, VOCABULARY, randomize
from sinkwindow import supports
from sinkwindow.model.families import inspect_model
from sinkwindow_reference import reference_logits
from strategies import Rule, call, stream, tokens, worst

MODEL_TYPES: Final[tuple[str, ...]] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
RULE: Final = Rule(2, 5, 1)
COLUMNS: Final = 30  # tokens of the trial: with RULE, evictions begin after 8
LAYERS: Final = 4
STOCK: Final = 3e-5  # transformers computes angles in float32, relative to the largest logit

WIDTHS: Final = ("d_model", "dim_model", "embed_dim", "emb_dim", "hidden_size", "n_embd", "word_embed_proj_dim")
INNER: Final = (
    "d_ff",
    "d_inner",
    "decoder_ffn_dim",
    "dense_intermediate_size",
    "dim_ff",
    "encoder_ffn_dim",
    "ffn_dim",
    "ffn_hidden_size",
    "expert_ffn_hidden_size",
)
DEPTHS: Final = ("decoder_layers", "n_layer", "n_layers", "num_decoder_layers", "num_hidden_layers", "num_layers")
HEADS: Final = (
    "attention_heads",
    "decoder_attention_heads",
    "encoder_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
)
EXPERTS: Final = ("moe_num_experts", "n_routed_experts", "num_experts", "num_local_experts")
SMALL: Final[dict[str, Any]] = {
    **dict.fromkeys(WIDTHS, 32),
    **dict.fromkeys((*INNER, "intermediate_size"), 40),
    **dict.fromkeys(DEPTHS, LAYERS),
    **dict.fromkeys((*HEADS, "num_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(EXPERTS, 4),
    **dict.fromkeys(("max_position_embeddings", "max_seq_len", "model_max_length", "n_positions"), TRAINED),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("global_head_dim", "head_dim", "hidden_size_per_layer_input", "kv_channels", "v_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("moe_k", "moe_topk", "n_group", "num_experts_per_tok", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_shared_experts", "num_expert_group", "num_shared_experts", "topk_group"), 1),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    "encoder_layers": 2,
    "num_key_value_heads": 2,
    "sliding_window": OWN_WINDOW,
}
# What a family's default configuration leaves open, or what must fit other sizes.
MAMBA: Final = {"mamba_n_heads": 8, "mamba_d_head": 8}
DEFAULT_ROPE: Final = {"rope_type": "default", "rope_theta": 100.0}
INDEXER: Final = {"n_heads": 2, "kv_heads": 1, "head_dim": 8, "budget": 4, "compress_ratio": 2}
QWEN4: Final = {"ngram_vocab_size_base": VOCABULARY} | {f"indexer_{name}": size for name, size in INDEXER.items()}
MIXED_TYPES: Final = ["sliding_attention", "full_attention"] * 2
CHANGES: Final[dict[str, dict[str, Any]]] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(MIXED_TYPES, DEFAULT_ROPE)},
    "dbrx": {"attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 100.0}},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 2, "activation_sparsity_pattern": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {**MAMBA, "layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "kimi_linear": {"num_key_value_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 8)},
    "zamba": {"num_hidden_layers": 12},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def configuration(model_type: str) -> PreTrainedConfig:
    """Return a small configuration of a model type, its layers of all the types that its default has."""
    default = AutoConfig.for_model(model_type)
    arguments = _small(default)
    for name, change in CHANGES.get(model_type, {}).items():
        inner = arguments.get(name)
        arguments[name] = inner | change if isinstance(inner, dict) else change
    return AutoConfig.for_model(model_type, **arguments)


def _small(default: PreTrainedConfig) -> dict[str, Any]:
    """Return the arguments that make a configuration small, those of the configurations inside it too."""
    there = default.to_dict()
    found = {name: size for name, size in SMALL.items() if isinstance(there.get(name), int | list)}
    inner = {name: getattr(default, name, None) for name in default.sub_configs}
    found |= {name: _small(config) for name, config in inner.items() if isinstance(config, PreTrainedConfig)}
    types = list(dict.fromkeys(there.get("layer_types") or []))
    if types and set(types) <= set(MIXED_TYPES) and there.get("sliding_window"):
        types = MIXED_TYPES
    if types:
        found["layer_types"] = [types[layer % len(types)] for layer in range(LAYERS)]
    if "is_decoder" in there and not default.is_encoder_decoder:
        found["is_decoder"] = True
    return found


def build(model_type: str) -> PreTrainedModel:
    """Return a small random model of a model type, in float64."""
    config = configuration(model_type)
    config._experts_implementation = "eager"  # grouped matrix products do not support float64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loader: Any = AutoModelForCausalLM  # untyped in transformers
        return randomize(loader.from_config(config), torch.float64)


@dataclass(frozen=True)
class Verdict:
    """What came of a model type.

    Attributes:
        model_type: Its name in transformers.
        word: "streams", "refused", "cannot be tried", or "WRONG".
        detail: Of a model that streams the largest error, of others the reason.
    """

    model_type: str
    word: str
    detail: str

    @property
    def row(self) -> str:
        """The row of the page."""
        return f"| `{self.model_type}` | {self.word} | {self.detail} |"


def verdict(model_type: str) -> Verdict:
    """Try a model type."""
    try:
        model = build(model_type)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the verdict
        message = " ".join(str(error).split())[:160].replace("|", "/")
        return Verdict(model_type, "cannot be tried", f"building it raises {type(error).__name__}: {message}")
    answer = supports(model)
    if not answer:
        return Verdict(model_type, "refused", answer.reason.removeprefix(f"model_type {model_type!r} "))
    largest, stock = largest_error(model), stock_error(model)
    if largest > FLOAT32_ISLAND or stock > STOCK:
        return Verdict(model_type, "WRONG", f"{largest:.0e}, the reference {stock:.0e} from the stock model")
    return Verdict(model_type, "streams", f"{largest:.0e}" if largest > EXACT else "below 1e-9")


def largest_error(model: PreTrainedModel) -> float:
    """Return the largest difference of a logit from the reference's: token by token, and in one long call."""
    ids = tokens(1, 1, COLUMNS)
    expected = reference_logits(model, ids, **RULE.arguments)
    steps = stream(model, RULE.cache(model), ids, [1] * COLUMNS)
    return max(worst(steps - expected), worst(call(model, RULE.cache(model), ids) - expected))


def stock_error(model: PreTrainedModel) -> float:
    """Return the largest difference of the reference from the stock model with everything kept, over its size."""
    native = inspect_model(model).native_window
    ids = tokens(1, 1, min(COLUMNS, native or COLUMNS))
    with torch.no_grad():
        stock = model(ids).logits
    return worst(reference_logits(model, ids, num_sinks=0, window=COLUMNS) - stock) / worst(stock)


def page() -> str:
    """Try every model type and render docs/verdicts.md."""
    found = [verdict(model_type) for model_type in MODEL_TYPES]
    counts = Counter(one.word for one in found)
    summary = "; ".join(f"{count} x {word}" for word, count in counts.most_common())
    head = HEAD.format(release=transformers.__version__, total=len(found), summary=summary)
    return "\n".join([head, *(one.row for one in found)]) + "\n"


HEAD: Final = """\
# Verdicts

Made by `python tests/verdicts.py > docs/verdicts.md`; do not edit. Each of the {total} values of `model_type` for which
transformers {release} has a causal language model: {summary}.

Each is a random model of its default configuration with small sizes, in float64. One that streams was compared with the
reference, one token per call past several evictions and in one long call; the number is the largest difference of a
logit. Above 1e-9 a part of the model, such as a router, computes in float32. What is refused is refused by
`supports(model)`, before anything changes. The families of [supported models](support.md) are tested further.

| `model_type` | verdict | largest error, or why |
|---|---|---|"""


if __name__ == "__main__":
    sys.stdout.write(page())
