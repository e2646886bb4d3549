"""One run of `gpu-report`: important parts first, only those that the time allows, each saved when it is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from sinkwindow_lab.inputs import machine, models
from sinkwindow_lab.inputs.shapes import random_model
from sinkwindow_lab.measure import memory
from sinkwindow_lab.records import MachineRecord, ModelRecord
from sinkwindow_lab.reports.pace import floors, gpu, laws
from sinkwindow_lab.reports.pace.gpu_records import GpuReport, LawRecord, PointRecord, PromptRecord
from sinkwindow_lab.reports.pace.records import BandwidthRecord

MARGIN = 1.5  # a part starts if its kind's longest time so far, times this, is left
FIRST_GUESS = 25.0  # for a kind that has not run yet [s]
Save = Callable[[GpuReport], None]


class Budget:
    """Decides whether there is time for one more part."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.perf_counter) -> None:
        """Start the clock, with a budget of `seconds`."""
        self._now, self._begun, self._seconds = now, now(), seconds
        self._longest: dict[str, float] = {}

    @property
    def spent(self) -> float:
        """Time since the start [s]."""
        return self._now() - self._begun

    def allows(self, kind: str) -> bool:
        """Return whether a part of this kind can be started."""
        guess = self._longest.get(kind, min(FIRST_GUESS, self._seconds / 10))
        return self.spent + MARGIN * guess <= self._seconds

    def run(self, kind: str, part: Callable[[], None]) -> None:
        """Run a part and record how long it took."""
        begun = self.spent
        part()
        self._longest[kind] = max(self._longest.get(kind, 0.0), self.spent - begun)


@dataclass
class _Found:
    """What a run has found so far."""

    on_gpu: bool
    machine: MachineRecord
    bandwidth: BandwidthRecord
    models: list[ModelRecord] = field(default_factory=list)
    points: list[PointRecord] = field(default_factory=list)
    prompts: list[PromptRecord] = field(default_factory=list)
    laws: list[LawRecord] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def report(self, seconds: float, *, finished: bool) -> GpuReport:
        """Return all of it as a record."""
        return GpuReport(
            on_gpu=self.on_gpu,
            machine=self.machine,
            bandwidth=self.bandwidth,
            models=list(self.models),
            points=list(self.points),
            prompts=list(self.prompts),
            laws=list(self.laws),
            skipped=list(self.skipped),
            seconds=seconds,
            finished=finished,
        )


@dataclass(frozen=True)
class _Part:
    """Something to measure: its kind (parts of a kind take similar time), its name, and a function."""

    kind: str
    name: str
    run: Callable[[], None]


def collect(*, minutes: float, save: Save, say: Callable[[str], None], device: str | None = None) -> GpuReport:
    """Measure on the GPU if there is one, otherwise with tiny shapes on the CPU.

    Parts that do not fit into `minutes` are skipped and named. `save` gets the report so far after every part.

    Raises:
        LabError: if the device does not exist.
    """
    budget = Budget(60 * minutes)
    place = models.usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = place.type == "cuda"
    scale = gpu.LARGE if on_gpu else gpu.TINY
    say(f"on {torch.cuda.get_device_name(place) if on_gpu else 'the CPU, with tiny shapes: there is no GPU here'}")
    found = _Found(on_gpu, machine.describe(place), floors.bandwidth(place, megabytes=scale.megabytes))
    for part in _parts(place, scale, found):
        if not budget.allows(part.kind):
            found.skipped.append(part.name)
            continue
        say(f"{part.name} ({budget.spent:.0f} s)")
        _attempt(part, budget, found)
        memory.give_back()
        save(found.report(budget.spent, finished=False))
    report = found.report(budget.spent, finished=True)
    save(report)
    return report


def _attempt(part: _Part, budget: Budget, found: _Found) -> None:
    """Run a part; a part that does not fit into the GPU's memory is named, and the rest continues."""
    try:
        budget.run(part.kind, part.run)
    except torch.cuda.OutOfMemoryError:
        found.skipped.append(f"{part.name} (out of memory)")


def _parts(device: torch.device, scale: gpu.Scale, found: _Found) -> Iterator[_Part]:
    """Yield the laws first: no speed of a wrong cache is reported. Then yield model by model, each built on demand."""
    yield _Part("laws", "laws", lambda: found.laws.extend(laws.laws(device)))
    for shape, dtype in scale.models:
        held: list[PreTrainedModel] = []
        yield _bound(_build, held, shape, dtype, device, found, kind="build", name=f"{shape}: build")
        if held:
            yield from _model_parts(held[0], f"{shape}, {str(dtype).removeprefix('torch.')}", scale, found)
        held.clear()
        memory.give_back()


def _build(held: list[PreTrainedModel], shape: str, dtype: torch.dtype, device: torch.device, found: _Found) -> None:
    held.append(random_model(shape, device=device, dtype=dtype))
    found.models.append(models.describe(held[0], f"{shape} shape", "random weights"))


def _model_parts(model: PreTrainedModel, name: str, scale: gpu.Scale, found: _Found) -> Iterator[_Part]:
    def decode(limit: int) -> None:
        found.points.extend(gpu.decode_points(model, name, limit, scale))

    def late(streamed: int, way: str = gpu.STREAMING) -> None:
        found.points.append(gpu.streamed_point(model, name, streamed, scale, way))

    def prompt(way: str, multiple: int) -> None:
        found.prompts.append(gpu.prompt_point(model, name, way, multiple, scale))

    limits = iter(scale.limits)
    yield _bound(decode, next(limits), kind=f"{name}: decode", name=f"{name}: S + W = {scale.limits[0]:,}")
    yield _bound(late, scale.middle, gpu.STATIC, kind=f"{name}: compile", name=f"{name}: {gpu.STATIC}")
    for streamed in scale.streamed:
        yield _bound(late, streamed, kind=f"{name}: late", name=f"{name}: after {streamed:,} tokens")
    for multiple in scale.prompts:
        for way in (gpu.STREAMING, gpu.DENSE):
            title = f"{name}: prompt of {multiple * scale.middle:,} tokens, {way}"
            yield _bound(prompt, way, multiple, kind=f"{name}: prompt", name=title)
    for limit in limits:
        yield _bound(decode, limit, kind=f"{name}: decode", name=f"{name}: S + W = {limit:,}")


def _bound(run: Callable[..., None], *arguments: object, kind: str, name: str) -> _Part:
    return _Part(kind, name, lambda: run(*arguments))
