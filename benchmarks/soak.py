"""Stream a long time, and check that nothing grows: `nox -s soak`; `-- --quick` streams less, in five minutes.

Each stream of the full program takes up to an hour. One that has ended is kept in results/soak, so that an interrupted
run goes on with the next; `-- --only embedded-static` runs one of them, and `-- --fresh` all again.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Final

import torch
from benchmarks import streams
from benchmarks.streams import PROBE, Drift, Found, Plan, Subject, far, soak
from pydantic import TypeAdapter

from sinkwindow_lab.files import write_text
from sinkwindow_lab.inputs import machine
from sinkwindow_lab.inputs.corpora import load_corpus
from sinkwindow_lab.inputs.models import LoadedModel, describe, load_model
from sinkwindow_lab.inputs.shapes import random_model
from sinkwindow_lab.inputs.wide import wide_copy
from sinkwindow_lab.progress import Bars, Reporter
from sinkwindow_lab.records import MachineRecord
from sinkwindow_lab.render.markdown import bullets, join, table
from sinkwindow_lab.render.origins import machine_line, machine_rows
from sinkwindow_lab.reports.tables.bench import model_digest
from sinkwindow_lab.store import Store, code_version

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RESIDENT: Final = 32 * 2**20  # by how much the resident set may grow: 34 bytes per token of a million [bytes]
SLOWER: Final = 1.02  # largest TPOT at the end over that at the start
KINDS: Final = ("dynamic", "static")
CODE: Final = (
    *("inputs.models", "inputs.shapes", "inputs.wide", "measure.clock", "measure.memory", "measure.micro"),
    *("ways.configurations", "ways.sessions"),
)
KEPT: Final = TypeAdapter(tuple[Found, MachineRecord])
HEAD: Final = f"""\
# Soak

Written by `nox -s soak`: one token per call, for a long time. At each checkpoint the cache's bytes, all tensors of the
process and its resident set are counted, and the logits of the last {PROBE} tokens are compared with those of a fresh
cache in float64, which reads only the tokens on which they depend; "fresh run" is the error of such a cache in the
stream's dtype. TPOT at the start is that of a copy of the cache made early, interleaved with the steps at the end."""
COLUMNS: Final = {
    "tokens": "{0.tokens:,}",
    "evictions": "{0.evictions:,}",
    "cache (bytes)": "{0.nbytes:,}",
    "tensors": "{0.tensors:,}",
    "resident (bytes)": "{0.resident:,}",
    "ms per token": "{0.ms_per_token:.3f}",
    "error": "{0.drift.error:.2e}",
    "fresh run": "{0.drift.plain:.2e}",
}


@dataclass(frozen=True)
class Check:
    """One thing that must not grow."""

    what: str
    holds: bool


def judge(found: Found) -> list[Check]:
    """Return what must hold of a stream."""
    points = found.checkpoints
    plain = max(one.drift.plain for one in points)  # does not depend on the stream's length: the noise of this dtype
    worst = [one.drift.error - one.drift.step for one in points]
    growth = points[-1].resident - points[0].resident
    ratio = median(found.late_ms) / median(found.early_ms)
    counted = {(one.nbytes, one.tensors, one.tensor_bytes) for one in points}
    numbers = "; ".join(f"cache {nbytes:,} bytes, {count:,} tensors, {size:,} bytes" for nbytes, count, size in counted)
    errors = f"{points[0].drift.error:.2e} at first, {points[-1].drift.error:.2e} at the end"
    return [
        Check(f"the same tensors at every checkpoint: {numbers}", len(counted) == 1),
        Check(f"resident set grows by {growth / 2**20:.1f} MiB, at most {RESIDENT / 2**20:.0f}", growth <= RESIDENT),
        Check(f"TPOT at the end over that at the start {ratio:.3f}, at most {SLOWER}", ratio <= SLOWER),
        Check(
            f"errors {errors}, at most twice the {plain:.2e} of fresh runs and one rounding",
            all(error <= 2 * plain for error in worst),
        ),
    ]


def judge_far(title: str, found: Drift) -> Check:
    """Return what must hold of far positions."""
    allowed = 2 * found.plain + found.step
    return Check(f"{title}: error {found.error:.2e}, at most {allowed:.2e}", found.error <= allowed)


def section(found: Found, on: MachineRecord) -> str:
    """Return a stream's checkpoints as Markdown."""
    rows = [[form.format(one) for form in COLUMNS.values()] for one in found.checkpoints]
    origin = machine_line(on, "Software", "Commit")
    return join([f"## {found.title}", origin, table([*COLUMNS], rows), marks(judge(found))])


def marks(checks: Sequence[Check]) -> str:
    """Return checks as a list."""
    return bullets([*map(mark, checks)])


def mark(check: Check) -> str:
    """Return a check in words."""
    return f"{check.what}: {'holds' if check.holds else '**DOES NOT HOLD**'}."


def tiny() -> Subject:
    """Return a random model with two layers."""
    model, generator = random_model("tiny"), torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, 100_000), generator=generator)
    return Subject("tiny random model", model, wide_copy(model), ids)


