"""Do models need sinks? Perplexity by their number, and where attention goes, for each model and text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from statistics import mean, median

from sinkwindow_lab.errors import LabError
from sinkwindow_lab.inputs import machine
from sinkwindow_lab.inputs.corpora import Corpus
from sinkwindow_lab.inputs.models import LoadedModel
from sinkwindow_lab.measure import attention, requirements
from sinkwindow_lab.measure.attention import FIRST, LEARNED, SHARES
from sinkwindow_lab.progress import Reporter
from sinkwindow_lab.records import BosPolicy, Configuration, Measurement, ModelRecord, Report, TextRecord, measured
from sinkwindow_lab.render.markdown import NOT_MEASURED, Page, bullets, join, name, table
from sinkwindow_lab.render.origins import head, machine_line
from sinkwindow_lab.reports.tables import published
from sinkwindow_lab.reports.tables.bench import Bench
from sinkwindow_lab.reports.tables.plan import sink_ways
from sinkwindow_lab.ways.configurations import parse

COUNTS = (0, 1, 4, 8)  # numbers of sinks
USUAL = 4  # with so many, none are compared
BOTTOM = 2  # layers in which attention stays local, says the paper
GATE = "output gate"
ROUNDING = 0.001  # smaller shares are shown as none
RATIO = f"S = 0 over S = {USUAL}"
WORDS = (
    "**PPL**: exp of the mean loss over all targets, each scored once, the text read once from its start.",
    "**Shares** of attention: means over layers, heads and queries; in brackets the median and the largest layer.",
    "**First keys** of a query: the sinks, which are the text's first tokens, then the oldest tokens of the window.",
    "**First keys** of the dense model: the text's first tokens.",
    "**Queries** count after the first eviction, the same ones in each row.",
    "**Layers** count if they attend to all that is kept: a narrower window of their own leaves out the sinks.",
    "**Learned sink**: the share that no key gets, because each head of the model has a sink of its own (GPT-OSS).",
    f"**{NOT_MEASURED}**: less than {ROUNDING:.1%} in every layer, or no layer that counts.",
)
Samples = dict[tuple[str, str, str, str], list[float]]  # by model, text, configuration and metric


@dataclass(frozen=True)
class Plan:
    """How much is measured [tokens]."""

    size: int  # S + W, the same for every S; B = 0
    tokens: int  # of each text


FULL, QUICK = Plan(256, 2000), Plan(32, 200)


def collect(
    names: Sequence[str | None],
    corpora: Sequence[Corpus],
    plan: Plan,
    *,
    load: Callable[[str | None], LoadedModel],
    save: Callable[[Report], object],
    bos: BosPolicy = "none",
    progress: Callable[[int], AbstractContextManager[Reporter]] = lambda _: nullcontext(Reporter()),
) -> None:
    """Measure models by name, one in memory at a time; `save` gets the report after each of them."""
    begun, ways = time.perf_counter(), [parse(one) for one in sink_ways(COUNTS, plan.size)]
    models, records, found = list[ModelRecord](), list[TextRecord](), list[Measurement]()
    with progress(2 * len(names) * len(corpora) * len(ways)) as reporter:
        for count, given in enumerate(names, start=1):
            bench = Bench(load(given), corpora, bos, reporter=reporter)
            for corpus in corpora:
                _check(bench, corpus, ways, plan)
            models.append(bench.loaded.record)
            records += [text.record() for text in bench.texts.values()]
            found += [one for corpus in corpora for one in _measure(bench, corpus, ways, plan)]
            report = Report(
                kind="sinks",
                quick=plan == QUICK,
                plan=asdict(plan),
                machine=machine.describe(bench.loaded.model.device),
                models=models,
                corpora=[corpus.record() for corpus in corpora],
                texts=records,
                configurations=ways,
                measurements=found,
                notes={"bos": bos},
                seconds=time.perf_counter() - begun,
                finished=count == len(names),
            )
            del bench  # before the next one is there
            save(report)


def _check(bench: Bench, corpus: Corpus, ways: Sequence[Configuration], plan: Plan) -> None:
    """Check that the start of a text can be measured."""
    count, asked = bench.text(corpus, plan.tokens).ids.shape[1], f"--tokens {plan.tokens}"
    if count < plan.size + 2:
        raise LabError(
            f"{asked}: {count} tokens of {corpus.name!r} never fill a cache of {plan.size}: "
            "ask for more tokens, or for a smaller --size"
        )
    requirements.check(ways, bench.loaded.model, count, asked)


def _measure(bench: Bench, corpus: Corpus, ways: Sequence[Configuration], plan: Plan) -> Iterator[Measurement]:
    reporter, text = bench.reporter, bench.text(corpus, plan.tokens)
    subject, twin = bench.loaded.record.name, attention.eager_twin(bench.loaded.model)
    ids, gate = text.ids.to(twin.device), attention.has_output_gate(twin)
    for way in ways:
        reporter.begin(f"{subject}: PPL {way.name}, {text.corpus}", len(text.targets))
        yield from bench.score(way, corpus, plan.tokens).measurements(subject)
        reporter.begin(f"{subject}: attention {way.name}, {text.corpus}", ids.shape[1])
        if attention.watched_layers(twin):
            shares = attention.shares(way, twin, ids, begin=plan.size + 1, on_block=reporter.advance)
            yield from measured(subject, text.corpus, way.name, ids.shape[1], shares | {GATE: ("", [float(gate)])})


def page(report: Report) -> Page:
    """Return the whole page."""
    samples = {(one.part, one.subject, one.configuration, one.metric): one.samples for one in report.measurements}
    subjects = list(dict.fromkeys((one.part, one.subject) for one in report.measurements))
    dense, *ways = [one.name for one in report.configurations]
    size, counts = report.plan["size"], [f"S = {count}" for count in COUNTS]
    scores, masses = [], []
    for model, text in subjects:
        ppl = [samples[model, text, way, "PPL"][0] for way in (dense, *ways)]
        scores.append([name(model), name(text), *map("{:.3f}".format, ppl), f"{_ratio(ppl[1:]):.2f}x"])
        for way, title in zip((dense, *ways), ("dense", *counts), strict=True):
            found = [samples.get((model, text, way, metric), []) for metric in (*SHARES, LEARNED)]
            *first, last, learned = found
            rest = [1 - kept - own for kept, own in zip(last, learned, strict=True)]
            masses.append([name(model), name(text), title, *map(_share, (*first, last, rest, learned))])
    blocks = [
        "# Do today's models need sinks?",
        "**A quick run**: few tokens, and a small cache." if report.quick else "",
        machine_line(report.machine),
        "## Findings",
        bullets([_finding(samples, model, report) for model in dict.fromkeys(model for model, _ in subjects)]),
        "## What ran",
        head(report),
        f"## PPL by the number of sinks S, over {report.plan['tokens']:,} tokens",
        f"S + W is {size:,} and B is 0 in every column; without sinks it is a plain window.",
        table(("Model", "Text", "Dense", *counts, RATIO), scores, words=("Text",)),
        f"Published, 400,000 tokens of PG-19, cache of 2,048 (Llama-2: 4,096): {published.PAPER}, table 2.",
        "Another model and text: only the pattern compares.",
        table(("Model", *counts, RATIO), [*map(_published, (*published.SINKS, published.SINKS_LLAMA))]),
        f"## Where attention goes, queries {size + 1:,} and later",
        table(
            ("Model", "Text", "Cache", "First key", *(f"First {one}" for one in FIRST[1:]), "Rest", "Learned sink"),
            masses,
            words=("Text", "Cache"),
        ),
        f"Spread evenly over {size:,} keys, attention would give each {1 / size:.2%}.",
        "## What the words mean",
        bullets(WORDS),
    ]
    return Page(join(blocks))


def _ratio(by_count: Sequence[float]) -> float:
    """Return PPL without sinks over PPL with the usual number of them."""
    return by_count[COUNTS.index(0)] / by_count[COUNTS.index(USUAL)]


def _share(by_layer: Sequence[float]) -> str:
    if max(by_layer, default=0) < ROUNDING:
        return NOT_MEASURED
    return f"{mean(by_layer):.1%} ({median(by_layer):.1%}, {max(by_layer):.1%})"


def _published(row: Sequence[str]) -> list[str]:
    """Return a row of the paper's table, which has 0, 1, 2, 4 and 8 sinks."""
    model, none, one, _, *more = row
    return [model, none, one, *more, f"{_ratio([float(ppl) for ppl in (none, one, *more)]):.2f}x"]


