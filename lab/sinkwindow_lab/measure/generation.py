"""Greedy generations: TTFT, TPOT and peak memory.

Compared configurations are interleaved, a prompt or a token each. The loop is our own, so that the
measured times contain only the model, its cache and one argmax. The hooks of streaming rows stay on the model while
others generate; they return at once.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import PreTrainedModel

from sinkwindow_lab.errors import LabError
from sinkwindow_lab.measure.clock import Clock, Side, interleave, repeated
from sinkwindow_lab.measure.memory import generation_peaks, weight_bytes
from sinkwindow_lab.records import Configuration, Measurement, measured
from sinkwindow_lab.ways.configurations import open_session
from sinkwindow_lab.ways.sessions import Reader

WARM_UP_TOKENS = 4  # decode steps before anything is timed: threads start, kernels are chosen, weights are paged in
TURN = 65  # consecutive timed steps: one eviction of the default buffer, B + 1 [tokens]
PROMPTS = 5  # times that each configuration reads the prompt


@dataclass(frozen=True)
class Generation:
    """One generation: `ttft_ms` has a sample per reading of the prompt, `tpot_ms` one per timed token after the first.

    `decode_ms` is the time of all tokens after the first, also of those that are not timed. `peak_bytes` counts the
    weights and the most that its own tensors take at once; None if the device reports neither.
    """

    configuration: str
    new_tokens: int
    ttft_ms: list[float]
    tpot_ms: list[float]
    decode_ms: float
    kept_tokens: int
    cache_bytes: int
    evictions: int
    peak_bytes: int | None

    @property
    def total_s(self) -> float:
        """Time of the prefill and of all tokens [s]."""
        return (statistics.median(self.ttft_ms) + self.decode_ms) / 1e3

    def measurements(self, part: str, subject: str) -> list[Measurement]:
        """Return every number as a measurement of a part, at the number of new tokens."""
        figures: dict[str, tuple[str, list[float]]] = {
            "TTFT": ("s", [one / 1e3 for one in self.ttft_ms]),
            "TPOT": ("ms", self.tpot_ms),
            "total": ("s", [self.total_s]),
            "throughput": ("tok/s", [self.new_tokens / self.total_s]),
            "generation: kept": ("tokens", [self.kept_tokens]),
            "generation: cache": ("bytes", [self.cache_bytes]),
            "generation: evictions": ("", [self.evictions]),
        }
        if self.peak_bytes is not None:
            figures["peak memory"] = ("bytes", [self.peak_bytes])
        return measured(part, subject, self.configuration, self.new_tokens, figures)


def rounds_of(generations: Sequence[Generation], subject: str) -> list[Measurement]:
    """Return the measurements of the same generation done several times, their samples together."""
    rounds = [one.measurements("speed", subject) for one in generations]
    return [
        same[0].model_copy(update={"samples": [sample for one in same for sample in one.samples]})
        for same in zip(*rounds, strict=True)
    ]


class _Run:
    """The generation of one configuration: its token to feed next, and what was timed so far."""

    def __init__(self, configuration: Configuration, model: PreTrainedModel, prompt: torch.Tensor) -> None:
        self._open = partial(open_session, configuration, model)
        self._prompt = prompt
        self.name, self.steps, self.decode_ms, self.found = configuration.name, list[float](), 0.0, list[Generation]()
        self.start()

    def start(self) -> None:
        """Open a fresh session, which reads the prompt first."""
        self.session, self._token = self._open(), self._prompt

    def restart(self) -> None:
        """Open a fresh session in the place of the one that is open."""
        self.session.close()
        self.start()

    def feed(self) -> None:
        """Feed the prompt, or the last token; the answer is the next one."""
        self._token = self.session.feed(self._token, last_only=True).argmax(dim=-1)

    def end_stage(self, new_tokens: int, count: int, timed: Sequence[float], ttft_ms: list[float]) -> None:
        """Count the time of `count` tokens, by those of them that were timed, and note the generation so far."""
        self.steps += timed
        self.decode_ms += statistics.fmean(timed) * count
        state = self.session.kept_tokens, self.session.cache_bytes, self.session.evictions
        self.found.append(Generation(self.name, new_tokens, ttft_ms, [*self.steps], self.decode_ms, *state, None))


def turns(count: int, places: int | None) -> list[tuple[int, int]]:
    """Split `count` steps into runs: how many are read before each, and how many timed, in `places` runs of `TURN`."""
    if places is None or count <= places * TURN:
        return [(0, count)]
    starts = [count * place // places + (count // places - TURN) // 2 for place in range(places)]
    ends = [0, *(start + TURN for start in starts)]
    return [*((start - end, TURN) for start, end in zip(starts, ends, strict=False)), (count - ends[-1], 0)]


def fed_tokens(prompt_tokens: int, new_tokens: int) -> int:
    """Return how many tokens a generation feeds at most: the last one is not fed."""
    return prompt_tokens + max(new_tokens - 1, WARM_UP_TOKENS)


def timed_steps(stages: Sequence[Sequence[int]], places: int | None) -> int:
    """Return how many steps `generate` times, of all configurations."""
    bounds = list(itertools.pairwise([1, *sorted({one for own in stages for one in own})]))
    counts = {stage: sum(count for _, count in turns(stage - before, places)) for before, stage in bounds}
    return sum(count for own in stages for stage, count in counts.items() if stage <= own[-1])


def generate(
    configurations: Sequence[Configuration],
    model: PreTrainedModel,
    prompt: torch.Tensor,
    stages: Sequence[Sequence[int]],
    *,
    places: int | None = None,
    clock: Clock | None = None,
    on_token: Callable[[str], object] | None = None,
) -> list[list[Generation]]:
    """Generate with all configurations, interleaved; return for each a generation per stage, as if it had ended there.

    Memory is counted in another generation, which is not timed. `prompt` is [1, tokens]. `stages` are ascending numbers
    of new tokens for each configuration; the end-of-text token stops none. With `places`, so many runs of `TURN` steps
    are timed up to each number; between them the prompt is read again, which takes the cache as far.
    """
    shortest = min(min(own) for own in stages)
    if shortest < 2:  # noqa: PLR2004 - see above
        raise LabError(f"new_tokens={shortest} has no time per output token: generate 2 or more")
    prompt, runs = prompt.to(model.device), list[_Run]()
    with ExitStack() as stack:
        for way in configurations:
            run = _Run(way, model, prompt)
            runs.append(run)
            stack.callback(lambda run=run: run.session.close())  # type: ignore[misc]  # the session open then
            repeated(run.feed, 1 + WARM_UP_TOKENS)()
        sides = {run.name: Side(run.feed, ready=run.restart) for run in runs}
        prompts = interleave(sides, PROMPTS, model.device, warm_up=0, clock=clock)
        for before, stage in itertools.pairwise([1, *sorted({one for own in stages for one in own})]):
            going = [run for run, own in zip(runs, stages, strict=True) if own[-1] >= stage]
            timed: dict[str, list[float]] = {run.name: [] for run in going}
            sides = {run.name: Side(run.feed) for run in going}
            for untimed, count in turns(stage - before, places):
                warm_up = 1 if untimed and count else 0  # the step after a long call warms the caches of the CPU
                for run in going:
                    Reader(run.session, prompt).read_to(untimed - warm_up)
                if count:
                    found = interleave(sides, count, model.device, warm_up=warm_up, clock=clock, on_sample=on_token)
                    for name, one in found.items():
                        timed[name] += one.ms
            for run in going:  # each part of a generation by its own steps
                run.end_stage(stage, stage - before, timed[run.name], prompts[run.name].ms)
    generations = []
    for way, run, own in zip(configurations, runs, stages, strict=True):
        wanted = [made for made in run.found if made.new_tokens in own]
        counted = generation_peaks(way, model, prompt, own)
        peaks = [None if peak is None else weight_bytes(model) + peak for peak in counted]
        generations.append([replace(made, peak_bytes=peak) for made, peak in zip(wanted, peaks, strict=True)])
    return generations
