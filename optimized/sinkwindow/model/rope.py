"""How a model rotates: its frequencies, how its own function pairs channels, and how far positions may go."""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sinkwindow.model.versions import ROPE_PARAMETERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedConfig, PreTrainedModel

# Rope types whose frequencies switch on the largest position of a call: there, positions must stay below the
# trained length, whereas every other type only ever sees differences.
LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})
SCALE = "llama_4_scaling_beta"  # of queries, by position
TABLE = "embed_positions"  # sines and cosines by position, which positions must not outrun


def rotary_modules(decoder: nn.Module) -> list[nn.Module]:
    """List the modules that turn positions into cosines and sines."""
    return [module for module in decoder.modules() if _frequency_names(module)]


def _frequency_names(module: nn.Module) -> list[str]:
    """Name the buffers of frequencies: one, or one for each type of layer."""
    names = [name for name, _ in module.named_buffers(recurse=False) if name.endswith(("inv_freq", TABLE))]
    return [name for name in names if "original" not in name]


def frequencies(module: nn.Module, name: str) -> Tensor:
    """Return a rotary module's frequencies in the buffer ``name``, ``[pairs]``, on the buffer's device.

    GPT-J and CodeGen keep a table of sines and cosines instead, made from these frequencies; they are on the CPU.
    """
    if name == TABLE:
        width = cast("int", module.pos_embd_dim)
        return 1.0 / (10_000 ** (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width))
    return cast("Tensor", getattr(module, name)).detach()


def attention_scaling(module: nn.Module, layer_type: str | None = None) -> float:
    """Return what a rotary module's cosines and sines are multiplied by, below the length first trained on."""
    config: Any = getattr(module, "config", None)
    if getattr(config, "model_type", None) == "phimoe" and config.rope_parameters["rope_type"] != "default":
        return float(config.rope_parameters["short_mscale"])
    return float(getattr(module, f"{layer_type}_attention_scaling", getattr(module, "attention_scaling", 1.0)))


def buffer_name(module: nn.Module, layer_type: str | None) -> str:
    """Return the buffer that a rotary module's angles come from, for a type of layer where they differ.

    Of types that overwrite theirs on long calls, it is the one that they started with.
    """
    if hasattr(module, TABLE):
        return TABLE
    prefix = f"{layer_type}_" if hasattr(module, f"{layer_type}_inv_freq") else ""
    return _first(module, f"{prefix}inv_freq")


def _first(module: nn.Module, name: str) -> str:
    original = name.replace("inv_freq", "original_inv_freq")
    kept = isinstance(getattr(module, original, None), Tensor) and _types_of(module) & LENGTH_DEPENDENT_ROPE
    return original if kept else name


def _types_of(module: nn.Module) -> set[str]:
    kind = getattr(module, "rope_type", "default")
    return {*kind.values()} if isinstance(kind, dict) else {cast("str", kind)}


@dataclass(frozen=True, slots=True)
class Pairing:
    """How a model's own function turns a vector.

    Attributes:
        interleaved: Whether it pairs channels ``(2 i, 2 i + 1)`` rather than halves.
        direction: 1, or -1 where it turns backwards.
    """

    interleaved: bool
    direction: int


def pairing(decoder: nn.Module) -> Pairing | None:
    """Return what the rotary functions in the files of a model's parts do; ``None`` where they do not agree."""
    files = {type(part).__module__ for part in decoder.modules()}
    functions = {
        function
        for file in files
        for name, function in vars(sys.modules.get(file, object)).items()
        if name.startswith("apply_rotary") and not name.endswith("vision") and callable(function)
    }
    found = {_pairing_of(function) for function in functions}
    return found.pop() if len(found) == 1 else None


@functools.cache
@torch.no_grad()
def _pairing_of(function: Callable[..., Any]) -> Pairing | None:
    """Find out by turning the first of eight channels by a quarter: it becomes plus or minus the one it is paired with.

    Cosines and sines are given for all channels first, then for all pairs: functions take the one or the other.
    """
    vector = torch.zeros(1, 1, 1, 8, dtype=torch.float32, device="cpu")
    vector[..., 0] = 1.0
    parameters = inspect.signature(function).parameters
    for width in (8, 4):
        sines = torch.ones(1, 1, width, dtype=torch.float32, device="cpu")
        quarter = {"cos": sines * 0, "sin": sines, "freqs_cis": sines * 1j}
        needed = [name for name, it in parameters.items() if name in quarter or it.default is inspect.Parameter.empty]
        try:
            turned = function(**{name: quarter.get(name, vector) for name in needed})
        except (RuntimeError, TypeError, ValueError):
            continue
        turned = (turned[0] if isinstance(turned, tuple) else turned).flatten()
        for channel, interleaved in ((1, True), (4, False)):
            if abs(float(turned[channel])) == 1 and not turned[[c for c in range(8) if c != channel]].any():
                return Pairing(interleaved, int(turned[channel]))
    return None


