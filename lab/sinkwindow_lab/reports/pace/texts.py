"""Long inputs: a prompt of 20 limits over a dense chunked pass, its peak memory, and exact scoring of a text."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from sinkwindow_lab.measure.memory import tensor_peak
from sinkwindow_lab.measure.perplexity import token_losses
from sinkwindow_lab.measure.timing import clock_for, milliseconds
from sinkwindow_lab.reports.pace.plans import BUFFER, BY_TOKEN_BAR, FLAT_BAR, PREFILL_BAR, Plan
from sinkwindow_lab.reports.pace.records import Comparison, Series
from sinkwindow_lab.ways.configurations import Configuration, parse, streaming
from sinkwindow_lab.ways.sessions import Session, open_session

LONG, SHORTER = 20, 5  # prompts, in limits
NAMES = {
    "ours": "ours",
    "dense": "dense, same chunks",
    "held": "dense, cut to S + W before each chunk (inexact)",
    "alone": "each call alone",
}


def prefill(model: PreTrainedModel, name: str, plan: Plan) -> list[Comparison]:
    """Time a prompt of 20 limits in chunks, ours and dense interleaved, chunk by chunk.

    Returns ours over dense, and over a dense cache that is cropped to the same length before each chunk; the floor is
    the same chunks with nothing before them.
    """
    lazy = streaming(plan.sinks, plan.prompt_window, BUFFER)
    limit = plan.sinks + plan.prompt_window
    ids = token_ids(model, LONG * limit)
    read_chunks(model, lazy, ids[:, : 2 * plan.chunk], plan.chunk, limit)  # warm-up
    rounds = [read_chunks(model, lazy, ids, plan.chunk, limit) for _ in range(plan.prefills)]
    found = {
        side: Series(name=NAMES[side], unit="ms/token", values=[sum(one[side]) / ids.shape[1] for one in rounds])
        for side in NAMES
    }
    what = f"{ids.shape[1]:,} tokens in chunks of {plan.chunk}, S + W = {limit}"
    return [
        Comparison(
            part="prefill",
            model=name,
            what=f"{what}, over {NAMES[other]}",
            ratio_kind="speed",
            ours=found["ours"],
            other=found[other],
            bar=PREFILL_BAR if other == "dense" else None,
            floor=found["alone"],
        )
        for other in ("dense", "held")
    ]


def read_chunks(
    model: PreTrainedModel, configuration: Configuration, ids: torch.Tensor, chunk: int, limit: int
) -> dict[str, list[float]]:
    """Feed a prompt ([1, tokens]) to four sessions, interleaved; return the times of the chunks by side [ms].

    The third session's stock cache is cropped to `limit` tokens before each chunk, the fourth one's to zero.
    """
    clock = clock_for(model.device)
    sessions = {
        "ours": open_session(configuration, model),
        "dense": open_session(parse("baseline"), model),
        "held": open_session(parse("baseline"), model),
        "alone": open_session(parse("baseline"), model),
    }
    cuts = {"held": limit, "alone": 0}
    times: dict[str, list[float]] = {side: [] for side in sessions}
    for part in torch.split(ids, chunk, dim=1):
        for side, session in sessions.items():
            _cut(session, cuts.get(side))
            times[side].append(milliseconds(lambda session=session: session.feed(part, last_only=True), clock))  # type: ignore[misc]  # noqa: B023
    for session in sessions.values():
        session.close()
    return times


def _cut(session: Session, kept: int | None) -> None:
    """Crop a stock cache to its first tokens if it has more; None leaves it."""
    if kept is not None and session.kept_tokens > kept:
        session.cache.crop(kept - session.kept_tokens)


def memory(model: PreTrainedModel, name: str, plan: Plan) -> list[Comparison]:
    """Compare the peak memory above the weights of a prompt of 20 limits with that of 5, the cache included."""
    lazy = streaming(plan.sinks, plan.prompt_window, BUFFER)
    limit = plan.sinks + plan.prompt_window
    peaks = {times: peak_mb(model, lazy, times * limit, plan.chunk) for times in (LONG, SHORTER)}
    ours, other = (
        Series(name=f"ours, {times * limit:,} tokens", unit="MB", values=[peak]) for times, peak in peaks.items()
    )
    what = f"tensors above the weights, prompt of {LONG} limits over {SHORTER}, chunks of {plan.chunk}, S + W = {limit}"
    bar = FLAT_BAR
    return [Comparison(part="memory", model=name, what=what, ratio_kind="cost", ours=ours, other=other, bar=bar)]


def peak_mb(model: PreTrainedModel, configuration: Configuration, count: int, chunk: int) -> float:
    """Return the memory that a prefill adds to the weights at its peak, cache and activations [MB]."""
    ids = token_ids(model, count)

    def read() -> None:
        session = open_session(configuration, model)
        for part in torch.split(ids, chunk, dim=1):
            session.feed(part, last_only=True)
        session.close()

    return tensor_peak(model.device, read) / 1e6


def scoring(model: PreTrainedModel, name: str, plan: Plan) -> list[Comparison]:
    """Time exact streaming losses of a text in blocks against token by token, and against a dense pass in such blocks.

    Times are per token, logits and losses included; the floor is the same blocks with nothing before them.
    """
    lazy = streaming(plan.sinks, plan.window, BUFFER)
    found = score_in_turns(model, lazy, plan)
    what = f"S + W = {plan.limit:,}, blocks of {plan.block}"
    rows = (("single", "token by token", BY_TOKEN_BAR), ("dense", "a dense pass in the same blocks", PREFILL_BAR))
    return [
        Comparison(
            part="perplexity",
            model=name,
            what=f"{what}, over {words}",
            ratio_kind="speed",
            ours=found["blocks"],
            other=found[other],
            bar=bar,
            floor=found["alone"],
        )
        for other, words, bar in rows
    ]


def score_in_turns(model: PreTrainedModel, configuration: Configuration, plan: Plan) -> dict[str, Series]:
    """Read a text block by block, dense interleaved with ours, and some single tokens after each block.

    Returns times per token [ms]: `blocks`, `dense`, `alone`, and `single` from when the cache is full.
    """
    stride = plan.block + plan.singles
    ids = token_ids(model, plan.limit + plan.scored * stride + 1)
    ours, dense, alone = (open_session(one, model) for one in (configuration, parse("baseline"), parse("baseline")))
    clock = clock_for(model.device)
    values: dict[str, list[float]] = {"blocks": [], "dense": [], "alone": [], "single": []}

    def score(session: Session, start: int, count: int, block: int) -> float:
        return (
            milliseconds(lambda: token_losses(session, ids[:, start : start + count + 1], block=block), clock) / count
        )

    for session in (ours, dense):
        score(session, 0, plan.limit, plan.block)
    for start in range(plan.limit, plan.limit + plan.scored * stride, stride):
        middle = start + plan.block
        values["blocks"].append(score(ours, start, plan.block, plan.block))
        values["dense"].append(score(dense, start, plan.block, plan.block))
        _cut(alone, 0)
        values["alone"].append(score(alone, start, plan.block, plan.block))
        values["single"].append(score(ours, middle, plan.singles, 1))
        score(dense, middle, plan.singles, plan.singles)
    for session in (ours, dense, alone):
        session.close()
    return {side: Series(name=side, unit="ms/token", values=own) for side, own in values.items()}


def token_ids(model: PreTrainedModel, count: int) -> torch.Tensor:
    """Return random token ids [1, count] on the model's device: speed does not depend on the text."""
    random = torch.Generator().manual_seed(count)
    return torch.randint(0, int(model.config.vocab_size), (1, count), generator=random).to(model.device)
