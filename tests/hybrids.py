"""A tiny random model of every family whose layers partly attend and partly keep a state of their own.

Linear attention, convolution and state-space layers compute in float32 in stock code whatever the model's dtype; the
layers of these models are kept in float64 (``wide_norms``), so that an error of the cache cannot hide behind rounding.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from families import BASE, EXPERTS, HEAD_DIM, LOCAL, MOE, OWN_WINDOW, WEIGHT_STD
from sinkwindow_lab.inputs.wide import decoder_layers, keep_norms_wide, keep_wide

DELTA: Final = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
}
SHARED: Final = {**MOE, "shared_expert_intermediate_size": 16}
MAMBA: Final = {"mamba_n_heads": 4, "mamba_d_state": 6, "mamba_d_conv": 4, "mamba_chunk_size": 8, "mamba_expand": 2}
LINEAR: Final = {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_hidden_layers": 3}
ZAMBA: Final = {**BASE, "num_key_value_heads": 4, "mamba_d_state": 6}
ZAMBA2: Final = {**ZAMBA, "n_mamba_heads": 4, "chunk_size": 8, "adapter_rank": 4}
CONV: Final = {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "block_multiple_of": 8}

HYBRIDS: Final[dict[str, dict[str, Any]]] = {
    "qwen3_next": {**HEAD_DIM, **DELTA, **SHARED, **LINEAR},
    "qwen3_5_text": {**HEAD_DIM, **DELTA, **LINEAR},
    "qwen3_5_moe_text": {**HEAD_DIM, **DELTA, **SHARED, **LINEAR},
    "olmo_hybrid": {**HEAD_DIM, **DELTA, **LINEAR, "linear_num_key_heads": 4},
    "lara_mini": {
        **HEAD_DIM,
        **DELTA,
        **SHARED,
        "num_hidden_layers": 4,
        "sliding_window": OWN_WINDOW,
        "layer_types": ["linear_attention", "sliding_attention", "linear_attention", "full_attention"],
    },
    "kimi_linear": {
        **HEAD_DIM,
        **LINEAR,
        "mlp_layer_types": ["dense"] * 3,  # its router computes in float32 whatever is done to it
        "num_key_value_heads": 4,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 6,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "lfm2": {**HEAD_DIM, **CONV},
    "lfm2_moe": {**HEAD_DIM, **CONV, **MOE, "num_dense_layers": 1},
    "lfm3": {
        **HEAD_DIM,
        "sliding_window": OWN_WINDOW,
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention", "conv", "sliding_attention"],
    },
    "bamba": {**HEAD_DIM, **MAMBA, "num_hidden_layers": 3, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **HEAD_DIM,
        **MAMBA,
        **LINEAR,
        **LOCAL,
        "position_embedding_type": "rope",
        "shared_intermediate_size": 16,
    },
    "granitemoehybrid_nope": {
        **HEAD_DIM,
        **MAMBA,
        **LINEAR,
        "num_local_experts": 0,
        "shared_intermediate_size": 16,
    },
    "nemotron_h": {
        **HEAD_DIM,
        **EXPERTS,
        "layers_block_type": ["mlp", "linear_attention", "full_attention", "linear_attention"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 6,
        "n_groups": 2,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
    "falcon_h1": {**HEAD_DIM, **MAMBA, "mamba_d_ssm": 32},
    "zamba2": {
        **ZAMBA2,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zamba2_rope": {
        **ZAMBA2,
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "use_mem_rope": True,
    },
    "zaya": {
        **HEAD_DIM,
        **EXPERTS,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "router_hidden_size": 8,
    },
}


REFUSED: Final[dict[str, dict[str, Any]]] = {
    "jamba": {
        **HEAD_DIM,
        "num_hidden_layers": 3,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "mamba_d_state": 6,
        "mamba_dt_rank": 4,
        "num_experts": 4,
        **EXPERTS,
    },
    "zamba": {
        **ZAMBA,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "mamba_dt_rank": 4,
    },
    "minimax": {**HEAD_DIM, "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2},
    "recurrent_gemma": {**HEAD_DIM, "lru_width": 32, "num_hidden_layers": 3},
}
FLOAT32_LOGITS: Final = {"nemotron_h"}  # stock code returns them in float32


def type_of(family: str) -> str:
    """Return the `model_type` of a hybrid, some of which are there in two variants."""
    return family.removesuffix("_nope").removesuffix("_rope")


def made(family: str, attention: str = "sdpa", **changes: Any) -> Any:
    """Make a new float32 model of a family, with changes to its configuration."""
    special: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = AutoConfig.for_model(type_of(family), **{**special, **(HYBRIDS | REFUSED)[family], **changes})
    loader: Any = AutoModelForCausalLM
    return loader.from_config(config, attn_implementation=attention).train(mode=False)


def limit_time_steps(model: Any, limit: tuple[float, float]) -> None:
    """Do what the reason for a refusal tells, or the opposite."""
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = limit


@functools.cache
def build(family: str) -> PreTrainedModel:
    """Return a family's model in float64. Calls with the same argument share one object, so do not change it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = made(family)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("bias"):  # of convolutions, where padding is not zero then
                torch.nn.init.normal_(parameter, std=WEIGHT_STD)
    torch.nn.Module.to(model, torch.float64)
    limit_time_steps(model, (0.0, math.inf))
    keep_wide(decoder_layers(model))
    keep_norms_wide(model)
    return model
