"""What a cache's content depends on: keys and values of one model mean nothing to another."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch

from sinkwindow.model.versions import ROPE_PARAMETERS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor
    from transformers import PreTrainedModel

UNKNOWN = "unknown"  # weights that may be any
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
        "configuration": hashlib.sha256(_chosen(decoder).encode()).hexdigest(),
        # Off-loaded weights are nowhere to be seen between calls.
        "weights": UNKNOWN if any(one.is_meta for one in decoder.parameters()) else _digest(_samples(decoder)),
    }


def _chosen(decoder: PreTrainedModel) -> str:
    """Return what changes keys and values without changing a weight."""
    names = (ROPE_PARAMETERS, "hidden_act", "rms_norm_eps", "layer_norm_eps", "attention_multiplier")
    return json.dumps({name: getattr(decoder.config, name, None) for name in names}, sort_keys=True, default=str)


def _samples(decoder: PreTrainedModel) -> list[Tensor]:
    """Return samples of all parameters, in their order, on the CPU; of some kinds of tensors only the shape.

    They are fetched together from each device: hundreds of small copies would take their time.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    samples: dict[int, Tensor] = {}
    for number, parameter in enumerate(decoder.parameters()):
        samples[number] = torch.tensor([parameter.dim(), *parameter.shape], device="cpu")
        taken = _taken(parameter.detach())
        if taken is not None:
            groups.setdefault((taken.device, taken.dtype), []).append((number, taken))
    for group in groups.values():
        fetched = torch.split(torch.cat([taken for _, taken in group]).cpu(), SAMPLES)
        samples |= {number: values for (number, _), values in zip(group, fetched, strict=True)}
    return [samples[number] for number in sorted(samples)]


def _taken(parameter: Tensor) -> Tensor | None:
    """Return evenly spaced values, ``[SAMPLES]``; ``None`` where there are none, or torch cannot take any."""
    if not parameter.numel() or hasattr(parameter, "placements"):  # a DTensor: its values are on several ranks
        return None
    places = torch.linspace(0, parameter.numel() - 1, SAMPLES, dtype=torch.float64, device="cpu").long()
    small = parameter.view(torch.uint8) if parameter.itemsize == 1 else parameter  # float8 has no `take`
    try:
        return small.take(places.to(parameter.device))
    except NotImplementedError:  # a layout like sparse or a class of its own has none; the shape counts
        return None


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
