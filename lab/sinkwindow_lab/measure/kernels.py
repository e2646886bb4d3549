"""What a device does during a step, by kernel: where the time goes that a lower bound does not explain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass
class Kernel:
    """One kernel of a GPU, or one operation of a CPU without those that it calls: times and time per step."""

    name: str
    calls: float = 0.0
    ms: float = 0.0


def kernels(step: Callable[[], object], steps: int, device: torch.device) -> list[Kernel]:
    """Profile consecutive steps with `torch.profiler`; return what ran, the most expensive kernel first.

    Kernels that a CUDA graph replays are counted like any others. Profiling costs time, so whole steps are timed
    without it.
    """
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    rows: dict[str, Kernel] = {}
    for event in found.events() or ():
        if (event.device_type.name == "CUDA") is on_gpu and not event.is_user_annotation:
            row = rows.setdefault(event.name, Kernel(event.name))
            took = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
            row.calls += 1 / steps
            row.ms += took / 1e3 / steps
    return sorted(rows.values(), key=lambda row: -row.ms)
