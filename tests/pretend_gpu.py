"""A GPU that exists only here: its tensors compute on the CPU, and mix with those of the CPU no more than CUDA's do.

A tensor that the cache makes on the CPU by mistake raises the error that it would raise on a GPU. A device is
registered for the whole process, so tests of another kind run in other processes.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Final

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

NAME: Final = "pretend"
aten = torch.ops.aten
# Operations with tensors of two devices: copies, and reads and writes of tensors with indices on the CPU.
COPIES: Final = (aten.copy_.default, aten._to_copy.default)
INDEXED: Final = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


module: Any = ModuleType(f"torch.{NAME}")  # what torch asks of a kind of device
module.is_available = module.is_initialized = lambda: True
module._is_in_bad_fork = lambda: False
module.current_device, module.device_count = lambda: 0, lambda: 1
module.set_device = module.synchronize = module.manual_seed_all = module.set_rng_state = lambda *_: None
module.get_rng_state = lambda *_: torch.zeros(1, dtype=torch.uint8, device="cpu")
module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
backend_registration._setup_privateuseone_for_python_backend(NAME, module)
GPU: Final = torch.device(NAME, 0)
torch._C._set_only_lift_cpu_tensors(True)  # noqa: FBT003 - `torch.tensor` makes a tensor on the CPU first, and copies it
torch.__future__.set_swap_module_params_on_conversion(True)


class GpuTensor(torch.Tensor):
    """A tensor on the device, around the tensor on the CPU that has its values."""

    on_cpu: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def tolist(self) -> Any:
        """Return the values."""
        return self.on_cpu.tolist()

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
    others = any(one.dim() > 0 and not isinstance(one, GpuTensor) for one in tensors)
    if ours and others and operation not in COPIES and not (operation in INDEXED and first_is_ours):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME} and another: {operation}")
    target = kwargs.get("device")
    to_gpu = bool(ours) if target is None else torch.device(target).type == NAME
    if operation is aten.copy_.default:
        to_gpu = first_is_ours
    args, kwargs = tree_map_only(GpuTensor, lambda one: one.on_cpu, (args, kwargs))
    if to_gpu and target is not None:
        kwargs |= {"device": torch.device("cpu"), "pin_memory": None}
    result = operation(*args, **{name: value for name, value in kwargs.items() if name != "pin_memory" or value})
    if not to_gpu:
        return result

    def on_gpu(one: Any) -> Any:
        return ours[id(one)] if id(one) in ours else wrap(one)  # what changes its argument returns it

    return tree_map_only(torch.Tensor, on_gpu, result)


library: Any = torch.library.Library("_", "IMPL")  # type: ignore[no-untyped-call]
library.fallback(run, "PrivateUse1")  # operations that are given no tensor, such as `torch.zeros`
