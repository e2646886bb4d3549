"""The measurements of a run as a list of jobs: made from the plan, counted, and done in this order."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from sinkwindow_lab.inputs.corpora import Corpus
from sinkwindow_lab.measure import attention_time, generation
from sinkwindow_lab.measure.perplexity import BLOCK
from sinkwindow_lab.records import Measurement
from sinkwindow_lab.reports.tables import recall, steps, where
from sinkwindow_lab.reports.tables.bench import Bench, described
from sinkwindow_lab.reports.tables.plan import Experiment, Plan, Readings, measures_speed, scores_perplexity
from sinkwindow_lab.store import code_version
from sinkwindow_lab.ways.configurations import Configuration, parse

TIMED = ("measure.clock", "ways.sessions", "ways.configurations")
RECOMPUTE_PROBES = 2  # for re-computation a place is as expensive as a whole window is for the others


@dataclass(frozen=True)
class Job:
    """Something to measure."""

    label: str
    steps: Callable[[], int]  # returns the steps of its progress bar when it begins
    ways: tuple[Configuration, ...]
    tokens: int  # of the longest text that its ways are fed
    run: Callable[[], list[Measurement]]


def jobs(bench: Bench, rows: Sequence[Configuration], plan: Plan, parts: Sequence[str]) -> list[Job]:
    """Return the jobs of the parts, in page order; readings of one text to several lengths are announced as one.

    The first text gives the prompts, the text along which losses are shown, and the lines of the recall test.
    """
    makers: dict[str, Callable[[], Iterator[Job]]] = {
        "experiments": lambda: _experiments(bench, rows, plan),
        "mistakes": lambda: _readings(bench, "mistakes", plan.mistakes),
        "sinks": lambda: _readings(bench, "sinks", plan.sinks),
        "sizes": lambda: _readings(bench, "sizes", plan.sizes),
        "along": lambda: _readings(bench, "along", plan.along, along_bin=plan.along_bin),
        "steps": lambda: _steps(bench, plan),
        "where": lambda: _where(bench, plan.where),
        "recall": lambda: _recall(bench, plan),
    }
    return [job for part in parts for job in makers[part]()]


def _experiments(bench: Bench, rows: Sequence[Configuration], plan: Plan) -> Iterator[Job]:
    scored = tuple(one.name for one in rows if scores_perplexity(one))
    timed = [one for one in rows if measures_speed(one)]
    for experiment in plan.experiments:
        yield from _readings(bench, experiment.name, Readings(scored, experiment.perplexity_tokens))
    for prompt, alike in itertools.groupby(plan.experiments, lambda one: one.prompt_tokens):
        if timed:
            yield from _timings(bench, timed, plan, prompt, list(alike))


def _readings(bench: Bench, part: str, readings: Readings, along_bin: int = 0) -> Iterator[Job]:
    for corpus in bench.corpora[:1] if along_bin else bench.corpora:
        for way in map(parse, readings.ways):
            bench.announce(way, corpus, readings.tokens)

            def run(way: Configuration = way, corpus: Corpus = corpus) -> list[Measurement]:
                score = bench.score(way, corpus, readings.tokens)
                return score.measurements(part) + where.along(score, part, along_bin)

            left = partial(bench.targets_left, way, corpus, readings.tokens)
            fed = bench.text(corpus, readings.tokens).ids.shape[1] - 1  # the last token is a target only
            yield Job(f"{part}: PPL {way.name}, {corpus.name}", left, (way,), fed, run)


def _timings(
    bench: Bench, rows: Sequence[Configuration], plan: Plan, prompt_tokens: int, experiments: Sequence[Experiment]
) -> Iterator[Job]:
    """Yield the generations and the attention times of experiments with one prompt.

    A shorter generation is the start of a longer one, so that one generation serves all of them.
    """
    subject, corpus, loaded = bench.loaded.record.name, bench.corpora[0], bench.loaded
    longest = max(one.generated_tokens for one in experiments)
    key = {**bench.origin, "ways": [described(one) for one in rows]}
    probes = [min(plan.probes, RECOMPUTE_PROBES) if way.kind == "recompute" else plan.probes for way in rows]

    def new_tokens(way: Configuration, experiment: Experiment) -> int:
        count = experiment.generated_tokens
        return min(plan.recompute_tokens, count) if way.kind == "recompute" else count

    stages = [sorted({new_tokens(way, one) for one in experiments}) for way in rows]

    def generate() -> list[Measurement]:
        prompt = bench.text(corpus, prompt_tokens)

        def measure() -> list[Measurement]:
            found = generation.generate(
                rows,
                loaded.model,
                prompt.ids,
                stages,
                places=plan.speed_places,
                on_token=lambda _: bench.reporter.advance(),
            )
            known = {(way, one.new_tokens): one for way, own in zip(rows, found, strict=True) for one in own}
            return [
                number
                for experiment in experiments
                for way in rows
                for number in known[way, new_tokens(way, experiment)].measurements(experiment.name, subject)
            ]

        code = code_version("measure.generation", "measure.memory", *TIMED)
        names = [(one.name, one.generated_tokens) for one in experiments]
        whole = {**key, "code": code, "prompt": prompt.sha256, "stages": stages, "names": names}
        whole["places"] = plan.speed_places
        return bench.store.measurements("speed", whole, measure)

    def attend() -> list[Measurement]:
        text = bench.text(corpus, prompt_tokens + longest)
        code = code_version("measure.attention_time", *TIMED)
        whole = {**key, "code": code, "text": text.sha256, "probes": probes, "lengths": [prompt_tokens, longest]}
        found = bench.store.measurements(
            "attention",
            whole,
            lambda: attention_time.measure(
                rows,
                loaded.model,
                text.ids,
                subject=subject,
                prompt_tokens=prompt_tokens,
                new_tokens=longest,
                probes=probes,
                on_step=lambda _: bench.reporter.advance(),
            ),
        )
        return [
            number.model_copy(update={"part": experiment.name})
            for experiment in experiments
            for number in found
            if number.at is not None and number.at < prompt_tokens + experiment.generated_tokens
        ]

    total = generation.timed_steps(stages, plan.speed_places)
    fed = generation.fed_tokens(prompt_tokens, longest)
    yield Job("speed, interleaved", lambda: total, tuple(rows), fed, generate)
    probed = sum(len(attention_time.places(prompt_tokens, longest, count)) for count in probes)
    fed = prompt_tokens + longest
    yield Job("attention, interleaved", lambda: attention_time.STEPS * probed, tuple(rows), fed, attend)


def _steps(bench: Bench, plan: Plan) -> Iterator[Job]:
    def repeated(way: Configuration) -> int:
        return plan.recompute_repeats if way.kind == "recompute" else plan.step_repeats

    along = [parse(name) for name in ("baseline", *steps.pair(plan.step_cache))]
    grown = [parse(name) for size in plan.step_sizes for name in steps.pair(size)]
    rows: dict[str, list[steps.Row]] = {
        "steps": [(way, plan.places, repeated(way)) for way in along],
        "step sizes": [(way, (steps.size(way) + steps.PAST,), repeated(way)) for way in grown],
    }
    for part, own in rows.items():
        total = sum(len(places) * repeats for _, places, repeats in own)

        def run(part: str = part, own: list[steps.Row] = own) -> list[Measurement]:
            text = bench.text(bench.corpora[0], steps.longest(own))
            key = {**bench.origin, "text": text.sha256, "code": code_version("reports.tables.steps", *TIMED)}
            key |= {"rows": [[described(way), list(places), repeats] for way, places, repeats in own]}
            return bench.store.measurements(
                part.replace(" ", "-"), key, lambda: steps.measure(bench, part, own, text.ids)
            )

        ways = tuple(way for way, _, _ in own)
        yield Job(f"{part}, interleaved", partial(int, total), ways, steps.longest(own), run)


def _where(bench: Bench, readings: Readings) -> Iterator[Job]:
    dense = parse("baseline")
    for way in map(parse, readings.ways):
        for corpus in bench.corpora:
            bench.announce(dense, corpus, readings.tokens)
            bench.announce(way, corpus, readings.tokens)

            def run(way: Configuration = way, corpus: Corpus = corpus) -> list[Measurement]:
                pair = [bench.score(one, corpus, readings.tokens) for one in (way, dense)]
                return where.where(*pair, evicts_at=sum(way.limits) + 1)

            fed = bench.text(corpus, readings.tokens).ids.shape[1] - 1
            yield Job(f"where: {way.name}, {corpus.name}", partial(int, 1), (way,), fed, run)


def _recall(bench: Bench, plan: Plan) -> Iterator[Job]:
    pages = recall.pages(bench, plan.recall_seeds, plan.recall_lines)
    count = sum(page.ids.shape[1] for page in pages)
    texts = [(page.ids[0].tolist(), [(one.lines_back, one.tokens_back) for one in page.answers]) for page in pages]
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    for way in map(parse, plan.recall):

        def run(way: Configuration = way) -> list[Measurement]:
            code = code_version("reports.tables.recall", *TIMED)
            key = {**bench.origin, "way": described(way), "text": digest, "code": code}
            key |= {"corpus": bench.corpora[0].name, "block": BLOCK}
            return bench.store.measurements(f"recall-{way.name}", key, lambda: recall.ask(bench, way, pages))

        longest = max(page.ids.shape[1] for page in pages)
        yield Job(f"recall: {way.name}", lambda: count, (way,), longest, run)