def embedded() -> Subject:
    """Return the embedded model, and Shakespeare."""
    loaded = load_model()
    ids = loaded.encode(load_corpus("shakespeare"), tokens=100_000).ids
    return Subject(loaded.record.name, loaded.model, wide_copy(loaded.model), ids)


@dataclass(frozen=True)
class Program:
    """What a run streams, and how far."""

    streams: tuple[tuple[Callable[[], Subject], Plan], ...]
    far: tuple[tuple[int, bool], ...]  # positions, and whether they are reached for real


FULL: Final = Program(
    streams=(
        (tiny, Plan(1_000_000, (4, 60, 0), checkpoints=10, early=10_000, timed=10_000, compiled=True)),
        (embedded, Plan(100_000, (4, 252, 3), checkpoints=5, early=1_000, timed=1_000, compiled=True)),
    ),
    far=((2**24, True), (2**24, False), (2**31, False)),
)
STREAMS: Final = [f"{make.__name__}-{kind}" for make, _ in FULL.streams for kind in KINDS]
QUICK: Final = Program(
    streams=(
        (tiny, Plan(20_000, (4, 60, 0), checkpoints=5, early=1_000, timed=2_000, compiled=True)),
        (embedded, Plan(700, (4, 12, 3), checkpoints=2, early=80, timed=150, compiled=False)),
    ),
    far=((2**20, True), (2**24, False), (2**31, False)),
)


def origin_of(subject: Subject) -> dict[str, str]:
    """Return what numbers of a subject depend on, besides the plan: code, model, tokens and machine."""
    loaded = LoadedModel(subject.model, None, describe(subject.model, subject.title, "soak"))
    own = hashlib.sha256(Path(streams.__file__).read_bytes()).hexdigest()
    return {
        "code": f"{code_version(*CODE)} {own}",
        "model": f"{model_digest(loaded)} {subject.model.dtype}",
        "text": hashlib.sha256(subject.ids.numpy().tobytes()).hexdigest(),
        "machine": machine.fingerprint(subject.model.device),
    }


def streamed(
    program: Program, store: Store, progress: Reporter, only: str | None = None
) -> list[tuple[Found, MachineRecord]]:
    """Return what was found of each stream, kept or measured now."""
    found = []
    for make, plan in program.streams:
        kinds = [kind for kind in KINDS if only in (None, f"{make.__name__}-{kind}")]
        if not kinds:
            continue
        subject = make()
        origin = {"stream": make.__name__, "plan": asdict(plan), **origin_of(subject)}
        for kind in kinds:
            key = {**origin, "kind": kind}
            kept = store.read("soak", key, KEPT)
            if kept is None:
                kept = soak(subject, plan, kind, progress), machine.describe(torch.device("cpu"))
                store.write("soak", key, KEPT.dump_python(kept, mode="json"))
            found.append(kept)
    return found


def run(program: Program, progress: Reporter, store: Store | None = None) -> tuple[str, list[Check]]:
    """Run a program; return the report in Markdown and all checks."""
    blocks, checks = [], list[Check]()
    for found, on in streamed(program, store or Store(), progress):
        blocks.append(section(found, on))
        for one in judge(found):
            progress.found(mark(one))
            checks.append(replace(one, what=f"{found.title}: {one.what}"))
    subject, distant = tiny(), list[Check]()
    for (target, real), kind in itertools.product(program.far, KINDS):
        title = f"{kind}, past position {target:,}, {'streamed' if real else 'set'}"
        progress.begin(title, 1)
        distant.append(judge_far(title, far(subject, (4, 60, 3), kind, target, real=real)))
        progress.found(mark(distant[-1]))
    origin = table(("", "value"), machine_rows(machine.describe(torch.device("cpu"))), words=True)
    return join([HEAD, *blocks, "## Far positions", origin, marks(distant)]), checks + distant


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status, 1 if something grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="stream less, in five minutes on two cores")
    parser.add_argument("--out", type=Path, help="Markdown file to write; docs/soak.md, or results/soak.md if quick")
    parser.add_argument("--fresh", action="store_true", help="stream again what is kept")
    parser.add_argument("--only", choices=STREAMS, help="run one stream and keep it, without a page")
    chosen = parser.parse_args(arguments)
    out = chosen.out or Path("results" if chosen.quick else "docs", "soak.md")
    program = QUICK if chosen.quick else FULL
    store = Store(None if chosen.quick else Path("results", "soak"), fresh=chosen.fresh)
    with Bars(1 if chosen.only else len(KINDS) * (len(program.streams) + len(program.far))) as bars:
        if chosen.only:
            ((found, _),) = streamed(program, store, bars, chosen.only)
            checks = judge(found)
            sys.stdout.write(f"{marks(checks)}\n")
            return 0 if all(one.holds for one in checks) else 1
        report, checks = run(program, bars, store)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, report)
    wrong = [one.what for one in checks if not one.holds]
    sys.stderr.writelines(f"not flat: {what}\n" for what in wrong)
    sys.stdout.write(f"wrote {out}: {len(checks) - len(wrong)} of {len(checks)} checks hold\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
