"""Speed of greedy generations: TTFT, TPOT, total time, throughput and peak memory.

Compared configurations generate interleaved, a token each: if the machine is slower in one minute than in the next,
sequential generations would compare minutes. The loop is our own, so that the measured times contain only the model,
its cache and one argmax. The hooks of streaming rows stay on the model while others generate; they return at once.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import PreTrainedModel

from sinkwindow_lab.errors import LabError
from sinkwindow_lab.measure.memory import generation_peaks
from sinkwindow_lab.measure.timing import Clock, Laps, clock_for, waiter
from sinkwindow_lab.records import GenerationRecord, MemoryRecord, SpeedRecord
from sinkwindow_lab.ways.configurations import Configuration
from sinkwindow_lab.ways.sessions import Session, open_session

WARM_UP_TOKENS = 4  # decode steps before anything is timed: threads start, kernels are chosen, weights are paged in
PROMPTS = 3  # times that each configuration reads the prompt; the median is its TTFT


@dataclass
class Run:
    """The generation of one configuration.

    Attributes:
        start: opens a fresh session.
        prompt: [1, tokens].
        clock: marks points in time, after the device's work.
        wait: returns when the device is idle.
        session: the last one opened, which generates.
        token: the next token to feed, [1, 1].
    """

    start: Callable[[], Session]
    prompt: torch.Tensor
    clock: Clock
    wait: Callable[[], None]
    session: Session | None = None
    token: torch.Tensor | None = None
    _prompts: Laps = field(init=False)
    _steps: Laps = field(init=False)

    def __post_init__(self) -> None:
        """Create empty laps."""
        self._prompts, self._steps = Laps(self.clock, self.wait), Laps(self.clock, self.wait)

    def read_prompt(self) -> None:
        """Read the prompt in a fresh session."""
        self.close()
        self.session = self.start()
        self._feed(self._prompts, self.session, self.prompt)

    def step(self) -> None:
        """Generate a token, after the first one, which the prompt has given."""
        assert self.session is not None  # noqa: S101 - a prompt comes first
        assert self.token is not None  # noqa: S101
        self._feed(self._steps, self.session, self.token)

    def warm_up(self) -> None:
        """Read the prompt and generate some tokens, then discard the times."""
        self.read_prompt()
        for _ in range(WARM_UP_TOKENS):
            self.step()
        self._prompts, self._steps = Laps(self.clock, self.wait), Laps(self.clock, self.wait)

    def close(self) -> None:
        """Remove the session from the model."""
        if self.session is not None:
            self.session.close()
            self.session = None

    def prompt_times(self) -> list[float]:
        """Return the time from each prompt's start to its first token [s]."""
        return self._prompts.seconds()

    def token_times(self) -> list[float]:
        """Return the time of each token as if its steps had directly followed the prompt [s]."""
        return list(itertools.accumulate(self._steps.seconds(), initial=statistics.median(self.prompt_times())))

    def _feed(self, laps: Laps, session: Session, ids: torch.Tensor) -> None:
        self.token = laps.lap(lambda: session.feed(ids, last_only=True).argmax(dim=-1))


def generate(
    configurations: Sequence[Configuration],
    model: PreTrainedModel,
    prompt: torch.Tensor,
    stages: Sequence[Sequence[int]],
    *,
    clock: Clock | None = None,
    on_token: Callable[[int], None] | None = None,
) -> list[list[GenerationRecord]]:
    """Generate with each configuration, interleaved, and record each of its stages.

    A shorter generation is the start of a longer one. Memory is counted in another generation, which is not timed.
    `prompt` is [1, tokens]. `stages` are ascending numbers of new tokens for each configuration; the end-of-text token
    stops none. Returns for each configuration a record per stage, as if the generation had ended there.

    Raises:
        LabError: if a configuration does not fit the model, or a stage is below 2: the time per token after the first
            needs a second one.
    """
    shortest = min(min(own) for own in stages)
    if shortest < 2:  # noqa: PLR2004 - see above
        raise LabError(f"new_tokens={shortest} has no time per output token: generate 2 or more")
    device = next(model.parameters()).device
    prompt, clock, wait = prompt.to(device), clock or clock_for(device), waiter(device)
    runs = [Run(partial(open_session, one, model), prompt, clock, wait) for one in configurations]
    try:
        facts = take_turns(runs, stages, on_token)
    finally:
        for run in runs:
            run.close()
    found = []
    for configuration, run, own, seen in zip(configurations, runs, stages, facts, strict=True):
        peaks = generation_peaks(configuration, model, prompt, own)
        found.append([_record(run, stage, one, peak) for stage, one, peak in zip(own, seen, peaks, strict=True)])
    return found


def take_turns(
    runs: Sequence[Run], stages: Sequence[Sequence[int]], on_token: Callable[[int], None] | None = None
) -> list[list[dict[str, int]]]:
    """Let every run read its prompt some times and generate, interleaved.

    Returns for each run and stage the state of its session at that stage.
    """
    facts: list[list[dict[str, int]]] = [[] for _ in runs]
    for run in runs:
        run.warm_up()
    for _ in range(PROMPTS):
        for run in runs:
            run.read_prompt()
    for number in range(1, max(map(max, stages)) + 1):
        for run, own, seen in zip(runs, stages, facts, strict=True):
            if 1 < number <= own[-1]:  # the prompt gives the first one
                run.step()
            if number in own:
                seen.append(_facts(run.session))
            if number <= own[-1] and on_token is not None:
                on_token(number - 1)
    return facts


def _facts(session: Session | None) -> dict[str, int]:
    assert session is not None  # noqa: S101 - a prompt comes first
    return {
        "kept_tokens": session.kept_tokens,
        "cache_bytes": session.cache_bytes,
        "evictions": session.evictions,
    }


def _record(run: Run, stage: int, facts: dict[str, int], memory: MemoryRecord | None) -> GenerationRecord:
    return GenerationRecord(
        prompt_tokens=run.prompt.shape[1],
        prompt_times_s=_rounded(run.prompt_times()),
        token_times_s=_rounded(run.token_times()[:stage]),
        kept_tokens=facts["kept_tokens"],
        cache_bytes=facts["cache_bytes"],
        evictions=facts["evictions"],
        memory=memory,
    )


def _rounded(times: list[float]) -> list[float]:
    return [round(time, 7) for time in times]  # a tenth of a microsecond


def measure(
    configurations: Sequence[Configuration],
    model: PreTrainedModel,
    prompt: torch.Tensor,
    new_tokens: int,
    *,
    rounds: int = 1,
    on_round: Callable[[int], None] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> list[SpeedRecord]:
    """Measure the speed of several configurations, interleaved, in one or more rounds; return one record each.

    Raises:
        LabError: if a configuration does not fit the model, `new_tokens` is below 2 or `rounds` below 1.
    """
    if rounds < 1:
        raise LabError(f"rounds={rounds} must be 1 or more")
    collected: list[list[GenerationRecord]] = [[] for _ in configurations]
    for number in range(rounds):
        if on_round is not None:
            on_round(number)
        found = generate(configurations, model, prompt, [(new_tokens,)] * len(configurations), on_token=on_token)
        for own, generations in zip(collected, found, strict=True):
            own.extend(generations)
    return [
        SpeedRecord(configuration=configuration.name, rounds=own)
        for configuration, own in zip(configurations, collected, strict=True)
    ]
