"""All studies by name: which ones to run, and how many measurements that will be."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from sinkwindow_lab.errors import LabError
from sinkwindow_lab.inputs.corpora import Corpus
from sinkwindow_lab.reports.bench import Bench
from sinkwindow_lab.reports.studies import recall, scores, steps, where
from sinkwindow_lab.reports.studies.plans import StudyPlan
from sinkwindow_lab.reports.study_records import Studies
from sinkwindow_lab.ways.configurations import Configuration, parse

COLLECTORS: dict[str, Callable[[Bench, StudyPlan], Any]] = {
    "mistakes": lambda bench, plan: scores.mistakes(bench, plan.mistakes, plan.mistakes_tokens),
    "sinks": lambda bench, plan: scores.sinks(bench, plan.sinks, plan.sinks_cache, plan.sinks_tokens),
    "sizes": lambda bench, plan: scores.sizes(bench, plan.sizes, plan.sizes_tokens),
    "along": lambda bench, plan: scores.along(bench, plan.along, plan.along_tokens, plan.along_bin),
    "steps": lambda bench, plan: steps.steps(
        bench,
        places=plan.places,
        cache=plan.step_cache,
        sizes=plan.step_sizes,
        repeats=plan.step_repeats,
        recompute_repeats=plan.recompute_repeats,
    ),
    "where": lambda bench, plan: where.where(bench, plan.where, plan.sizes_tokens),
    "recall": lambda bench, plan: recall.recall(bench, plan.recall, plan.recall_seeds, plan.recall_lines),
}
PARTS = ("experiments", *COLLECTORS)
# What each study scores, and over how many tokens; `along` reads the first text only.
SCORED: dict[str, Callable[[StudyPlan], tuple[list[Configuration], int]]] = {
    "mistakes": lambda plan: ([parse(name) for name in plan.mistakes], plan.mistakes_tokens),
    "sinks": lambda plan: (scores.sink_rows(plan.sinks, plan.sinks_cache), plan.sinks_tokens),
    "sizes": lambda plan: (scores.size_rows(plan.sizes), plan.sizes_tokens),
    "along": lambda plan: ([parse(name) for name in plan.along], plan.along_tokens),
}


def chosen_parts(names: str | None) -> tuple[str, ...]:
    """Parse the option `--only`: names separated by commas, None for everything. Return the parts in page order.

    Raises:
        LabError: if a name is unknown or there is none.
    """
    if names is None:
        return PARTS
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in PARTS]
    if unknown or not wanted:
        raise LabError(f"--only {names!r} is no part of the tables; parts are {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in wanted)


def count_measurements(plan: StudyPlan, parts: Collection[str], corpora: int) -> int:
    """Return how many measurements `collect` will report, finished ones included."""
    counts = {
        "mistakes": corpora * len(plan.mistakes),
        "sinks": corpora * (1 + len(plan.sinks)),
        "sizes": corpora * (1 + len(plan.sizes)),
        "along": len(plan.along),
        "steps": 2,  # all configurations interleaved: against tokens streamed, against size
        "where": 2 * corpora * len(plan.where),
        "recall": len(plan.recall) * len(plan.recall_seeds),
    }
    return sum(counts[part] for part in parts if part in counts)


def readings(
    plan: StudyPlan, parts: Collection[str], corpora: Sequence[Corpus]
) -> Iterator[tuple[Configuration, Corpus, int]]:
    """Yield what `collect` will read from end to end, for `Bench.foresee`."""
    for part in parts:
        if part in SCORED:
            rows, count = SCORED[part](plan)
            for corpus in corpora[:1] if part == "along" else corpora:
                yield from ((row, corpus, count) for row in rows)


def collect(bench: Bench, plan: StudyPlan, parts: Collection[str]) -> Studies:
    """Run the studies; those not in `parts` are None.

    Raises:
        LabError: if a text is too short or a configuration does not fit the model.
    """
    return Studies(**{name: run(bench, plan) for name, run in COLLECTORS.items() if name in parts})
