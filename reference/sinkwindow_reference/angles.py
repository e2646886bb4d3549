"""Make a float64 model's rotary embedding exact: transformers computes angles and their scaling in float32."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from sinkwindow_reference.rotation import cos_sin

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel


@contextmanager
def exact_angles(model: PreTrainedModel) -> Iterator[None]:
    """Let rotary modules give float64 cosines and sines to float64 hidden states; other dtypes keep the model's."""
    found = [m for m in model.modules() if any(name.endswith("inv_freq") for name, _ in m.named_buffers(recurse=False))]
    handles = [module.register_forward_hook(_sharpen, with_kwargs=True) for module in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sharpen(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    cos, sin = output
    if cos.dtype != torch.float64:
        return output
    positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    layer_type = kwargs.get("layer_type", args[2] if len(args) > 2 else None)  # noqa: PLR2004 - hidden, positions, type
    scaling = getattr(module, f"{layer_type}_attention_scaling", None) or module.attention_scaling
    if not positions.any():  # position 0, whatever the layout: no rotation, the attention scaling alone
        return torch.full_like(cos, scaling), torch.zeros_like(sin)
    # Only models that are fed their ranks (`steps`) come here, and they have the half-split layout.
    tables = cos_sin(positions[0], module.inv_freq, torch.float64)
    return tuple(torch.cat([table, table], dim=-1)[None] * scaling for table in tables)
