"""Caches as files: a safetensors file whose header says what the tensors are, written whole or not at all.

The header is JSON: the format's number, the settings of the cache, the fingerprint of its model, what the stream has
counted, and a checksum of all that and of the tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from contextlib import suppress
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sinkwindow.arguments import read_path
from sinkwindow.lanes import Lane
from sinkwindow.storage.bank import Bank, KeyValue
from sinkwindow.storage.slots import PoolLane, Slots
from sinkwindow.stream.state import CallRecord, Snapshot, State

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

FORMAT = 1  # changes when a file's content is read in another way
HEADER, CHECKSUM = "sinkwindow", "sha256"  # names in the metadata
COUNTS = ("columns", "batch", "num_evictions", "forwarded", "forgot", "recording")


def write(path: str | os.PathLike[str], snapshot: Snapshot) -> None:
    """Write a snapshot to a file, in the place of what is there.

    It is written beside it, flushed to the disk and renamed: at any moment there is the old file or the new one.

    Raises:
        TypeError: ``path`` is no path.
        OSError: It cannot be written; what is there is unchanged.
    """
    target, tensors = read_path("path", path), _tensors(snapshot.state)
    header = json.dumps(
        {"format": FORMAT, "settings": snapshot.settings, "model": snapshot.model, "state": _counts(snapshot.state)}
    )
    part = target.with_name(f".{uuid.uuid4().hex}.part")
    try:
        part.touch(exist_ok=False)
        save_file(tensors, part, {HEADER: header, CHECKSUM: _checksum(header, tensors)})
        _flush(part)
        part.replace(target)
        _flush(target.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"The cache cannot be saved to path {target}, which is unchanged: {reason}.") from error
    finally:
        with suppress(OSError):
            part.unlink()


def read(path: str | os.PathLike[str]) -> Snapshot:
    """Return the snapshot in a file, its tensors on the CPU.

    Raises:
        TypeError: ``path`` is no path.
        OSError: The file cannot be read.
        ValueError: It is no file of a cache, is damaged, or has another format.
    """
    path = read_path("path", path)
    if not path.is_file():
        raise FileNotFoundError(f"path {path} is no file.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if HEADER not in metadata:
                raise ValueError(f"{path} is a safetensors file, but not one that StreamingCache.save has written.")
            header = metadata[HEADER]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is no file that StreamingCache.save has written, or is cut off: {error}") from error
    if metadata.get(CHECKSUM) != _checksum(header, tensors):
        raise ValueError(f"{path} is damaged: its content is not what was written. Use another copy.")
    content = json.loads(header)
    if content["format"] != FORMAT:
        age = "a newer" if content["format"] > FORMAT else "an older"
        raise ValueError(
            f"{path} has format {content['format']}, of {age} sinkwindow, and this one reads format {FORMAT}: "
            "load it with the release that wrote it."
        )
    return Snapshot(content["settings"], content["model"], _state(content["state"], tensors))


def placed(state: State, devices: Sequence[torch.device]) -> State:
    """Return a state with each layer's tensors on that layer's device."""

    def split(bank: Bank) -> list[Bank]:
        groups: dict[torch.device, list[int]] = {}
        for layer in bank.layers:
            groups.setdefault(devices[layer], []).append(layer)
        if len(groups) == 1:
            return [bank.map(lambda tensor: tensor.to(next(iter(groups))))]
        return [
            Bank(
                {layer: place for place, layer in enumerate(layers)},
                *(
                    KeyValue(*(tensor[[bank.layers[layer] for layer in layers]].to(device) for tensor in pair))
                    for pair in (bank.slots, bank.sinks)
                ),
            )
            for device, layers in groups.items()
        ]

    return state.with_banks([tuple(new for bank in slots.banks for new in split(bank)) for slots in state.pools])


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name != "posix" and path.is_dir():  # cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# -- a state as JSON and named tensors --------------------------------------------------------------------------------


def _tensors(state: State) -> dict[str, Tensor]:
    return {
        f"pool{index}.bank{number}.{name}": tensor.contiguous().cpu()
        for index, slots in enumerate(state.pools)
        for number, bank in enumerate(slots.banks)
        for name, tensor in zip(("keys", "values", "sink_keys", "sink_values"), bank.tensors, strict=True)
    }


def _counts(state: State) -> dict[str, Any]:
    return {
        **{name: getattr(state, name) for name in COUNTS},
        "lanes": [astuple(lane) for lane in state.lanes],
        "past": [astuple(record) for record in state.past],
        "pools": [
            {
                "end": slots.end,
                "lanes": [astuple(lane) for lane in slots.lanes],
                "banks": [list(bank.layers.items()) for bank in slots.banks],
            }
            for slots in state.pools
        ],
    }


def _state(counts: dict[str, Any], tensors: Mapping[str, Tensor]) -> State:
    pools = []
    for index, pool in enumerate(counts["pools"]):
        banks = []
        for number, layers in enumerate(pool["banks"]):
            name = f"pool{index}.bank{number}"
            slots = KeyValue(tensors[f"{name}.keys"], tensors[f"{name}.values"])
            sinks = KeyValue(tensors[f"{name}.sink_keys"], tensors[f"{name}.sink_values"])
            banks.append(Bank(dict(layers), slots, sinks))
        pools.append(Slots(tuple(banks), tuple(PoolLane(*lane) for lane in pool["lanes"]), pool["end"]))
    return State(
        pools=tuple(pools),
        lanes=tuple(Lane(*lane) for lane in counts["lanes"]),
        past=tuple(_record(*fields) for fields in counts["past"]),
        **{name: counts[name] for name in COUNTS},
    )


def _record(
    start: int, columns: int, real: list[Any], seen: list[int], evicted: list[list[int]], num_evictions: int
) -> CallRecord:
    return CallRecord(start, columns, tuple(real), tuple(seen), tuple(map(tuple, evicted)), num_evictions)
