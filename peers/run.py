"""Measure all peers; times are measured interleaved, so that a slow minute affects all peers equally."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from peers.plan import LEFT_OUT, PEERS

if TYPE_CHECKING:
    from collections.abc import Mapping
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
    """Request all measurements of all peers.

    Args:
        clients: running peers by key.
        plan: how much to measure.

    Returns:
        For each peer the answers by name, each `{"result"}`, `{"refused"}` or `{"error"}`.
    """
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
    """Fill every cache, then time interleaved steps; a peer that fails is not measured again at this size."""
    limit = sum(size)
    running = []
    for key, client in clients.items():
        say(f"{key}: filling {limit} tokens")
        filled = client.ask("fill", sinks=size[0], window=size[1], steps=plan.single_steps)
        answers[key][f"fill {limit}"] = filled
        if "result" in filled:
            running.append(key)
    for number in range(plan.rounds):
        say(f"round {number + 1} of {plan.rounds} at {limit} tokens: {', '.join(running)}")
        for key in list(running):
            for name, count in (("steps", plan.steps), ("attention", plan.attention)):
                answer = clients[key].ask(name, count=count)
                _add(answers[key], f"{name} {limit}", answer)
                if name == "steps" and "result" not in answer:
                    running.remove(key)
                    break


def longest_prompt(key: str, client: Askable, plan: Plan) -> dict[str, Any]:
    """Try one call with several limits of tokens, the longest first.

    Returns:
        The tokens of the first call that works, or the reason why the shortest does not.
    """
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


def _add(answers: Answers, name: str, answer: dict[str, Any]) -> None:
    """Add the samples of a round to the earlier ones; a failure replaces them."""
    before = answers.get(name)
    if before is None or "result" not in before or "result" not in answer:
        answers[name] = answer
    else:
        before["result"]["ms"].extend(answer["result"]["ms"])
