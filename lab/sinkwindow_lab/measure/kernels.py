"""What a device does during a step, by kernel: where the time goes that a lower bound does not explain."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from sinkwindow_lab.records import Figures


def kernels(step: Callable[[], object], steps: int, device: torch.device) -> dict[str, Figures]:
    """Profile consecutive steps with `torch.profiler`; return what each kernel took, the most expensive one first.

    On a CPU these are operations, without those that they call. Kernels that a CUDA graph replays are counted like any
    others. Profiling costs time, so whole steps are timed without it.
    """
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    rows: dict[str, tuple[float, float]] = {}  # time [ms] and number, per step
    for event in found.events() or ():
        if (event.device_type.name == "CUDA") is on_gpu and not event.is_user_annotation:
            took = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
            ms, calls = rows.get(event.name, (0.0, 0.0))
            rows[event.name] = ms + took / 1e3 / steps, calls + 1 / steps
    by_time = sorted(rows.items(), key=lambda row: -row[1][0])
    return {name: {"time": ("ms", [ms]), "calls": ("", [calls])} for name, (ms, calls) in by_time}
