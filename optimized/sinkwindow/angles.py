"""Cosines and sines from float64 angles, in the model's own layout.

transformers makes angles in float32 from a position: at rank 1,000 that is as good as float32 gets, at natural position
100,000 a hundred times worse. The window's keys stand at natural positions, so theirs are made again.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor, nn

from sinkwindow.attention import exact_from
from sinkwindow.families import frequencies

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["sharpen"]

# How rotary modules lay out one number per channel pair over the channels.
LAYOUTS: Final[tuple[Callable[[Tensor], Tensor], ...]] = (
    lambda table: table.repeat(*[1] * (table.dim() - 1), 2),  # halves side by side
    lambda table: table.repeat_interleave(2, dim=-1),  # pairs side by side
    lambda table: table,
)
# For each table that a module returns: whether it is cosines (0) or sines (1), and its layout.
Form = tuple[int, int]
_forms: weakref.WeakKeyDictionary[nn.Module, dict[str | None, tuple[Form, ...]]] = weakref.WeakKeyDictionary()


def sharpen(module: nn.Module, arguments: dict[str, Any], output: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Make a rotary module's tables again, where float32 angles are worse than those of a rank.

    Below that, float32 models keep their own numbers bit for bit. Half dtypes do everywhere: their rounding of cosines
    outweighs any angle's. Positions that come as float64 are a ring's, which have no bound: there all tables are made
    again.

    Args:
        module: The rotary module.
        arguments: Of its forward, by name.
        output: What it returned.

    Returns:
        The tables, ``None`` to leave them.
    """
    positions, states = arguments["position_ids"], arguments["x"]
    if positions.is_floating_point():
        return tuple(table.to(states.dtype) for table in _sharp(module, positions, arguments.get("layer_type")))
    start = exact_from()
    if start is None or states.dtype not in (torch.float32, torch.float64) or states.device.type == "mps":
        return None  # mps has no float64
    sharp = _sharp(module, positions, arguments.get("layer_type"))
    if states.dtype == torch.float64:
        return sharp
    near = positions[..., None] < start
    return tuple(torch.where(near, *pair).to(states.dtype) for pair in zip(output, sharp, strict=True))


def _sharp(module: nn.Module, positions: Tensor, layer_type: str | None) -> tuple[Tensor, ...]:
    """Give what the module returns, from float64 angles and in float64."""
    exact = _tables(module, positions, layer_type)
    return tuple(LAYOUTS[layout](exact[which]) for which, layout in _form(module, layer_type))


def _tables(module: nn.Module, positions: Tensor, layer_type: str | None) -> tuple[Tensor, Tensor]:
    """Give cosines and sines, ``[..., pairs]`` float64, times the module's attention scaling."""
    angles = positions[..., None].double() * frequencies(module, layer_type).double()
    scale = float(getattr(module, f"{layer_type}_attention_scaling", getattr(module, "attention_scaling", 1.0)))
    return angles.cos() * scale, angles.sin() * scale


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]  # noqa: SLF001
def _form(module: nn.Module, layer_type: str | None) -> tuple[Form, ...]:
    """Find out once what a module returns, by asking it for three positions."""
    known = _forms.setdefault(module, {})
    if layer_type not in known:
        device = frequencies(module, layer_type).device
        positions = torch.arange(1, 4, device=device)[None]
        extra = {} if layer_type is None else {"layer_type": layer_type}
        states = torch.zeros(1, 3, 1, device=device)
        tables = cast("tuple[Tensor, ...]", module.forward(states, position_ids=positions, **extra))
        exact = _tables(module, positions, layer_type)
        known[layer_type] = tuple(_match(table, exact) for table in tables)
    return known[layer_type]


def _match(table: Tensor, exact: tuple[Tensor, Tensor]) -> Form:
    """Find the form of a table, the nearest of those that have its width."""
    errors = {
        (which, layout): float((LAYOUTS[layout](exact[which]) - table).abs().max())
        for which in range(len(exact))
        for layout in range(len(LAYOUTS))
        if LAYOUTS[layout](exact[which]).shape == table.shape
    }
    return min(errors, key=errors.__getitem__)
