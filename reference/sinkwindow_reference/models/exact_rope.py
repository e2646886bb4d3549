"""Exact rotary embeddings for float64 models: transformers computes their angles and scaling in float32."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from sinkwindow_reference.rotation import cos_sin

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel


@contextmanager
def exact_rope(model: PreTrainedModel) -> Iterator[None]:
    """Compute cosines and sines in float64 where hidden states are float64; other dtypes keep those of the model."""
    found = [m for m in model.modules() if any(name.endswith("inv_freq") for name, _ in m.named_buffers(recurse=False))]
    handles = [module.register_forward_hook(_recompute_tables, with_kwargs=True) for module in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _recompute_tables(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    cos, sin = output
    if cos.dtype != torch.float64:
        return output
    positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    layer_type = kwargs.get("layer_type", args[2] if len(args) > 2 else None)  # noqa: PLR2004 - hidden, positions, type
    scaling = getattr(module, f"{layer_type}_attention_scaling", None) or module.attention_scaling
    if module.config.model_type == "phimoe":  # a factor of its own, another one beyond the length first trained on
        scaling = module.config.rope_parameters.get("short_mscale", scaling)
    if not positions.any():  # position 0, in any layout: attention scaling only
        return torch.full_like(cos, scaling), torch.zeros_like(sin)
    # Only models that receive ranks as positions (`steps`) get here, and they have the half-split layout.
    tables = cos_sin(positions[0], module.inv_freq, torch.float64)
    return tuple(torch.cat([table, table], dim=-1)[None] * scaling for table in tables)
