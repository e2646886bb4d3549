"""Float64 models that compute in float64 throughout.

transformers computes root mean square norms in float32 whatever the model's dtype. Two ways of computing the same
float64 number differ by 1e-16; if a rounding boundary of float32 lies between them, the difference becomes 1e-8. That
is more than the 1e-9 that the tests allow, and not an error of the cache. Tests of exactness therefore keep the norms
of their models in float64.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn


class _StayWide(TorchFunctionMode):
    """Keep float64 tensors in float64 where the code converts them to float32."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        narrows = func is Tensor.float or (func is Tensor.to and torch.float32 in (*args[1:], *named.values()))
        return args[0] if narrows and args[0].dtype == torch.float64 else func(*args, **named)


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with _StayWide():
        return type(module).forward(module, *args, **kwargs)


def keep_norms_wide(model: nn.Module) -> None:
    """Make every norm of a float64 model compute in float64."""
    for module in model.modules():
        if type(module).__name__.endswith("Norm"):
            module.forward = functools.partial(_forward, module)
