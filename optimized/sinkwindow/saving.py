"""Caches as files: a safetensors file whose header says what the tensors are, written whole or not at all.

The header is JSON: the format's number, the settings of the cache, the fingerprint of its model, what the stream has
counted, what a chat keeps beside it, and a checksum of all that and of the tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from contextlib import suppress
from dataclasses import astuple, replace
from glob import escape
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sinkwindow.arguments import read_path
from sinkwindow.lanes import Lane, batch_slice
from sinkwindow.model.families import Family
from sinkwindow.storage.bank import Bank, KeyValue
from sinkwindow.storage.slots import PoolLane, Slots
from sinkwindow.storage.states import CONV, PAST, RECURRENT
from sinkwindow.stream.history import compact
from sinkwindow.stream.state import CallRecord, Snapshot, State

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from torch import Tensor

    from sinkwindow.storage.slots import Pool

T = TypeVar("T", Lane, PoolLane)

FORMAT = 2  # changes when a file's content is read in another way
HEADER, CHECKSUM = "sinkwindow", "sha256"  # names in the metadata
SETTINGS = {
    **dict.fromkeys(("num_sinks", "window", "buffer"), int),
    **dict.fromkeys(("evict", "positions", "on_overflow"), str),
    "static": bool,
}
# What reading a header without sense raises.
NONSENSE = (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError)
COUNTS = ("columns", "batch", "forwarded", "forgot", "recording")


def encoded(snapshot: Snapshot) -> bytes:
    """Return a snapshot as the content of a file."""
    tensors = _tensors(snapshot.state, static=snapshot.settings["static"])
    content: dict[str, Any] = {"format": FORMAT, "settings": snapshot.settings, "model": snapshot.model}
    content |= {"state": _counts(snapshot.state)} | ({"note": snapshot.state.note} if snapshot.state.note else {})
    header = json.dumps(content, default=list)  # of a range
    return save(tensors, {HEADER: header, CHECKSUM: _checksum(header, tensors)})


def write(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file, in the place of what is there.

    It is written beside it, flushed to the disk and renamed: at any moment there is the old file or the new one. The
    new one has the old one's permissions, and a link goes on naming it.

    Raises:
        TypeError: ``path`` is no path.
        OSError: It cannot be written; what is there is unchanged.
    """
    named = target = read_path("path", path)
    with suppress(OSError, ValueError):  # of a path that no system takes
        target = Path(os.path.realpath(named))
    part = target.parent / f".{uuid.uuid4().hex}.part"
    try:
        if target.exists():
            part.touch(mode=0o600)  # nobody reads it who may not read what it replaces
        part.write_bytes(content)
        _flush(part, os.O_RDWR)
        with suppress(OSError):  # there is none, or its file system has no permissions
            shutil.copymode(target, part)
        part.replace(target)
    except (OSError, ValueError) as error:  # a ValueError of a path that no system takes
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"The cache cannot be saved to path {named}, which is unchanged: {reason}.") from error
    finally:
        with suppress(OSError, ValueError):
            part.unlink()
    with suppress(OSError):  # the file is there already, and not every system can flush a folder
        _flush(target.parent)


def rank_file(path: str | os.PathLike[str], rank: int, world: int) -> Path:
    """Return the file of a rank: all ranks are given one path, and none overwrites another's file."""
    plain = read_path("path", path)
    mark = f".rank{rank}of{world}"
    has_mark = mark in (plain.suffix, Path(plain.stem).suffix)
    return plain if has_mark else plain.with_name(f"{plain.stem}{mark}{plain.suffix}")


