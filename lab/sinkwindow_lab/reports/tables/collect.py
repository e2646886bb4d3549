"""One run of `sinkwindow tables`: a list of jobs, made from the plan, counted, and done in this order."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

from sinkwindow_lab.inputs import machine
from sinkwindow_lab.inputs.corpora import Corpus
from sinkwindow_lab.inputs.models import LoadedModel
from sinkwindow_lab.measure import generation, requirements, steps
from sinkwindow_lab.measure.perplexity import BLOCK
from sinkwindow_lab.progress import Reporter
from sinkwindow_lab.ranks import Group, Unit
from sinkwindow_lab.records import BosPolicy, Configuration, Measurement, Report, measured
from sinkwindow_lab.reports.tables import recall, where
from sinkwindow_lab.reports.tables.bench import Bench
from sinkwindow_lab.reports.tables.plan import FULL, PARTS, Experiment, Plan, Readings, step_pair
from sinkwindow_lab.store import Store
from sinkwindow_lab.ways.configurations import parse

TIMED = ("measure.clock", "ways.sessions", "ways.configurations")
RECOMPUTE_PROBES = 2  # for re-computation a place is as expensive as a whole window is for the others
PAST = 64  # tokens beyond a full cache at which a size is timed [tokens]


@dataclass(frozen=True)
class Job:
    """Something to measure."""

    label: str
    steps: Callable[[], int]  # returns the steps of its progress bar when it begins
    ways: Sequence[Configuration]
    tokens: int  # of the longest text that its ways are fed
    run: Callable[[], list[Measurement]]
    units: Callable[[], list[Unit]] = list  # work of it that several processes share; times are measured by one, alone


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
    group: Group | None = None,
) -> Report:
    """Measure everything that the tables show.

    The corpora give one PPL column each, and the first one also gives the prompts; `configurations` are the rows of the
    experiments, `parts` some of `PARTS`. `progress` gets the number of measurements and returns what is told of them.
    The processes of a `group` share readings and recall; then only rank 0 returns, and measures times.
    """
    begun = time.perf_counter()
    bench = Bench(loaded, corpora, bos, store or Store())
    todo = jobs(bench, configurations, plan, parts)
    for job in todo:
        requirements.check(job.ways, loaded.model, job.tokens, job.label)
    if group:
        bench.shared_by(group, [unit for job in todo for unit in job.units()], bench.texts.values())
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
        configurations=list(ways),
        measurements=measurements,
        notes=notes,
        seconds=time.perf_counter() - begun,
    )


def jobs(bench: Bench, rows: Sequence[Configuration], plan: Plan, parts: Sequence[str]) -> list[Job]:
    """Return the jobs of the parts, in page order; the first text gives prompts, and the lines of the recall test."""
    makers = {"experiments": lambda: _experiments(bench, rows, plan)}
    makers |= {"steps": lambda: _steps(bench, plan), "recall": lambda: _recall(bench, plan)}
    return [
        job
        for part in parts
        for job in (makers[part]() if part in makers else _readings(bench, part, getattr(plan, part), plan))
    ]


def _experiments(bench: Bench, rows: Sequence[Configuration], plan: Plan) -> Iterator[Job]:
    # Re-computation needs a forward of W tokens per target; `sinkwindow perplexity` scores it nevertheless.
    scored = tuple(one.name for one in rows if one.kind != "recompute")
    # The speed of a mistake is of no interest; a window without sinks costs as much as a streaming cache of its size.
    timed = [one for one in rows if not one.ablation and one.kind != "window"]
    for experiment in plan.experiments:
        yield from _readings(bench, experiment.name, Readings(scored, experiment.perplexity_tokens), plan)
    for _, alike in itertools.groupby(plan.experiments, lambda one: one.prompt_tokens):
        if timed:
            yield from _timings(bench, timed, plan, list(alike))


def _readings(bench: Bench, part: str, readings: Readings, plan: Plan) -> Iterator[Job]:
    for corpus in bench.corpora[:1] if part == "along" else bench.corpora:
        for way in map(parse, readings.ways):
            ways = (way, parse("baseline")) if part == "where" else (way,)
            for one in ways:
                bench.announce(one, corpus, readings.tokens)

            def left(ways: Sequence[Configuration] = ways, corpus: Corpus = corpus) -> int:
                return sum(bench.targets_left(one, corpus, readings.tokens) for one in ways)

            def run(ways: Sequence[Configuration] = ways, corpus: Corpus = corpus) -> list[Measurement]:
                first, *dense = [bench.score(one, corpus, readings.tokens) for one in ways]
                if dense:
                    return where.where(first, dense[0], evicts_at=sum(ways[0].limits) + 1)
                return first.measurements(part) + (where.along(first, plan.along_bin) if part == "along" else [])

            def units(ways: Sequence[Configuration] = ways, corpus: Corpus = corpus) -> list[Unit]:
                return [bench.unit(one, corpus, readings.tokens) for one in ways]

            fed = bench.text(corpus, readings.tokens).ids.shape[1] - 1  # the last token is a target only
            yield Job(f"{part}: PPL {way.name}, {corpus.name}", left, ways, fed, run, units)


def _timings(
    bench: Bench, rows: Sequence[Configuration], plan: Plan, experiments: Sequence[Experiment]
) -> Iterator[Job]:
    """Yield generations and attention times of experiments with one prompt: short ones are the start of the longest."""
    subject, corpus, model = bench.loaded.record.name, bench.corpora[0], bench.loaded.model
    prompt_tokens, longest = experiments[0].prompt_tokens, max(one.generated_tokens for one in experiments)

    def new_tokens(way: Configuration, experiment: Experiment) -> int:
        count = experiment.generated_tokens
        return min(plan.recompute_tokens, count) if way.kind == "recompute" else count

    def probed(way: Configuration) -> list[int]:
        probes = min(plan.probes, RECOMPUTE_PROBES) if way.kind == "recompute" else plan.probes
        return steps.places(prompt_tokens, longest, probes)

    stages = [sorted({new_tokens(way, one) for one in experiments}) for way in rows]
    probes: list[steps.Row] = [(way, probed(way), steps.STEPS) for way in rows]

    def generate() -> list[Measurement]:
        prompt = bench.text(corpus, prompt_tokens)

        def measure() -> list[Measurement]:
            found = generation.generate(
                rows, model, prompt.ids, stages, places=plan.speed_places, on_token=lambda _: bench.reporter.advance()
            )
            return [
                number
                for experiment in experiments
                for way, own in zip(rows, found, strict=True)
                for count in [new_tokens(way, experiment)]
                for number in measured(experiment.name, subject, way.name, count, own[count])
            ]

        names = [(one.name, one.generated_tokens) for one in experiments]
        key = bench.key(("measure.generation", "measure.memory", *TIMED), ways=rows, prompt=prompt.sha256, names=names)
        return bench.store.measurements("speed", key | {"stages": stages, "places": plan.speed_places}, measure)

    def attend() -> list[Measurement]:
        found = _at_places(bench, "attention", probes, prompt_tokens + longest)
        return [
            number.model_copy(update={"part": experiment.name})
            for experiment in experiments
            for number in found
            if number.at is not None and number.at < prompt_tokens + experiment.generated_tokens
        ]

    total = generation.timed_steps(stages, plan.speed_places)
    fed = generation.fed_tokens(prompt_tokens, longest)
    yield Job("speed, interleaved", lambda: total, rows, fed, generate)
    yield Job("attention, interleaved", partial(_timed, probes), rows, prompt_tokens + longest, attend)


def _timed(rows: Sequence[steps.Row]) -> int:
    return sum(len(places) * repeats for _, places, repeats in rows)


def _at_places(bench: Bench, part: str, rows: Sequence[steps.Row], tokens: int) -> list[Measurement]:
    """Time single tokens over the start of the first text, or find them stored."""
    text, loaded = bench.text(bench.corpora[0], tokens), bench.loaded
    key = bench.key(("measure.steps", *TIMED), text=text.sha256, rows=rows)
    return bench.store.measurements(
        part.replace(" ", "-"),
        key,
        lambda: steps.measure(
            part, loaded.record.name, rows, loaded.model, text.ids, lambda _: bench.reporter.advance()
        ),
    )


def _steps(bench: Bench, plan: Plan) -> Iterator[Job]:
    def row(name: str, places: Sequence[int] = ()) -> steps.Row:
        way = parse(name)
        repeats = plan.recompute_repeats if way.kind == "recompute" else plan.step_repeats
        return way, places or (way.size + PAST,), repeats

    rows = {
        "steps": [row(name, plan.places) for name in ("baseline", *step_pair(plan.step_cache))],
        "step sizes": [row(name) for size in plan.step_sizes for name in step_pair(size)],
    }
    for part, own in rows.items():
        ways, longest = [way for way, _, _ in own], steps.longest(own)
        run = partial(_at_places, bench, part, own, longest)
        yield Job(f"{part}, interleaved", partial(_timed, own), ways, longest, run)


def _recall(bench: Bench, plan: Plan) -> Iterator[Job]:
    pages = recall.pages(bench, plan.recall_seeds, plan.recall_lines)
    lengths = [page.ids.shape[1] for page in pages]
    asked = [(page.ids.tolist(), [(one.lines_back, one.tokens_back) for one in page.answers]) for page in pages]

    def ask(way: Configuration) -> list[Measurement]:
        key = bench.key(("reports.tables.recall", *TIMED), way=way, corpus=bench.corpora[0].name, block=BLOCK)
        found = partial(recall.ask, bench, way, pages)
        return bench.store.measurements(f"recall-{way.name}", key | {"asked": asked}, found)

    for way in map(parse, plan.recall):
        unit, size = Unit(f"recall: {way.name}", sum(lengths), partial(ask, way)), partial(sum, lengths)
        yield Job(unit.name, size, (way,), max(lengths), partial(ask, way), partial(list, [unit]))
