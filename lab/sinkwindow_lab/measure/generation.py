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

import torch
from transformers import PreTrainedModel

from sinkwindow_lab.errors import LabError
from sinkwindow_lab.measure.clock import Clock, Side, interleave, repeated
from sinkwindow_lab.measure.memory import generation_peaks, weight_bytes
from sinkwindow_lab.records import Configuration, Figures
from sinkwindow_lab.ways.configurations import open_session
from sinkwindow_lab.ways.sessions import Reader, Session

WARM_UP_TOKENS = 4  # decode steps before anything is timed: threads start, kernels are chosen, weights are paged in
TURN = 65  # consecutive timed steps: one eviction of the default buffer, B + 1 [tokens]
PROMPTS = 5  # times that each configuration reads the prompt


def figures(
    new_tokens: int, ttft_ms: Sequence[float], tpot_ms: Sequence[float], decode_ms: float, session: Session
) -> Figures:
    """Return the numbers of a generation; `decode_ms` is that of all tokens after the first, also if not timed."""
    total = (statistics.median(ttft_ms) + decode_ms) / 1e3
    return {
        "TTFT": ("s", [one / 1e3 for one in ttft_ms]),  # a sample per reading of the prompt
        "TPOT": ("ms", tpot_ms),  # one per timed token after the first
        "total": ("s", [total]),
        "throughput": ("tok/s", [new_tokens / total]),
        "generation: kept": ("tokens", [session.kept_tokens]),
        "generation: cache": ("bytes", [session.cache_bytes]),
        "generation: evictions": ("", [session.evictions]),
    }


def together(rounds: Sequence[Figures]) -> Figures:
    """Return the numbers of the same generation done several times, their samples together."""
    return {
        metric: (unit, [sample for one in rounds for sample in one[metric][1]])
        for metric, (unit, _) in rounds[0].items()
    }


class _Run:
    """The generation of one configuration: its token to feed next, and what was timed so far."""

    def __init__(self, way: Configuration, model: PreTrainedModel, prompt: torch.Tensor) -> None:
        self.way, self.name, self._model, self._prompt = way, way.name, model, prompt
        self.steps, self.decode_ms = list[float](), 0.0
        self.found = dict[int, Figures]()  # by the number of new tokens
        self.start()

    def start(self) -> None:
        """Open a fresh session, which reads the prompt first."""
        self.session, self._token = open_session(self.way, self._model), self._prompt

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
        self.found[new_tokens] = figures(new_tokens, ttft_ms, [*self.steps], self.decode_ms, self.session)

    def by_stage(self, stages: Sequence[int]) -> dict[int, Figures]:
        """Return what was found at these numbers of tokens, and peaks of memory where they are counted."""
        found = {stage: dict(self.found[stage]) for stage in stages}
        for stage, peak in zip(stages, generation_peaks(self.way, self._model, self._prompt, stages), strict=True):
            if peak is not None:
                found[stage]["peak memory"] = "bytes", [weight_bytes(self._model) + peak]
        return {**found}


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
) -> list[dict[int, Figures]]:
    """Generate with all configurations, interleaved; return for each its numbers by stage, as if it had ended there.

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
    return [run.by_stage(own) for run, own in zip(runs, stages, strict=True)]