def _found(path: Path) -> Path:
    """Return the file to read: this rank's, or the one that is named.

    Raises:
        FileNotFoundError: There is neither.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        own = rank_file(path, torch.distributed.get_rank(), torch.distributed.get_world_size())
        if own.is_file():
            return own
    if path.is_file():
        return path
    others = sorted(path.parent.glob(f"{escape(path.stem)}.rank*of*{escape(path.suffix)}"))
    way = "every rank loads the file that it has saved, in a run with as many ranks."
    more = f" {others[0].name} is of a model that was split: {way}" if others else ""
    raise FileNotFoundError(f"path {path} is no file.{more}")


def read(path: str | os.PathLike[str]) -> Snapshot:
    """Return the snapshot in a file, its tensors on the CPU.

    Raises:
        TypeError: ``path`` is no path.
        OSError: The file cannot be read.
        ValueError: It is no file of a cache, is damaged, or has another format.
    """
    path = _found(read_path("path", path))
    header, tensors = _content(path)
    try:
        content = json.loads(header)
        number = content["format"]
        if number == FORMAT:
            settings = content["settings"]
            if {name: type(value) for name, value in settings.items() if name != "family"} != SETTINGS:
                raise TypeError(f"settings {settings}")
            Family(**settings.get("family", {}))
            state = replace(_state(content["state"], tensors), note=dict(content.get("note", {})) or None)
            return Snapshot(settings, dict(content["model"]), state)
        age = "a newer" if number > FORMAT else "an older"
    except NONSENSE as error:
        raise ValueError(f"{path} is no file that StreamingCache.save has written: {error!r}.") from error
    raise ValueError(
        f"{path} has format {number}, of {age} sinkwindow, and this one reads format {FORMAT}: "
        "load it with the release that wrote it."
    )


def _content(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Return a file's header and tensors, once its checksum is right."""
    try:
        with torch.inference_mode(mode=False), safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if HEADER not in metadata:
                raise ValueError(f"{path} is a safetensors file, but not one that StreamingCache.save has written.")
            # Copies, since others can still write to the file that memory is mapped from; and in memory that is aligned
            # like the original's, on which the last bits of a product depend.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is no file that StreamingCache.save has written, or is cut off: {error}") from error
    if metadata.get(CHECKSUM) != _checksum(metadata[HEADER], tensors):
        raise ValueError(f"{path} is damaged: its content is not what was written. Use another copy.")
    return metadata[HEADER], tensors


def placed(state: State, devices: Sequence[torch.device | None]) -> State:
    """Return a state with each layer's tensors on that layer's device, where it is known."""

    def split(bank: Bank) -> list[Bank]:
        groups: dict[torch.device, list[int]] = {}
        for layer in bank.layers:
            groups.setdefault(devices[layer] or bank.slots.keys.device, []).append(layer)
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

    moved = state.with_banks([tuple(new for bank in slots.banks for new in split(bank)) for slots in state.pools])
    states = {key: tensor.to(devices[key[0]] or tensor.device) for key, tensor in state.states.items()}
    return replace(moved, states=states)


def _flush(path: Path, flags: int = os.O_RDONLY) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def position(snapshot: Snapshot) -> str:
    """Return where in which text a snapshot was taken: what all ranks of a split model have alike."""
    return json.dumps([snapshot.settings, _counts(snapshot.state), snapshot.state.note], default=list)


def _checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# -- a state as JSON and named tensors --------------------------------------------------------------------------------


def _tensors(state: State, *, static: bool) -> dict[str, Tensor]:
    found = {}
    for index, slots in enumerate(state.pools):
        for number, bank in enumerate(slots.banks):
            used = bank.slots if static else (_without_free(tensor, bank, slots, state) for tensor in bank.slots)
            names = ("keys", "values", "sink_keys", "sink_values")
            for name, tensor in zip(names, (*used, *bank.sinks), strict=True):
                found[f"pool{index}.bank{number}.{name}"] = tensor.contiguous().cpu()
    return found | {_state_name(*key): tensor.contiguous().cpu() for key, tensor in state.states.items()}


def _state_name(layer: int, kind: str, number: int) -> str:
    return f"layer{layer}.{kind}{number}"


def _without_free(tensor: Tensor, bank: Bank, slots: Slots, state: State) -> Tensor:
    """Return slots with zeros in the free ones, which may hold a text from before ``reset``, or anything.

    A ring has no need of it: all of it is written when it is filled.
    """
    copy, num_sinks = tensor.clone(), bank.sinks.keys.shape[3]
    copy[:, :, :, slots.end :] = 0
    for index, (lane, row) in enumerate(zip(state.lanes, slots.lanes, strict=True)):
        first = slots.end - (lane.seen - row.floor) - num_sinks
        copy[:, batch_slice(index, len(state.lanes)), :, : max(0, first)] = 0
    return copy


