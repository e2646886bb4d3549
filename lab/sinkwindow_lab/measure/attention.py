"""Where attention goes: the share of its probability on the first keys that a query sees, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from sinkwindow import Retention
from sinkwindow.model.families import ModelFacts, inspect_model
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.records import Configuration
from sinkwindow_lab.ways.configurations import open_session
from sinkwindow_lab.ways.sessions import cache_keyword

FIRST = (1, 4, 8)  # so many first keys have their shares added up
SHARES = tuple(f"first {count}" for count in FIRST)
LEARNED = "learned sink"
BLOCK = 32  # tokens per call: the weights of all layers of one call are in memory at once


def eager_twin(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with eager attention, the only one that returns its weights; only parameters are shared."""
    tensors = {id(one): one for one in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, tensors)  # `memo` holds what is not copied
    twin.set_attn_implementation("eager")
    return twin


def watched_layers(model: PreTrainedModel) -> list[int]:
    """Return the layers that attend to all that is kept: those with a narrower window of their own cannot see sinks."""
    return [layer for kind in inspect_model(model).kinds if kind.window is None for layer in kind.layers]


def has_output_gate(model: PreTrainedModel) -> bool:
    """Return whether attention can switch its own output off: a gate is projected alone, or beside the queries."""
    for one in model.modules():
        query, key, value, output = (getattr(one, f"{name}_proj", None) for name in "qkvo")
        if isinstance(output, torch.nn.Linear):
            linear = [part for part in (query, key, value) if isinstance(part, torch.nn.Linear)]
            alike = len({part.out_features for part in linear[1:]}) == 1  # where values are shorter, so is the output
            doubled = len(linear) == 3 and alike and linear[0].out_features == 2 * output.in_features  # noqa: PLR2004
            if doubled or hasattr(one, "gate_proj"):
                return True
    return False


@torch.inference_mode()
def shares(
    way: Configuration,
    twin: PreTrainedModel,
    ids: torch.Tensor,
    *,
    begin: int,
    on_block: Callable[[int], object] = lambda _: None,
) -> dict[str, tuple[str, list[float]]]:
    """Return the shares by metric, a sample for each of `watched_layers`: means over heads and queries from `begin` on.

    Keys are counted in the order in which a query sees them: of a dense model the first are the text's own, of a cache
    its sinks and then the oldest of its window. What weights lack of 1 is on a learned sink.

    Args:
        way: `baseline`, or what evicts token by token.
        twin: The model, with eager attention.
        ids: `[1, tokens]`, on its device.
        begin: First query that counts [tokens].
        on_block: Gets the number of tokens that each call added.
    """
    if way.depends_on_calls or way.kind not in ("baseline", "streaming", "window"):
        raise LabError(f"attention of {way.name} cannot be measured: give baseline, streaming_S_W or window_0_W")
    facts, watched, total = inspect_model(twin), watched_layers(twin), ids.shape[1]
    attending = sorted(layer for kind in facts.kinds for layer in kind.layers)
    rule = _rule(way, facts, total)
    found = torch.zeros(len(watched), len(FIRST) + 1, dtype=torch.float64)
    length = 1 if facts.own_attention else BLOCK  # where calls run in pieces, weights come of one piece only
    with open_session(way, twin) as session:
        for start in range(0, total, length):
            part = ids[:, start : start + length]
            queries = torch.arange(start, start + part.shape[1], device=ids.device)
            kept = [] if way.kind == "baseline" else list(session.cache.retained_tokens[0] if start else ())
            output = twin(input_ids=part, output_attentions=True, **{cache_keyword(twin): session.cache})
            weights = [one for one in output.attentions if one is not None]  # of a layer that does not attend
            for row, layer in enumerate(watched if start + length > begin else ()):
                heads = weights[attending.index(layer)][0, :, max(0, begin - start) :]  # [heads, queries, columns]
                mean = heads.mean(dim=0, dtype=torch.float64)
                ranks = _ranks(rule, queries[max(0, begin - start) :], kept, mean.shape[1])
                sums = [(mean * (ranks < count)).sum() for count in FIRST]
                found[row] += torch.stack([*sums, (1 - mean.sum(dim=1)).sum()]).cpu()
            on_block(part.shape[1])
    means = found.T / max(1, total - begin)
    return {name: ("", own.tolist()) for name, own in zip((*SHARES, LEARNED), means, strict=True)}


def _rule(way: Configuration, facts: ModelFacts, total: int) -> Retention:
    """Return which tokens a query sees; a dense model's own window counts the query too."""
    if way.kind != "baseline":
        return Retention(*way.limits)
    return Retention(0, total if facts.native_window is None else max(1, facts.native_window - 1))


def _ranks(rule: Retention, queries: torch.Tensor, kept: list[int], columns: int) -> torch.Tensor:
    """Return the place of each column's token in the list of each query, `[queries, columns]`.

    Columns are those `kept` before the call, then its own; those of a dense cache are the last tokens. What a query
    does not see has a weight of exactly 0, so its place has no meaning.
    """
    end = int(queries[-1]) + 1
    own = columns - len(kept)
    tokens = torch.tensor([*kept, *range(end - own, end)], device=queries.device)
    evicted = rule.evicted_before(queries)[:, None]
    return torch.where(tokens < rule.num_sinks, tokens, tokens - evicted)
