"""One run of the speed or the GPU report: its parts in order of importance, saved after each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from sinkwindow_lab.errors import say
from sinkwindow_lab.inputs import machine, models
from sinkwindow_lab.inputs.shapes import random_model
from sinkwindow_lab.measure import memory
from sinkwindow_lab.measure.micro import check_logits
from sinkwindow_lab.records import Measurement, Report
from sinkwindow_lab.reports.speed import decode, floors, laws, texts, tricks
from sinkwindow_lab.reports.speed.plan import DENSE, EMBEDDED, FULL, LARGE, QUICK, TINY, TINY_ON_GPU, Plan, lazy

CHECKED = 200  # tokens of the check before anything is timed: past evictions, with and without a buffer [tokens]
MARGIN = 1.5  # a part starts if its kind's longest time so far, times this, is left
FIRST_GUESS = 25.0  # for a kind that has not run yet [s]
Save = Callable[[Report], None]


class Run:
    """A report that grows part by part, in a limited time, and is saved after each."""

    def __init__(
        self,
        kind: Literal["speed", "gpu"],
        plan: Plan,
        device: torch.device,
        save: Save,
        seconds: float = math.inf,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start the clock, and begin with the memory bandwidth."""
        self._save, self._device = save, device
        self._seconds, self._now, self._begun = seconds, now, now()
        self._longest: dict[str, float] = {}
        facts: dict[str, Any] = {
            "plan": asdict(plan),
            "machine": machine.describe(device),
            "quick": plan not in (FULL, LARGE),
        }
        self.report = Report(kind=kind, models=[], measurements=[], seconds=0.0, finished=False, **facts)
        self.part("memory bandwidth", lambda: floors.bandwidth(device, megabytes=plan.megabytes))

    def part(self, name: str, measure: Callable[[], Iterable[Measurement]], kind: str = "") -> None:
        """Measure a part, or name it if it fits neither time (that of its `kind`) nor memory."""
        memory.give_back()
        begun, kind = self._spent(), kind or name
        guess = self._longest.get(kind, min(FIRST_GUESS, self._seconds / 10))
        if begun + MARGIN * guess > self._seconds:
            self._add(skipped=[name])
            return
        say(f"{name} ({begun:.0f} s)")
        try:
            for measurement in measure():
                self._add(measurements=[measurement])
        except torch.cuda.OutOfMemoryError:
            self._add(skipped=[f"{name} (out of memory)"])
        except Exception as error:
            if self.report.kind != "gpu":
                raise
            # Time on a lent machine is short: the other parts are worth it. The command fails at its end.
            self._add(failed=[f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"])
        self._longest[kind] = max(self._longest.get(kind, 0.0), self._spent() - begun)
        self._save(self.report)

    def models(self, parts: Callable[[PreTrainedModel, str], None]) -> None:
        """Build the plan's models one by one and measure the parts of each, given it and its name."""
        for shape, dtype in self.report.plan["models"]:
            built: list[PreTrainedModel] = []
            self.part(f"{shape}: build", partial(self._build, shape, dtype, built), "build")
            while built:  # nothing holds a model while the next one is built
                parts(built.pop(), self.report.models[-1].name)

    def _build(self, shape: str, dtype: str, built: list[PreTrainedModel]) -> list[Measurement]:
        if shape == EMBEDDED:
            loaded = models.load_model()
            model, record = loaded.model, loaded.record
        else:
            model = random_model(shape, device=self._device, dtype=models.DTYPES[dtype])
            name = f"{shape} shape" if dtype == "float32" else f"{shape} shape, {dtype}"
            record = models.describe(model, name, "random weights")
        built.append(model)
        self._add(models=[record])
        return []

    def finish(self) -> Report:
        """Return the whole report."""
        self._add(finished=True)
        self._save(self.report)
        return self.report

    def _spent(self) -> float:
        return self._now() - self._begun

    def _add(self, **more: Any) -> None:
        """Set fields of the report, and append to its lists."""
        fields = {
            field: [*getattr(self.report, field), *it] if isinstance(it, list) else it for field, it in more.items()
        }
        self.report = self.report.model_copy(update={"seconds": self._spent(), **fields})


def speed(*, quick: bool, threads: int, save: Save) -> Report:
    """Measure the speed report on the CPU; torch's number of threads is restored afterwards."""
    plan, before, tiny = QUICK if quick else FULL, torch.get_num_threads(), random_model("tiny")
    torch.set_num_threads(threads)
    try:
        for configuration in (lazy(64), lazy(64, 0)):  # no speed of a wrong cache is reported
            check_logits(configuration, tiny, CHECKED)
        run = Run("speed", plan, torch.device("cpu"), save)
        run.models(partial(_speed_parts, run, plan))
    finally:
        torch.set_num_threads(before)
    return run.finish()


def _speed_parts(run: Run, plan: Plan, model: PreTrainedModel, name: str) -> None:
    for batch in plan.samples:
        run.part(f"{name}: attention, batch {batch}", partial(decode.attention, model, name, batch, plan))
        run.part(f"{name}: time per output token, batch {batch}", partial(decode.tokens, model, name, batch, plan))
    for batch in plan.samples:
        run.part(f"{name}: compiled steps, batch {batch}", partial(decode.compiled, model, name, batch, plan))
    last = {"prefill": texts.prefill, "peak memory": texts.memory, "scoring": texts.scoring, "tricks": tricks.tricks}
    for words, part in last.items():
        run.part(f"{name}: {words}", partial(part, model, name, plan))


def gpu(*, minutes: float, save: Save, device: str | None = None, quick: bool = False) -> Report:
    """Measure the GPU report, in so many `minutes`, on the GPU if there is one, else tiny shapes on the CPU."""
    place = models.usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = place.type == "cuda"
    plan = (TINY_ON_GPU if quick else LARGE) if on_gpu else TINY
    say("on the GPU" if on_gpu else "on the CPU, with tiny shapes: there is no GPU here")
    run = Run("gpu", plan, place, save, 60 * minutes)
    run.part("laws", lambda: laws.laws(place, plan.compile))
    run.models(partial(_gpu_parts, run, plan))
    return run.finish()


def _gpu_parts(run: Run, plan: Plan, model: PreTrainedModel, name: str) -> None:
    def at_limit(limit: int) -> None:
        run.part(f"{name}: S + W = {limit:,}", partial(decode.at_limit, model, name, limit, plan), f"{name}: limit")

    at_limit(plan.limit)
    run.part(f"{name}: compiled", partial(decode.static_steps, model, name, plan))
    for window in plan.recomputed:
        run.part(f"{name}: windows of {window:,} computed anew", partial(decode.recomputed, model, name, window, plan))
    run.part(f"{name}: scoring", partial(texts.scoring, model, name, plan))
    for streamed in plan.streamed:
        late = partial(decode.after, model, name, lazy(plan.limit), streamed, plan)
        run.part(f"{name}: after {streamed:,} tokens", late, f"{name}: late")
    for tokens in (limits * plan.limit for limits in plan.prompts):
        for way in (lazy(plan.limit), DENSE):
            prompt = partial(texts.prompt, model, name, way, tokens, plan)
            run.part(f"{name}: prompt of {tokens:,} tokens, {way.name}", prompt, f"{name}: prompt")
    for way in (lazy(plan.limit), DENSE):
        run.part(f"{name}: kernels of a chunk, {way.name}", partial(texts.chunk_kernels, model, name, way, plan))
    run.part(f"{name}: a growing dense cache", partial(decode.growing, model, name, plan))
    for limit in plan.limits:
        at_limit(limit)
    run.part(f"{name}: generate", partial(decode.generated, model, name, plan))