def _counts(state: State) -> dict[str, Any]:
    states = {"states": list(state.states)} if state.states else {}
    return states | {
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
        pools.append(Slots(tuple(banks), tuple(_made(PoolLane, lane) for lane in pool["lanes"]), pool["end"]))
    return State(
        pools=tuple(pools),
        lanes=tuple(_made(Lane, lane) for lane in counts["lanes"]),
        past=tuple(_record(*fields) for fields in counts["past"]),
        states={(layer, kind, i): tensors[_state_name(layer, kind, i)] for layer, kind, i in counts.get("states", ())},
        **{name: counts[name] for name in COUNTS},
    )


def _made(kind: type[T], values: list[int]) -> T:
    """Return an object of a dataclass with a value for each field, those with a default too."""
    return kind(**dict(zip(kind.__dataclass_fields__, values, strict=True)))


def _record(start: int, columns: int, real: list[Any], lanes: list[list[int]], evicted: list[list[int]]) -> CallRecord:
    made = tuple(_made(Lane, lane) for lane in lanes)
    return CallRecord(start, columns, tuple(map(compact, real)), made, tuple(map(tuple, evicted)))


# -- whether a state makes sense --------------------------------------------------------------------------------------


def check(state: State, pools: Sequence[Pool], layers: Collection[int] = ()) -> None:
    """Refuse a state that no stream holds.

    Args:
        state: From a file.
        pools: Of the stream that is to go on from it.
        layers: Those that keep a state.

    Raises:
        ValueError: Its counts, layers or shapes do not go together.
    """
    try:
        fits = _fits(state, pools) and _states_fit(state, layers)
    except NONSENSE:
        fits = False
    if not fits:
        raise ValueError("The file says what no cache of its sizes holds: StreamingCache.save has not written it.")


def _fits(state: State, pools: Sequence[Pool]) -> bool:
    lanes = len(state.lanes)
    return (
        all(type(number) is int and number >= 0 for number in _numbers(state))
        and (state.batch is None or state.batch > 0)
        and lanes in {1, state.batch}
        and {type(state.forgot), type(state.recording)} == {bool}
        and state.columns <= state.forwarded
        and all(lane.seen <= state.columns for lane in state.lanes)
        and all(
            len(record.evicted) == len(pools)
            and {len(record.real), *map(len, record.evicted)} == {len(record.lanes)} <= {1, lanes}
            for record in state.past
        )
        and all(_pool_fits(pool, slots, state) for pool, slots in zip(pools, state.pools, strict=True))
    )


def _states_fit(state: State, layers: Collection[int]) -> bool:
    found = {layer for layer, _, _ in state.states}
    return found == (set() if state.batch is None else set(layers)) and all(
        kind in {CONV, RECURRENT, PAST} and tensor.shape[0] == state.batch and tensor.dim() > 1
        for (_, kind, _), tensor in state.states.items()
    )


def _numbers(state: State) -> Iterator[int]:
    """Yield all numbers that count something."""
    yield from (state.columns, state.forwarded, state.batch or 0)
    for lane in chain(state.lanes, *(record.lanes for record in state.past)):
        yield from astuple(lane)
    for record in state.past:
        yield from (record.start, record.columns)
        yield from chain(*record.evicted, *(real or () for real in record.real))
    for row in chain(*(slots.lanes for slots in state.pools)):
        yield from (row.evicted, row.offset, row.floor, row.mark, row.placed + 1)


def _pool_fits(pool: Pool, slots: Slots, state: State) -> bool:
    rule, held = pool.retention, pool.held(slots, state.lanes)
    if any(lane.seen < row.evicted for lane, row in zip(state.lanes, slots.lanes, strict=True)):
        return False
    if state.batch is None or not slots.banks:
        return state.batch is None and not slots.banks and not state.columns
    size = slots.banks[0].slots.keys.shape[3]
    if not (rule.capacity <= size and (pool.static or held <= slots.end <= size)):
        return False
    for bank in slots.banks:
        front = (len(bank.layers), state.batch, bank.slots.keys.shape[2])
        shapes = [(*front, tokens, pair.shape[4]) for tokens in (size, rule.num_sinks) for pair in bank.slots]
        kinds = [(tensor.shape, tensor.dtype) for tensor in bank.tensors]
        in_order = list(bank.layers.values()) == list(range(len(bank.layers)))
        if not in_order or kinds != list(zip(shapes, [tensor.dtype for tensor in bank.slots] * 2, strict=True)):
            return False
    layers = [layer for bank in slots.banks for layer in bank.layers]
    return sorted(layers) == sorted(pool.layers) and (not pool.static or len(slots.banks) == len(layers))