def _finding(samples: Samples, model: str, report: Report) -> str:
    """Say of one model what sinks buy, and where its attention goes, beside what the paper says."""
    dense, *ways = [one.name for one in report.configurations]
    none, one, usual = (ways[COUNTS.index(count)] for count in (0, 1, USUAL))
    texts = list(dict.fromkeys(text for own, text, *_ in samples if own == model))
    parts = []
    for text in texts:
        ppl = {way: samples[model, text, way, "PPL"][0] for way in (dense, none, one, usual)}
        parts.append(
            f"on {name(text)} PPL is {ppl[none]:.3f} without sinks, {ppl[none] / ppl[usual]:.2f}x of the "
            f"{ppl[usual]:.3f} with {USUAL} ({ppl[one] / ppl[usual]:.2f}x with one; dense {ppl[dense]:.3f})"
        )
    words = f"**{name(model)}**: {'; '.join(parts)}."
    text, metric = texts[0], SHARES[0]
    if (model, text, dense, metric) in samples:
        first = samples[model, text, dense, metric]
        kept, lost = (mean(samples[model, text, way, metric]) for way in (usual, none))
        words += (
            f" Dense attention gives {mean(first):.1%} of its probability to the first token of {name(text)}, and "
            f"streaming with {USUAL} sinks {kept:.1%}; without sinks the oldest token of the window gets {lost:.1%}."
        )
        if len(first) > BOTTOM:
            words += (
                f" In the first {BOTTOM} of {len(first)} layers that count the first token gets "
                f"{mean(first[:BOTTOM]):.1%}, in the others {mean(first[BOTTOM:]):.1%}; of Llama-2-7B, the paper's "
                "section 3 shows local attention in the bottom two layers, and in all others much on the first token."
            )
        learned = mean(samples[model, text, dense, LEARNED])
        words += f" Learned sinks take {learned:.1%} of its dense attention." if learned > ROUNDING else ""
        words += " Its attention has output gates." if samples[model, text, dense, GATE][0] else ""
    return words
