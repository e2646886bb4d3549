"""A float64 copy of a model that computes in float64 throughout.

transformers computes norms, and some softmaxes, in float32 whatever the model's dtype. Two ways of computing the same
float64 number differ by 1e-16; if a rounding boundary of float32 lies between them, the difference becomes 1e-8. That
is more than is allowed where a cache is compared in float64, and not an error of the cache.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from sinkwindow_lab.errors import LabError

SOFTMAX = (torch.softmax, torch.nn.functional.softmax, Tensor.softmax)


class StayWide(TorchFunctionMode):
    """Keep float64 tensors in float64 where the code converts them to float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        named = kwargs or {}
        narrows = func is Tensor.float or (func is Tensor.to and torch.float32 in (*args[1:], *named.values()))
        if narrows and args[0].dtype == torch.float64:
            return args[0]
        if func in SOFTMAX and args and args[0].dtype == torch.float64 and named.get("dtype") == torch.float32:
            named = named | {"dtype": torch.float64}
        return func(*args, **named)


def wide_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a float64 copy of a model, of which every layer and every norm computes in float64."""
    try:
        twin = copy.deepcopy(model).double()
    except (TypeError, ValueError, RuntimeError) as error:  # quantized, on a device without float64, or out of memory
        raise LabError(
            f"the model cannot be copied to float64 ({error}); try --device cpu, or a smaller one"
        ) from error
    if hasattr(twin, "set_experts_implementation"):
        twin.set_experts_implementation("eager")  # grouped matrix products do not support float64
    keep_wide(decoder_layers(twin))  # not the whole model: it rotates by float32 angles
    keep_norms_wide(twin)
    return twin


def keep_norms_wide(model: nn.Module) -> None:
    """Make every norm of a float64 model compute in float64."""
    keep_wide(module for module in model.modules() if type(module).__name__.endswith("Norm"))


def keep_wide(modules: Iterable[nn.Module]) -> None:
    """Make modules of a float64 model compute in float64."""
    for module in modules:
        module.forward = functools.partial(_forward, module)


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with StayWide():
        return type(module).forward(module, *args, **kwargs)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return a model's decoder layers in order; none if it does not keep them in one list."""
    count = model.config.get_text_config().num_hidden_layers
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    return list(next(lists, ()))
