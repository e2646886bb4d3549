"""Speed of a greedy generation: TTFT, TPOT, total time, throughput and peak memory.

The loop is our own, so that nothing but the model, its cache and one argmax is inside the measured times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from sinkwindow.lab.configurations import Configuration
from sinkwindow.lab.errors import LabError
from sinkwindow.lab.memory import peak_memory
from sinkwindow.lab.records import GenerationRecord, SpeedRecord
from sinkwindow.lab.sessions import Session, open_session
from sinkwindow.lab.timing import Clock, clock_for

WARM_UP_TOKENS = 4  # decode steps before anything is timed: threads start, kernels are chosen, weights are paged in


def token_times(
    session: Session,
    prompt: torch.Tensor,
    new_tokens: int,
    *,
    clock: Clock,
    on_token: Callable[[int], None] | None = None,
) -> list[float]:
    """Generates greedily and notes when each token was there.

    Args:
        session: fresh.
        prompt: [1, tokens].
        new_tokens: how many tokens to generate; the end-of-text token does not stop it [tokens].
        clock: marks places in time, after the device's work.
        on_token: told each token's number, after its time was taken.

    Returns:
        One time per new token, counted from the start of the prefill [s].

    Raises:
        LabError: if `new_tokens` is below 2: the time per token after the first needs a second one.
    """
    if new_tokens < 2:  # noqa: PLR2004 - see above
        message = f"new_tokens={new_tokens} has no time per output token: generate 2 or more"
        raise LabError(message)
    marks = [clock.mark()]
    token = prompt
    for number in range(new_tokens):
        token = session.feed(token, last_only=True).argmax(dim=-1)
        marks.append(clock.mark())
        if on_token is not None:
            on_token(number)
    return clock.seconds(marks)[1:]


def measure_round(
    configuration: Configuration,
    model: PreTrainedModel,
    prompt: torch.Tensor,
    new_tokens: int,
    *,
    clock: Clock | None = None,
    on_token: Callable[[int], None] | None = None,
) -> GenerationRecord:
    """One generation of one configuration, warmed up and watched.

    Args:
        configuration: how to remember.
        model: a causal language model in eval mode.
        prompt: [1, tokens].
        new_tokens: how many tokens to generate [tokens].
        clock: the device's own by default.
        on_token: told each token's number.

    Returns:
        All times and the memory.

    Raises:
        LabError: if the configuration does not fit the model, or `new_tokens` is below 2.
    """
    return measure_stages(configuration, model, prompt, (new_tokens,), clock=clock, on_token=on_token)[0]


def measure_stages(
    configuration: Configuration,
    model: PreTrainedModel,
    prompt: torch.Tensor,
    stages: Sequence[int],
    *,
    clock: Clock | None = None,
    on_token: Callable[[int], None] | None = None,
) -> list[GenerationRecord]:
    """One generation, looked at after each number of tokens: a shorter one is the start of a longer one.

    Args:
        configuration: how to remember.
        model: a causal language model in eval mode.
        prompt: [1, tokens].
        stages: ascending numbers of new tokens [tokens].
        clock: the device's own by default.
        on_token: told each token's number.

    Returns:
        A record per stage, as if the generation had ended there.

    Raises:
        LabError: if the configuration does not fit the model, or a stage is below 2.
    """
    device = next(model.parameters()).device
    prompt = prompt.to(device)
    _warm_up(configuration, model, prompt)
    session = open_session(configuration, model)
    facts: dict[int, dict[str, Any]] = {}

    def note(number: int) -> None:
        if number + 1 in stages:
            facts[number + 1] = _facts(session) | {"memory": watch.record()}
        if on_token is not None:
            on_token(number)

    try:
        with peak_memory(device, _weight_bytes(model)) as watch:
            times = token_times(session, prompt, max(stages), clock=clock or clock_for(device), on_token=note)
    finally:
        session.close()
    rounded = [round(time, 7) for time in times]  # a tenth of a microsecond
    return [
        GenerationRecord(prompt_tokens=prompt.shape[1], token_times_s=rounded[:stage], **facts[stage])
        for stage in stages
    ]


def _facts(session: Session) -> dict[str, int]:
    return {
        "kept_tokens": session.kept_tokens,
        "cache_bytes": session.cache_bytes,
        "evictions": session.evictions,
    }


def measure(
    configurations: Sequence[Configuration],
    model: PreTrainedModel,
    prompt: torch.Tensor,
    new_tokens: Sequence[int],
    *,
    rounds: int = 1,
    on_start: Callable[[Configuration, int], None] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> list[SpeedRecord]:
    """Speed of several configurations in interleaved rounds, so that a slow minute hits all of them alike.

    Args:
        configurations: which ones, in the order of a round.
        model: a causal language model in eval mode.
        prompt: [1, tokens].
        new_tokens: tokens to generate, one number per configuration [tokens].
        rounds: how often each one runs.
        on_start: told each generation's configuration and length before it.
        on_token: told each token's number.

    Returns:
        One record per configuration.

    Raises:
        LabError: if a configuration does not fit the model, or `rounds` is below 1.
    """
    if rounds < 1:
        message = f"rounds={rounds} must be 1 or more"
        raise LabError(message)
    collected: list[list[GenerationRecord]] = [[] for _ in configurations]
    for _ in range(rounds):
        for own, configuration, count in zip(collected, configurations, new_tokens, strict=True):
            if on_start is not None:
                on_start(configuration, count)
            own.append(measure_round(configuration, model, prompt, count, on_token=on_token))
    return [
        SpeedRecord(configuration=configuration.name, rounds=own)
        for configuration, own in zip(configurations, collected, strict=True)
    ]


def _warm_up(configuration: Configuration, model: PreTrainedModel, prompt: torch.Tensor) -> None:
    session = open_session(configuration, model)
    try:
        token = session.feed(prompt, last_only=True).argmax(dim=-1)
        for _ in range(WARM_UP_TOKENS):
            token = session.feed(token, last_only=True).argmax(dim=-1)
    finally:
        session.close()


def _weight_bytes(model: PreTrainedModel) -> int:
    return sum(one.numel() * one.element_size() for one in model.parameters())