@dataclass(slots=True, eq=False)
class Frequencies:
    """The buffer that a rotary module's angles come from, as it was once.

    Attributes:
        module: The module.
        name: The buffer's name.
        values: A copy of what it held.
        stamp: Which buffer had these values when they were last compared: its ``id``, address and version.
        kept: That buffer, and its memory: no other one has the same ``id`` or address.
    """

    module: weakref.ref[nn.Module]
    name: str
    values: Tensor
    stamp: tuple[int, int, int | None] | None = None
    kept: tuple[Tensor, ...] = ()

    def are_unchanged(self) -> bool:
        """Return whether the module still has these values: a move to another device keeps them, a cast need not."""
        now = getattr(self.module(), self.name, None)
        if not isinstance(now, Tensor) or now.is_meta:  # off-loaded until the module runs
            return True
        version = None if now.is_inference() else now._version  # noqa: SLF001 - counts changes in place
        stamp = id(now), now.data_ptr(), version
        if stamp == self.stamp and version is not None:
            return True
        if not torch.equal(now.to("cpu", torch.float64), self.values.to("cpu", torch.float64)):
            return False
        self.stamp, self.kept = stamp, (now, now.detach())
        return True


def frequencies_of(decoder: nn.Module) -> list[Frequencies]:
    """Return what all rotary modules' angles come from."""
    found = []
    for module in rotary_modules(decoder):
        for name in _frequency_names(module):
            first = _first(module, name)
            found.append(Frequencies(weakref.ref(module), first, getattr(module, first).detach().clone()))
    return found


def rope_types(decoder: PreTrainedModel) -> set[str]:
    """Return the rope types of all rotary modules and types of layers."""
    return set().union(*map(_types_of, rotary_modules(decoder)))


def has_table(decoder: PreTrainedModel) -> bool:
    """Return whether the model looks up sines and cosines by position."""
    return any(hasattr(module, TABLE) for module in rotary_modules(decoder))


def trained_length(config: PreTrainedConfig) -> int | None:
    """Read how far positions may go; longrope and scaled queries differ beyond the length first trained on."""
    lengths = [
        rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
        for rope in _rope_parameters(config)
        if "longrope" in (rope.get("rope_type"), rope.get("type")) or SCALE in rope  # "type" in transformers 4
    ]
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    return int(min(lengths)) if lengths else None if length is None else int(length)


@dataclass(frozen=True, slots=True)
class Switch:
    """Where a family changes over to other frequencies.

    Attributes:
        file: The module that defines it.
        length: The length first trained on [tokens].
    """

    file: str
    length: int


def length_for(columns: int, switch: Switch | None) -> int:
    """Return the length of a cache as its caller must see it.

    Phi-3 and Phi-3.5-MoE prepare inputs for ``generate`` themselves. Once a text is longer than ``switch.length``, they
    leave out a cache that is not. The positions of a stream stay below that length, so the cache must stay.
    """
    if switch is None:
        return columns
    asks = sys._getframe(2)  # noqa: SLF001 - whoever called the cache
    prepares = asks.f_code.co_name == "prepare_inputs_for_generation" and asks.f_globals["__name__"] == switch.file
    return max(columns, switch.length + 1) if prepares else columns


def scales_queries(config: PreTrainedConfig) -> bool:
    """Return whether queries are scaled by their position beyond the length that the model was first trained on."""
    return any(SCALE in rope for rope in _rope_parameters(config))


def has_alibi(config: PreTrainedConfig) -> bool:
    """Return whether scores have a bias by distance instead, which follows the order of the keys."""
    return config.model_type in {"bloom", "mpt"} or bool(getattr(config, "alibi", False))


def _rope_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return the parameters of RoPE: one dict, or one for each type of layer."""
    rope = getattr(config, ROPE_PARAMETERS, None) or {}
    each = [value for value in rope.values() if isinstance(value, dict)]
    return each or [rope]
