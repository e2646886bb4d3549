"""A GPU that exists only here: its tensors compute on the CPU, and mix with those of the CPU no more than CUDA's do.

A tensor that the cache makes on the CPU by mistake raises the error that it would raise on a GPU. There is one such
GPU, so a mix of two is not tested. A device is registered for the whole process: other tests run in other processes.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any, Final

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

NAME: Final = "pretend"
aten = torch.ops.aten
# Operations with tensors of two devices: copies, and reads and writes of tensors on a GPU with indices on the CPU. To
# operations on elements and to those that fill, a tensor of the CPU without dimensions is a number.
COPIES: Final = (aten.copy_.default, aten._to_copy.default)
INDEXED: Final = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
FILLS: Final = (aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor, *INDEXED[1:])


module: Any = ModuleType(f"torch.{NAME}")  # what torch asks of a kind of device
module._is_in_bad_fork = lambda: False
module.current_device, module.device_count = lambda: 0, lambda: 1
module.set_device = module.synchronize = module.manual_seed_all = module.set_rng_state = lambda *_: None
module.get_rng_state = lambda *_: torch.zeros(1, dtype=torch.uint8, device="cpu")
backend_registration._setup_privateuseone_for_python_backend(NAME, module)
GPU: Final = torch.device(NAME, 0)
torch._C._set_only_lift_cpu_tensors(True)  # noqa: FBT003 - `torch.tensor` makes a tensor on the CPU first, and copies it


class GpuTensor(torch.Tensor):
    """A tensor on the device, around the tensor on the CPU that has its values."""

    on_cpu: torch.Tensor

    def tolist(self) -> Any:
        """Return the values."""
        return self.on_cpu.tolist()

    def data_ptr(self) -> int:
        """Return the address."""
        return self.on_cpu.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Run an operation that is given such a tensor."""
        return run(operation, *args, **(kwargs or {}))


def wrap(values: torch.Tensor) -> GpuTensor:
    """Return a tensor on the device that has the values of one on the CPU, also later ones."""
    layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
    wrapper: Any = torch.Tensor._make_wrapper_subclass
    ours: GpuTensor = wrapper(GpuTensor, values.shape, **layout, device=GPU, requires_grad=values.requires_grad)
    ours.on_cpu = values
    return ours


def run(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation on the CPU; what it returns is on the device that CUDA would have chosen.

    Raises:
        RuntimeError: The tensors are on two devices, and CUDA's would not have mixed either.
    """
    if operation is aten._fused_sdp_choice.default:
        return 0  # plain operations: the fused ones are different for each device
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    ours = {id(one.on_cpu): one for one in tensors if isinstance(one, GpuTensor)}
    first_is_ours = bool(args) and isinstance(args[0], GpuTensor)
    indices = set(map(id, tree_leaves(args[1]))) if operation in INDEXED and first_is_ours else set()
    takes_numbers = first_is_ours and (operation in FILLS or torch.Tag.pointwise in operation.tags)
    for one in tensors:
        allowed = isinstance(one, GpuTensor) or id(one) in indices or (takes_numbers and one.dim() == 0)
        if ours and not allowed and operation not in COPIES:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME} and cpu: {operation}")
    target = kwargs.get("device")
    to_gpu = bool(ours) if target is None else torch.device(target).type == NAME
    if operation is aten.copy_.default:
        to_gpu = first_is_ours
    args, kwargs = tree_map_only(GpuTensor, lambda one: one.on_cpu, (args, kwargs))
    if to_gpu and target is not None:
        kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
    result = operation(*args, **kwargs)
    if not to_gpu:
        return result

    def on_gpu(one: torch.Tensor) -> GpuTensor:
        found = ours.get(id(one))  # what changes its argument returns it
        if found is not None and found.shape != one.shape:
            # What is asked for its shape would go on with the old one.
            raise NotImplementedError(f"The device of the tests cannot change a tensor's shape: {operation}")
        return wrap(one) if found is None else found

    return tree_map_only(torch.Tensor, on_gpu, result)


library: Any = torch.library.Library("_", "IMPL")  # type: ignore[no-untyped-call]
library.fallback(run, "PrivateUse1")  # operations that are given no tensor, such as `torch.zeros`
factories: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
# By default these make an empty tensor, and change its shape.
for factory in (aten.arange.default, aten.arange.start, aten.arange.start_step, aten.eye.default, aten.eye.m):
    factories.impl(factory, partial(run, factory), "PrivateUse1")
