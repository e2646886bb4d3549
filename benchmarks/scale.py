"""Many streams at once: what a step costs, against a prediction from its parts, and what follows for larger machines.

`nox -s scale` writes docs/scale.md; `-- --quick` measures less.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Final

import torch
from benchmarks.machines import extrapolation

from sinkwindow.retention import Retention
from sinkwindow_lab.files import write_text
from sinkwindow_lab.inputs import machine
from sinkwindow_lab.inputs.models import load_model
from sinkwindow_lab.inputs.shapes import random_model
from sinkwindow_lab.measure.clock import Side, interleave
from sinkwindow_lab.measure.micro import bare_attention
from sinkwindow_lab.measure.streams import CONTINUOUS, SEPARATE, WAYS, one_batch
from sinkwindow_lab.render.markdown import bullets, join, table
from sinkwindow_lab.render.origins import machine_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PreTrainedModel

TARGET: Final = 4.0  # tokens/s of continuous batching over separate caches, at the most streams, with the tiny model
CLOSE: Final = 0.15  # largest error of a prediction
HEAD: Final = """\
# Scale

Written by `nox -s scale`. A decode step of `n` streams, each with a full cache, in three ways: `n` separate caches, one
after the other; one `StreamingCache` with `n` rows, which begin and end together; and `n` requests of
[`sinkwindow.continuous`](guides/streams.md), which come and go. The ways are timed interleaved; medians."""


@dataclass(frozen=True)
class Subject:
    """A model, its rule, and how it is measured."""

    title: str
    model: PreTrainedModel
    rule: Retention
    samples: int


def measure_streams(subject: Subject, counts: Sequence[int]) -> tuple[str, dict[int, float]]:
    """Return a table of streams, and by their number how much faster continuous batching is than separate caches."""
    rows, faster = [], {}
    for count in counts:
        ways = {name: make(subject.model, subject.rule, count) for name, make in WAYS.items()}
        sides = {name: Side(way.step) for name, way in ways.items()}
        timed = interleave(sides, subject.samples, subject.model.device)
        took = {name: median(one.ms) for name, one in timed.items()}
        for name, way in ways.items():
            rate, gain = 1e3 * count / took[name], took[SEPARATE] / took[name]
            rows.append([str(count), name, f"{took[name]:.2f}", f"{rate:,.0f}", f"{gain:.2f}x", f"{way.nbytes:,}"])
        faster[count] = took[SEPARATE] / took[CONTINUOUS]
    columns = ("streams", "way", "step (ms)", "tokens/s", "over separate caches", "keys and values (bytes)")
    return table(columns, rows, words=("way",)), faster


@torch.inference_mode()
def linear_maps(model: PreTrainedModel, rows: int) -> Callable[[], object]:
    """Return a function that runs all linear maps of a step for some streams, and nothing else."""
    maps = [one for one in model.modules() if isinstance(one, torch.nn.Linear)]
    inputs = {size: torch.randn(rows, 1, size, dtype=model.dtype) for size in {one.in_features for one in maps}}

    @torch.inference_mode()
    def run() -> None:
        for one in maps:
            one(inputs[one.in_features])

    return run


def measure_prediction(subject: Subject, counts: Sequence[int]) -> tuple[str, dict[int, float]]:
    """Predict the step of a batch from its parts, and compare; return a table and the errors by number of streams.

    A step is its linear maps, its attention, and a rest that does not depend on the number of streams: what the step of
    one stream takes beyond its linear maps and attention. All of them are timed in the same interleaved run.
    """
    held, model, sides = subject.rule.capacity, subject.model, dict[str, Side]()
    for count in (1, *counts):
        sides[f"step {count}"] = Side(one_batch(model, subject.rule, count).step)
        sides[f"maps {count}"] = Side(linear_maps(model, count))
        sides[f"attention {count}"] = Side(bare_attention(model, held, batch=count).step)
    took = {name: median(one.ms) for name, one in interleave(sides, subject.samples, model.device).items()}
    rest = took["step 1"] - took["maps 1"] - took["attention 1"]
    rows, errors = [], {}
    for count in counts:
        parts = [took[f"maps {count}"], took[f"attention {count}"], rest]
        predicted, measured = sum(parts), took[f"step {count}"]
        errors[count] = predicted / measured - 1
        numbers = [f"{one:.2f}" for one in (*parts, predicted, measured)]
        rows.append([str(count), *numbers, f"{errors[count]:+.1%}"])
    columns = ("streams", "linear maps (ms)", "attention (ms)", "rest (ms)", "predicted", "measured", "error")
    return table(columns, rows), errors


def subjects(*, quick: bool) -> list[Subject]:
    """Return a tiny model, whose step is mostly Python, and the embedded one, whose step is mostly arithmetic."""
    few = [Subject("tiny random model", random_model("tiny"), Retention(4, 60), 5 if quick else 60)]
    return few if quick else [*few, Subject("SmolLM2-135M", load_model().model, Retention(4, 252), 7)]


def run(*, quick: bool) -> tuple[str, Mapping[str, bool]]:
    """Measure; return the page, and what must hold by its words."""
    counts = (2, 8) if quick else (8, 16, 64)
    blocks, checks = [HEAD], dict[str, bool]()
    origin = table(("", "value"), machine_rows(machine.describe(torch.device("cpu"))), words=True)
    blocks += ["## What ran", origin]
    for number, subject in enumerate(subjects(quick=quick)):
        with torch.no_grad():
            streams, faster = measure_streams(subject, counts)
            predicted, errors = measure_prediction(subject, counts)
        rule = f"S = {subject.rule.num_sinks}, W = {subject.rule.window}, B = {subject.rule.buffer}"
        blocks += [
            f"## {subject.title}, {rule}",
            streams,
            "### The step of a batch, predicted from its parts",
            predicted,
        ]
        most = counts[-1]
        if number == 0:
            words = f"{subject.title}: continuous batching of {most} streams over separate caches {faster[most]:.2f}x"
            checks[f"{words}, at least {TARGET:.0f}x"] = faster[most] >= TARGET
        worst = max(errors.values(), key=abs)
        checks[f"{subject.title}: largest error of a prediction {worst:+.1%}, at most {CLOSE:.0%}"] = (
            abs(worst) <= CLOSE
        )
    marks = bullets([f"{what}: {'holds' if holds else '**DOES NOT HOLD**'}." for what, holds in checks.items()])
    return join([*blocks, "## Checks", marks, extrapolation()]), checks


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status, 1 if a check does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="measure less, and the tiny model only")
    parser.add_argument("--out", type=Path, help="Markdown file to write; docs/scale.md, or results/scale.md if quick")
    chosen = parser.parse_args(arguments)
    out = chosen.out or Path("results" if chosen.quick else "docs", "scale.md")
    report, checks = run(quick=chosen.quick)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, report)
    wrong = [what for what, holds in checks.items() if not holds]
    sys.stderr.writelines(f"does not hold: {what}\n" for what in wrong)
    sys.stdout.write(f"wrote {out}: {len(checks) - len(wrong)} of {len(checks)} checks hold\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
