"""What a cache's content depends on: keys and values of one model mean nothing to another."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor
    from transformers import PreTrainedModel

SAMPLES = 32  # values of each parameter: enough to tell checkpoints apart, in a millisecond for 300 parameters


def fingerprint(decoder: PreTrainedModel, frequencies: Iterable[Tensor]) -> dict[str, str]:
    """Return what tells a model from others, by name, whatever device it is on.

    Args:
        decoder: The module that makes keys and values.
        frequencies: Angles of its rotary modules, ``[pairs]`` each.

    Returns:
        Its type, dtype and layers, and digests of its rotation and of ``SAMPLES`` evenly spaced values of every
        parameter. Two models that differ in other values only are not told apart.
    """
    return {
        "model type": str(decoder.config.model_type),
        "dtype": str(decoder.dtype),
        "number of layers": str(decoder.config.num_hidden_layers),
        "rotation": _digest(tensor.detach().to("cpu", torch.float64) for tensor in frequencies),
        "weights": _digest(_samples(decoder)),
    }


def _samples(decoder: PreTrainedModel) -> list[Tensor]:
    """Return samples of all parameters on the CPU; of those that are off-loaded only the shape."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    shapes = []
    for parameter in decoder.parameters():
        shapes += [parameter.dim(), *parameter.shape]
        if parameter.numel() and not parameter.is_meta:
            places = torch.linspace(0, parameter.numel() - 1, SAMPLES, dtype=torch.float64, device="cpu").long()
            taken = parameter.detach().take(places.to(parameter.device))
            groups.setdefault((taken.device, taken.dtype), []).append(taken)
    return [torch.tensor(shapes, device="cpu"), *(torch.cat(group).cpu() for group in groups.values())]


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
