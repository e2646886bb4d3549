"""Cosines and sines from float64 angles, in the model's own layout.

transformers makes angles in float32 from a position: at rank 1,000 that is as good as float32 gets, at natural position
100,000 a hundred times worse. Window keys are at natural positions, so their tables are made again. The call says so
by the dtype of its positions, which nothing else shares: float64, or int32 where they index a table of the model.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor, nn

from sinkwindow.model.rope import TABLE, attention_scaling, buffer_name, frequencies

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

# How rotary modules lay out one number per channel pair over the channels.
LAYOUTS: Final[tuple[Callable[[Tensor], Tensor], ...]] = (
    lambda table: table.repeat(*[1] * (table.dim() - 1), 2),  # halves side by side
    lambda table: table.repeat_interleave(2, dim=-1),  # pairs side by side
    lambda table: table,
)
# The buffer that a module's angles come from, what its cosines and sines are multiplied by, and for each table that it
# returns whether that is cosines (0) or sines (1), and its layout.
Form = tuple[str, float, tuple[tuple[int, int], ...]]
_forms: weakref.WeakKeyDictionary[nn.Module, dict[str | None, Form]] = weakref.WeakKeyDictionary()
# Modules that were hooked, by ``id``: that is a constant for every release of the compiler, a module is not.
hooked: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


def marked(
    positions: Tensor, decoder: PreTrainedModel, reach: int, float32_from: int, *, changes: bool, table: bool
) -> Tensor:
    """Return a call's positions, marked where the model's own float32 angles are not good enough.

    They never are for a float64 model. Others keep their own numbers, bit for bit, below the positions that a list can
    fill, and in half dtypes as long as their rounding of a cosine outweighs that of the angle. Where frequencies depend
    on the largest position of a call, they need not be those of the cached keys.

    Args:
        positions: ``[lanes, columns]`` int64.
        decoder: The model.
        reach: The position farthest from 0.
        float32_from: Where float32 angles stop being good enough for a float32 model.
        changes: Whether the model's frequencies depend on the largest position of a call.
        table: Whether positions index a table of the model.
    """
    dtype = decoder.dtype
    hidden = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps  # positions whose angles are as fine as the dtype
    exact = changes or dtype == torch.float64 or reach > max(float32_from, hidden)
    if not exact or positions.device.type == "mps":  # mps has no float64
        return positions
    return positions.int() if table else positions.double()


def recompute_tables(module: nn.Module, arguments: dict[str, Any], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return a rotary module's tables from float64 angles if its positions are marked, else its output.

    Copies of hooked modules, which have inherited the hooks and are not in ``hooked``, keep their output too.
    """
    positions, layer_type = arguments.get("position_ids"), arguments.get("layer_type")
    marks = torch.int32 if hasattr(module, TABLE) else torch.float64
    if positions is None or positions.dtype != marks or positions.is_meta:
        return output
    if positions.dim() > 2:  # noqa: PLR2004 - three kinds of positions, equal in every text (M-RoPE)
        positions = positions[0]
    form = _form(id(module), layer_type)
    if form is None:
        return output
    name, scale, forms = form
    exact, tables = _tables(positions, frequencies(module, name), scale), []
    for which, layout in forms:
        tables.append(LAYOUTS[layout](exact[which]).to(arguments["x"].dtype))
    return tuple(tables)


def _tables(positions: Tensor, inv_freq: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, ``[..., pairs]`` float64, times ``scale``."""
    angles = positions[..., None].double() * inv_freq.to(positions.device, torch.float64)
    return angles.cos() * scale, angles.sin() * scale


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]  # noqa: SLF001
def _form(number: int, layer_type: str | None) -> Form | None:
    """Return what the hooked module with this ``id`` returns: found out once, by asking it for three positions."""
    module = hooked.get(number)
    if module is None:
        return None
    known = _forms.setdefault(module, {})
    if layer_type not in known:
        name, scale = buffer_name(module, layer_type), attention_scaling(module, layer_type)
        inv_freq, device = frequencies(module, name), getattr(module, name).device
        positions = torch.arange(1, 4, device=device)[None]
        extra = {} if layer_type is None else {"layer_type": layer_type}
        states = torch.zeros(1, 3, 1, dtype=torch.float32, device=device)
        tables = cast("tuple[Tensor, ...]", module.forward(states, position_ids=positions, **extra))
        exact = _tables(positions, inv_freq, scale)
        known[layer_type] = name, scale, tuple(_match(table, exact) for table in tables)
    return known[layer_type]


def _match(table: Tensor, exact: tuple[Tensor, Tensor]) -> tuple[int, int]:
    """Return whether a table is cosines or sines and its layout: the nearest of those that have its width."""
    errors = {
        (which, layout): float((LAYOUTS[layout](exact[which]) - table).abs().max())
        for which in range(len(exact))
        for layout in range(len(LAYOUTS))
        if LAYOUTS[layout](exact[which]).shape == table.shape
    }
    return min(errors, key=errors.__getitem__)
