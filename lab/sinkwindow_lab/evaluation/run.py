"""Tasks of lm-eval on one model with several configurations, for the tables."""

from __future__ import annotations

import importlib.metadata
import logging
import random
import time
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate as lm_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import set_seed

from sinkwindow_lab.errors import LabError, say
from sinkwindow_lab.evaluation.model import StreamingLM
from sinkwindow_lab.inputs import machine
from sinkwindow_lab.inputs.models import LoadedModel
from sinkwindow_lab.records import Configuration, Measurement, Report, measured
from sinkwindow_lab.reports.evaluation import ERROR

TASKS = Path(__file__).with_name("tasks")
DRAWS = 1000  # of a bootstrap, where lm-eval has no formula for a standard error


def language_model(loaded: LoadedModel, way: Configuration, batch_size: int) -> HFLM:
    """Return a model of lm-eval that remembers in one way: `HFLM` itself for the baseline."""
    options = {"tokenizer": loaded.tokenizer, "batch_size": batch_size}
    if way.kind == "baseline":
        return HFLM(loaded.model, **options)
    if way.kind not in ("streaming", "window"):
        raise LabError(f"configuration {way.name!r} cannot be evaluated: give baseline, streaming_S_W or window_0_W")
    try:
        return StreamingLM(loaded.model, *way.limits, **options)
    except (TypeError, ValueError) as error:
        raise LabError(str(error)) from error


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """Load tasks, groups or tags; the thousands of lm-eval are searched only for names that are none of ours."""
    ours = TaskManager(include_path=TASKS, include_defaults=False)
    known = [name for name in names if name in ours.all_tasks]
    manager = ours if known == list(names) else TaskManager(include_path=TASKS)
    try:
        loaded: dict[str, Any] = manager.load(list(names))
    except Exception as error:  # a name, a broken file, or the hub's clients, which each raise their own classes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LabError(
            f"--tasks {','.join(names)} cannot be loaded ({reason}): --tasks {','.join(ours.all_tasks)} need no network"
        ) from error
    return loaded


def seeded_tasks(names: Sequence[str]) -> dict[str, Any]:
    """Load tasks that draw nothing from earlier ones: examples and documents are those of lm-eval's own seeds."""
    set_seed(DEFAULT_OTHER_SEED)
    random.seed(DEFAULT_RANDOM_SEED)
    loaded = load_tasks(names)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    return loaded


def evaluate(
    loaded: LoadedModel,
    ways: Sequence[Configuration],
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 1,
) -> Report:
    """Evaluate all tasks with each configuration; `limit` is of the documents of a task."""
    begun = time.perf_counter()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its advice is about its own command line
    models = [language_model(loaded, way, batch_size) for way in ways]  # before minutes of work: do they fit?
    found: list[Measurement] = []
    for way, model in zip(ways, models, strict=True):
        chosen = seeded_tasks(tasks)  # again for each: tasks have random state
        say(f"lm-eval: {way.name}, {', '.join(chosen['tasks'])}")
        start = time.perf_counter()
        results = lm_evaluate(model, chosen, limit=limit, bootstrap_iters=DRAWS, log_samples=False)
        took = {"time": ("s", [time.perf_counter() - start])}
        found += measured("lm-eval", "all tasks", way.name, None, took)
        for task, metrics in results["results"].items():
            count = results["n-samples"].get(task, {}).get("effective")
            documents = {} if count is None else {"documents": ("", [float(count)])}
            found += measured("lm-eval", task, way.name, None, {**figures(metrics), **documents})
    return Report(
        kind="lm-eval",
        quick=limit is not None,
        plan={"tasks": list(tasks), "limit": limit, "batch_size": batch_size},
        machine=machine.describe(loaded.model.device),
        models=[loaded.record],
        configurations=list(ways),
        measurements=found,
        notes={"lm-eval": importlib.metadata.version("lm-eval")},
        seconds=time.perf_counter() - begun,
    )


def figures(metrics: Mapping[str, Any]) -> dict[str, tuple[str, list[float]]]:
    """Return the numbers among lm-eval's results of a task, whose keys are a metric and a filter: `acc_stderr,none`."""
    found = {}
    for key, value in metrics.items():
        metric, comma, chosen = key.partition(",")
        plain = metric.removesuffix("_stderr")
        if comma and isinstance(value, Real):
            name = plain if chosen == "none" else f"{plain} ({chosen})"
            found[name if plain == metric else f"{name}{ERROR}"] = ("", [float(value)])
    return found
