"""Measure all peers; times are measured interleaved, so that a slow minute affects all peers equally."""

from __future__ import annotations

import statistics
import sys
from typing import TYPE_CHECKING, Any

import torch

from peers.plan import LEFT_OUT, PEERS
from sinkwindow_lab.measure.clock import HostClock, Side, interleave

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Protocol

    from peers.plan import Plan

    class Askable(Protocol):
        """Answers requests, like `client.Client`."""

        def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
            """Answer one request."""

    Answers = dict[str, dict[str, Any]]


def say(text: str) -> None:
    """Print progress to standard error; standard output is for the table."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def measure(clients: Mapping[str, Askable], plan: Plan) -> dict[str, Answers]:
    """Request all measurements of all peers; return each peer's answers by name, as `Askable` gives them."""
    answers: dict[str, Answers] = {key: {} for key in clients}
    for sinks, window in plan.speed:
        speed(clients, plan, (sinks, window), answers)
    for key, client in clients.items():
        for name in ("chunks", "batch"):
            say(f"{key}: {name}")
            answers[key][name] = client.ask(name)
        answers[key]["prompt"] = longest_prompt(key, client, plan)
        say(f"{key}: perplexity over {plan.scored[2]} tokens")
        sinks, window, tokens = plan.scored
        answers[key]["perplexity"] = client.ask("perplexity", sinks=sinks, window=window, tokens=tokens)
    return answers


def speed(clients: Mapping[str, Askable], plan: Plan, size: tuple[int, int], answers: dict[str, Answers]) -> None:
    """Fill every cache, then time interleaved steps; what fails is not measured again at this size."""
    limit, passed = sum(size), 0.0
    failed: dict[str, dict[str, Any]] = {}

    def block(client: Askable, name: str, count: int, place: str) -> Callable[[], None]:
        def run() -> None:
            nonlocal passed
            answer = failed.get(place) or client.ask(name, count=count)
            if "result" in answer:
                passed += statistics.median(answer["result"]["ms"]) / 1e3
            else:
                failed[place] = answer

        return run

    sides: dict[str, Side] = {}
    for key, client in clients.items():
        say(f"{key}: filling {limit} tokens")
        filled = client.ask("fill", sinks=size[0], window=size[1], steps=plan.single_steps)
        answers[key][f"fill {limit}"] = filled
        for name, count in (("steps", plan.steps), ("attention", plan.attention)):
            if "result" in filled:
                place = f"{key} {name}"
                sides[place] = Side(block(client, name, count, place))
    if not sides:
        return
    say(f"{plan.rounds} rounds at {limit} tokens: {', '.join(sides)}")
    # The clock advances by a step's time as the worker reports it, so that requests take no time: a sample is the
    # median of a block of steps.
    clock = HostClock(now=lambda: passed)
    timed = interleave(sides, plan.rounds, torch.device("cpu"), warm_up=0, clock=clock)
    for place, one in timed.items():
        key, name = place.split()
        answers[key][f"{name} {limit}"] = failed.get(place) or {"result": {"ms": one.ms}}


def longest_prompt(key: str, client: Askable, plan: Plan) -> dict[str, Any]:
    """Return the tokens of the longest prompt that works in one call, or why the shortest does not."""
    sinks, window = plan.prompt
    answer: dict[str, Any] = {"error": "nothing was tried"}
    for multiple in plan.multiples:
        tokens = multiple * (sinks + window)
        say(f"{key}: a prompt of {tokens} tokens in one call")
        answer = client.ask("prompt", sinks=sinks, window=window, tokens=tokens)
        if answer.get("result", {}).get("works"):
            return {"result": {"tokens": tokens, "multiple": multiple}}
    return answer if "result" not in answer else {"error": "logits are not finite"}


def left_out(plan_is_quick: bool) -> list[str]:  # noqa: FBT001 - the name says what it is
    """Return the keys of the peers that are not run."""
    return [peer.key for peer in PEERS if peer.slow and plan_is_quick]


def failed_row(key: str, reason: str) -> dict[str, Any]:
    """Return the record's row of a peer that did not run."""
    return {"key": key, "versions": {}, "failure": reason, "answers": {}}


def skipped_row(key: str) -> dict[str, Any]:
    """Return the record's row of a peer that was skipped."""
    return failed_row(key, LEFT_OUT)
