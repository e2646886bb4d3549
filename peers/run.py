"""Measures all peers, in turns where time is measured, so that a slow minute hits all of them alike."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from peers.plan import LEFT_OUT, PEERS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Protocol

    from peers.plan import Plan

    class Askable(Protocol):
        """Answers questions, as `client.Client` does."""

        def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
            """Answers one."""

    Answers = dict[str, dict[str, Any]]


def say(text: str) -> None:
    """Progress on standard error; standard output belongs to the table."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def measure(clients: Mapping[str, Askable], plan: Plan) -> dict[str, Answers]:
    """Asks everything of everybody.

    Args:
        clients: running peers by key.
        plan: how much.

    Returns:
        Per peer the answers by name, each `{"result"}`, `{"refused"}` or `{"error"}`.
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
    """Fills every cache, then times steps in turns; a peer that fails is not asked again at this size."""
    limit = sum(size)
    alive = []
    for key, client in clients.items():
        say(f"{key}: filling {limit} tokens")
        filled = client.ask("fill", sinks=size[0], window=size[1], steps=plan.single_steps)
        answers[key][f"fill {limit}"] = filled
        if "result" in filled:
            alive.append(key)
    for number in range(plan.rounds):
        say(f"round {number + 1} of {plan.rounds} at {limit} tokens: {', '.join(alive)}")
        for key in list(alive):
            for name, count in (("steps", plan.steps), ("attention", plan.attention)):
                answer = clients[key].ask(name, count=count)
                _add(answers[key], f"{name} {limit}", answer)
                if name == "steps" and "result" not in answer:
                    alive.remove(key)
                    break


def longest_prompt(key: str, client: Askable, plan: Plan) -> dict[str, Any]:
    """Tries one call with many limits of tokens, the longest first.

    Returns:
        The tokens of the first that works, or why the shortest does not.
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


def left_out(plan_is_quick: bool) -> list[str]:  # noqa: FBT001 - named for what it asks
    """Keys of the peers that are not run."""
    return [peer.key for peer in PEERS if peer.slow and plan_is_quick]


def failed_row(key: str, reason: str) -> dict[str, Any]:
    """A peer that did not run, for the record."""
    return {"key": key, "versions": {}, "failure": reason, "answers": {}}


def skipped_row(key: str) -> dict[str, Any]:
    """A peer that was not asked to run."""
    return failed_row(key, LEFT_OUT)


def _add(answers: Answers, name: str, answer: dict[str, Any]) -> None:
    """Adds a visit's samples to those before; a failure replaces them, for it is the news."""
    before = answers.get(name)
    if before is None or "result" not in before or "result" not in answer:
        answers[name] = answer
    else:
        before["result"]["ms"].extend(answer["result"]["ms"])
