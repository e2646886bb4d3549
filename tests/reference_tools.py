"""Shared by the tests of the reference: tiny models, random numbers, and tolerances.

A stock model in float64 agrees with the reference to 1e-6 at best: transformers computes angles and RMS norms in
float32 whatever the model's dtype. Where both sides of a comparison are our own code, the bound is 1e-12.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from releases import as_released
from sinkwindow.model.versions import since

STOCK = 1e-6
OURS = 1e-12
VOCAB = 50
HALF_SPLIT = ["llama", "mistral", "qwen2", "qwen3", "gpt_neox", "phi", "smollm3", *["stablelm"] * since("5.2")]
INTERLEAVED = ["cohere", "ernie4_5", "glm", "glm4", "helium"]
sizes = st.fixed_dictionaries(
    {"num_sinks": st.integers(0, 4), "window": st.integers(1, 6), "buffer": st.integers(0, 4)}
)
seeds = st.integers(0, 2**16)


def tiny_model(kind: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a random float64 model of a family, with large weights so that a wrong position changes the logits."""
    small: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "max_position_embeddings": 512, "pad_token_id": 0, "initializer_range": 0.3}
    if kind not in {"gpt_neox", "phi"}:
        small["num_key_value_heads"] = 2
    if kind not in {"gpt_neox", "phi", "falcon", "stablelm", "cohere", "llama", "mistral", "qwen2"}:
        small["head_dim"] = 8
    torch.manual_seed(seed)
    build: Any = AutoModelForCausalLM.from_config  # untyped in transformers
    model: PreTrainedModel = build(AutoConfig.for_model(kind, **as_released({**small, **changes}))).double().eval()
    return model


def random_ids(seed: int, rows: int, tokens: int) -> Tensor:
    """Return random token ids `[rows, tokens]`, without the padding id."""
    return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def gap(left: Tensor, right: Tensor) -> float:
    """Return the largest absolute difference, or NaN if any element is NaN."""
    return float((left - right).abs().max())


def heads(seed: int, *shape: int) -> Tensor:
    """Return random float64 numbers."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def frequencies(pairs: int) -> Tensor:
    """Return RoPE frequencies `[pairs]`, of which the first is one radian per token."""
    return 100.0 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
