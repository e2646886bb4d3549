"""One run of `nox -s speed`: every part, model by model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from sinkwindow_lab.inputs import machine, models
from sinkwindow_lab.inputs.shapes import random_model
from sinkwindow_lab.measure import memory
from sinkwindow_lab.measure.micro import check, check_logits
from sinkwindow_lab.records import ModelRecord
from sinkwindow_lab.reports.pace import decode, floors, texts, tricks
from sinkwindow_lab.reports.pace.plans import BUFFER, FULL, QUICK, Plan
from sinkwindow_lab.reports.pace.records import BandwidthRecord, Comparison, FloorRecord, SpeedReport
from sinkwindow_lab.ways.configurations import streaming

CHECKED = 200  # tokens of the check before anything is timed: past evictions, with and without a buffer [tokens]


def collect(*, quick: bool, threads: int, say: Callable[[str], None]) -> SpeedReport:
    """Measure everything; torch's number of threads is restored afterwards.

    Raises:
        LabError: if the cache's output is wrong, or the embedded model is missing.
    """
    plan, device, begun = QUICK if quick else FULL, torch.device("cpu"), time.perf_counter()
    comparisons: list[Comparison] = []
    found: list[FloorRecord] = []
    records: list[ModelRecord] = []
    with _threads(threads):
        check_outputs()
        say("memory bandwidth")
        bandwidth = floors.bandwidth(device, megabytes=plan.megabytes)
        for record, model in chosen_models(plan):
            records.append(record)
            rows, own = measure(model, record.name, plan, bandwidth, say)
            comparisons += rows
            found += own
        where = machine.describe(device)
    return SpeedReport(
        quick=quick,
        machine=where,
        models=records,
        bandwidth=bandwidth,
        floors=found,
        comparisons=comparisons,
        seconds=time.perf_counter() - begun,
    )


def check_outputs() -> None:
    """Compare the cache with its definition on a tiny model: no speed of a wrong cache is reported.

    Raises:
        LabError: if it differs.
    """
    tiny = random_model("tiny")
    for buffer in (BUFFER, 0):
        configuration = streaming(4, 60, buffer)
        check(configuration, tiny, CHECKED)
        check_logits(configuration, tiny, CHECKED)


def chosen_models(plan: Plan) -> Iterator[tuple[ModelRecord, PreTrainedModel]]:
    """Yield the models of a plan, one at a time: each is freed before the next."""
    if plan.embedded:
        loaded = models.load_model()
        yield loaded.record, loaded.model
        del loaded
    for shape in plan.shapes:
        memory.give_back()
        model = random_model(shape)
        yield models.describe(model, f"{shape} shape", "random weights"), model


def measure(
    model: PreTrainedModel, name: str, plan: Plan, bandwidth: BandwidthRecord, say: Callable[[str], None]
) -> tuple[list[Comparison], list[FloorRecord]]:
    """Measure all parts for one model."""
    rows: list[Comparison] = []
    found: list[FloorRecord] = []
    for batch in plan.batches:
        say(f"{name}: attention, batch {batch}")
        rows += decode.attention(model, name, batch, plan)
        memory.give_back()
        say(f"{name}: time per output token, batch {batch}")
        tokens, floor = decode.tokens(model, name, batch, plan)
        rows += tokens
        found.append(floor)
        memory.give_back()
    for batch in plan.compiled:
        say(f"{name}: compiled steps, batch {batch}")
        rows += decode.compiled(model, name, batch, plan, bandwidth)
        memory.give_back()
    for words, part in (("prefill", texts.prefill), ("peak memory", texts.memory), ("scoring", texts.scoring)):
        say(f"{name}: {words}")
        rows += part(model, name, plan)
    say(f"{name}: tricks")
    rows += tricks.tricks(model, name, plan)
    return rows, found


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
