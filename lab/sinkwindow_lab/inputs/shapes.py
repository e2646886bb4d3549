"""Models with random weights and real shapes: speed and memory are those of the real ones, and nothing is loaded.

The output of such a model means nothing, so none of them has a perplexity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PretrainedConfig, PreTrainedModel

from sinkwindow_lab.errors import LabError

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TIED = {"tie_word_embeddings": True}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25}}
# Class of the configuration, its `SIZES`, its longest text [tokens], and other arguments. The initializer's range is
# large where outputs are compared: attention must have an effect, or every cache would pass.
SHAPES: dict[str, tuple[Callable[..., PretrainedConfig], tuple[int, ...], int, dict[str, Any]]] = {
    # Two layers, for tests of the measuring itself.
    "tiny": (LlamaConfig, (64, 32, 64, 2, 4), 2048, {"num_key_value_heads": 2, "initializer_range": 0.2} | TIED),
    # Some milliseconds a token on one core: long streams are affordable.
    "medium": (LlamaConfig, (1024, 256, 768, 8, 8), 2048, {"num_key_value_heads": 4, "initializer_range": 0.06} | TIED),
    # Layers, heads and head size of SmolLM2-135M with almost nothing around them: for attention alone.
    "smollm2-135m-heads": (LlamaConfig, (64, 72, 72, 30, 9), 8192, {"num_key_value_heads": 3, "head_dim": 64} | TIED),
    # Partial rotation, no grouped heads.
    "tiny-pythia": (GPTNeoXConfig, (64, 32, 64, 2, 2), 512, {"initializer_range": 0.2} | ROPE),
    # EleutherAI/pythia-160m, EleutherAI/pythia-2.8b and Llama-2-7B, layer by layer.
    "pythia-160m": (GPTNeoXConfig, (50304, 768, 3072, 12, 12), 2048, ROPE),
    "pythia-2.8b": (GPTNeoXConfig, (50304, 2560, 10240, 32, 32), 2048, ROPE),
    "llama-7b": (LlamaConfig, (32000, 4096, 11008, 32, 32), 4096, {}),
}


def random_model(
    shape: str, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """Build a model of a shape with random weights, drawn on `device`, in eval mode and without gradients."""
    if shape not in SHAPES:
        raise LabError(f"unknown shape {shape!r}; choose from {', '.join(SHAPES)}")
    kind, sizes, positions, more = SHAPES[shape]
    config = kind(**dict(zip(SIZES, sizes, strict=True)), max_position_embeddings=positions, **more)
    torch.manual_seed(seed)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.requires_grad_(requires_grad=False)
    model.train(mode=False)
    return model


def token_ids(model: PreTrainedModel, columns: int, rows: int = 1) -> torch.Tensor:
    """Return random token ids [rows, columns] on a model's device: speed does not depend on the text."""
    random = torch.Generator().manual_seed(columns)
    return torch.randint(0, int(model.config.vocab_size), (rows, columns), generator=random).to(model.device)
