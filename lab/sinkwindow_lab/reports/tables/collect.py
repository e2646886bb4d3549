"""One run of `sinkwindow tables`."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from sinkwindow_lab.inputs import machine
from sinkwindow_lab.inputs.corpora import Corpus
from sinkwindow_lab.inputs.models import LoadedModel
from sinkwindow_lab.measure import requirements
from sinkwindow_lab.progress import Reporter
from sinkwindow_lab.records import BosPolicy, Report
from sinkwindow_lab.reports.tables import recall
from sinkwindow_lab.reports.tables.bench import Bench
from sinkwindow_lab.reports.tables.jobs import jobs
from sinkwindow_lab.reports.tables.plan import FULL, PARTS, Plan
from sinkwindow_lab.store import Store
from sinkwindow_lab.ways.configurations import Configuration


def collect(
    loaded: LoadedModel,
    corpora: Sequence[Corpus],
    configurations: Sequence[Configuration],
    plan: Plan = FULL,
    *,
    parts: Sequence[str] = PARTS,
    bos: BosPolicy = "none",
    store: Store | None = None,
    progress: Callable[[int], AbstractContextManager[Reporter]] = lambda _: nullcontext(Reporter()),
) -> Report:
    """Measure everything that the tables show.

    The corpora give one PPL column each, and the first one also gives the prompts; `configurations` are the rows of the
    experiments, `parts` some of `PARTS`. `progress` gets the number of measurements and returns what is told of them.
    """
    begun = time.perf_counter()
    bench = Bench(loaded, corpora, bos, store or Store())
    todo = jobs(bench, configurations, plan, parts)
    for job in todo:
        requirements.check(job.ways, loaded.model, job.tokens, job.label)
    measurements = []
    with progress(len(todo)) as bench.reporter:
        for job in todo:
            bench.reporter.begin(job.label, job.steps())
            measurements += job.run()
    ways = dict.fromkeys([*(configurations if "experiments" in parts else ()), *(w for job in todo for w in job.ways)])
    notes: dict[str, str] = {"bos": bos}
    if "recall" in parts:
        first = recall.pages(bench, plan.recall_seeds, plan.recall_lines)
        notes["recall example"] = recall.example(first[0].lines)
        notes["recall tokens"] = f"{sum(page.ids.shape[1] for page in first):,}"
    return Report(
        kind="tables",
        quick=plan.quick,
        plan=json.loads(json.dumps({**dataclasses.asdict(plan), "parts": parts})),  # lists, as when it is read again
        machine=machine.describe(loaded.model.device),
        models=[loaded.record],
        corpora=[corpus.record() for corpus in corpora],
        texts=[text.record() for text in bench.texts.values()],
        configurations=[way.record() for way in ways],
        measurements=measurements,
        notes=notes,
        seconds=time.perf_counter() - begun,
    )
