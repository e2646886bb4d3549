"""Models with random weights and real shapes: speed and memory are those of the real ones, and nothing is loaded.

The output of such a model means nothing, so none of them has a perplexity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sinkwindow_lab.errors import LabError


def _llama(**sizes: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **sizes))


def _tiny() -> PreTrainedModel:
    """Return two layers, for tests of the measuring itself."""
    return _llama(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,  # large: attention must have an effect, or every cache would pass a check
    )


def _medium() -> PreTrainedModel:
    """Return eight layers, some milliseconds a token on one core: long streams are affordable."""
    return _llama(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.06,
    )


def _heads_of_smollm2() -> PreTrainedModel:
    """Return layers, heads and head size of SmolLM2-135M with almost nothing around them: for attention alone."""
    return _llama(
        vocab_size=64,
        hidden_size=72,
        intermediate_size=72,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
    )


def _pythia(hidden: int, layers: int, heads: int) -> PreTrainedModel:
    """Return a member of the Pythia family."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=50304,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
            max_position_embeddings=2048,
            use_parallel_residual=True,
        )
    )


def _tiny_pythia() -> PreTrainedModel:
    """Return two layers of the Pythia kind: partial rotation, no grouped heads."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
            max_position_embeddings=512,
            initializer_range=0.2,
        )
    )


def _pythia_160m() -> PreTrainedModel:
    """Return EleutherAI/pythia-160m, layer by layer."""
    return _pythia(768, 12, 12)


def _pythia_2_8b() -> PreTrainedModel:
    """Return EleutherAI/pythia-2.8b, layer by layer."""
    return _pythia(2560, 32, 32)


def _llama_7b() -> PreTrainedModel:
    """Return Llama-2-7B, layer by layer, embeddings not tied."""
    sizes = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(sizes)


SHAPES: dict[str, Callable[[], PreTrainedModel]] = {
    "tiny": _tiny,
    "medium": _medium,
    "smollm2-135m-heads": _heads_of_smollm2,
    "tiny-pythia": _tiny_pythia,
    "pythia-160m": _pythia_160m,
    "pythia-2.8b": _pythia_2_8b,
    "llama-7b": _llama_7b,
}


def random_model(
    shape: str, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """Build a model with random weights, a key of `SHAPES`, in eval mode and without gradients.

    The weights are drawn on `device`, not moved there.

    Raises:
        LabError: if the shape is unknown.
    """
    if shape not in SHAPES:
        raise LabError(f"unknown shape {shape!r}; choose from {', '.join(SHAPES)}")
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = SHAPES[shape]()
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(requires_grad=False)
    model.train(mode=False)
    return model
