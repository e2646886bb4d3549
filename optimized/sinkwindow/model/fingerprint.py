"""What a cache's content depends on: keys and values of one model, and one rank, mean nothing to another."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, cast

import torch

from sinkwindow.model.versions import ROPE_PARAMETERS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor, nn
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedModel

UNKNOWN = "unknown"  # weights that may be any
RANK = "rank"  # name of the entry that a whole model does not have
SAMPLES = 32  # values of each parameter: enough to tell checkpoints apart, in a millisecond for 300 parameters


def fingerprint(decoder: PreTrainedModel, frequencies: Iterable[Tensor]) -> dict[str, str]:
    """Return what tells a model from others, by name, whatever device it is on.

    Args:
        decoder: The module that makes keys and values.
        frequencies: Angles of its rotary modules, ``[pairs]`` each.

    Returns:
        Its type, dtype and layers, and digests of its rotation and of ``SAMPLES`` evenly spaced values of every
        parameter. Two models that differ in other values only are not told apart. If the model is split over ranks,
        also which rank of how many this is; the values are then those of its own share.
    """
    own = ranks(decoder)
    return {
        **({} if own is None else {RANK: "{} of {}".format(*own)}),
        "model type": str(decoder.config.model_type),
        "dtype": str(decoder.dtype),
        "number of layers": str(decoder.config.num_hidden_layers),
        "rotation": _digest(tensor.detach().to("cpu", torch.float64) for tensor in frequencies),
        "configuration": hashlib.sha256(_chosen(decoder).encode()).hexdigest(),
        "weights": UNKNOWN if _is_elsewhere(decoder) else _digest(_samples(decoder)),
    }


def ranks(decoder: nn.Module) -> tuple[int, int] | None:
    """Return this rank and the number of ranks if the model is split over them, ``None`` if it is whole.

    FSDP does not split a model: before a layer computes, its weights are gathered.
    """
    if next(_splits(decoder), None) is None:
        return None
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def check_rank(saved: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Refuse content of another rank, or of another number of ranks.

    Args:
        saved: The fingerprint of the model that the content is of.
        own: That of this model.

    Raises:
        ValueError: They are not of the same rank.
    """
    if saved.get(RANK) == own.get(RANK):
        return
    kinds = [f"rank {one[RANK]}" if RANK in one else "a whole model" for one in (saved, own)]
    raise ValueError(
        f"The snapshot is of {kinds[0]}, and this is {kinds[1]}: where a model is split over ranks, keys and values of "
        "each are those of its own heads. Go on with as many ranks, each with its own snapshot or file, or feed the "
        "text again."
    )


def check_agreement(model: nn.Module, content: str | Exception) -> None:
    """Refuse content that is not the same stream on all ranks of a model that is split; every rank must call this.

    Args:
        model: The model.
        content: Where in which text this rank is, or why it cannot go on.

    Raises:
        ValueError: The ranks' contents differ, or another rank cannot go on.
    """
    group = next(_splits(model), None)
    if group is None:
        return
    failed = isinstance(content, Exception)
    found: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(found, (failed, str(content)), group=group)
    if failed:
        return  # the caller raises its own error
    for rank, (failure, text) in enumerate(found):
        if failure:
            raise ValueError(f"Another rank, {rank} of the {len(found)} that share this model, cannot load: {text}")
    if len(set(found)) > 1:
        raise ValueError(
            "The files of the ranks are of different moments: some of them were saved when others were not. Use files "
            "of one save, or feed the text again."
        )


def _splits(decoder: nn.Module) -> Iterator[ProcessGroup]:
    """Yield the ranks that share a parameter, each with its own part to compute with."""
    gathered = _gathered(decoder)
    parameters: Iterable[Any] = decoder.parameters()
    for parameter in parameters:  # DTensors, some of them
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is None:
            continue
        for number, placement in enumerate(parameter.placements):
            group = mesh.get_group(number)
            if not placement.is_replicate() and mesh.size(number) > 1 and group.group_name not in gathered:
                yield group


def _gathered(decoder: nn.Module) -> set[str]:
    """Return the names of the groups over which FSDP gathers weights before a layer computes."""
    found, modules = set[str](), cast("Iterator[Any]", decoder.modules())
    for module in modules:
        state = module._get_fsdp_state() if hasattr(module, "set_reshard_after_backward") else None  # noqa: SLF001
        group = getattr(state, "_fsdp_param_group", None)
        if group is not None:  # one that has no parameters of its own gathers nothing
            mesh = group.mesh_info.mesh
            found |= {mesh.get_group(number).group_name for number in range(mesh.ndim)}
    return found


def _is_elsewhere(decoder: nn.Module) -> bool:
    """Return whether there are weights of which this process has no values between calls: off-loaded, or of FSDP."""
    gathers = any(hasattr(module, "set_reshard_after_backward") for module in decoder.modules())
    return gathers or any(one.is_meta for one in decoder.parameters())


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
    if hasattr(parameter, "to_local"):  # a DTensor, whose other values are on other ranks
        parameter = parameter.to_local()
    if not parameter.numel():
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
