"""Find out whether a model that nobody has tried streams exactly: on a tiny copy of it, against the slow reference.

Two comparisons in float64. With everything kept, the reference must be the model itself: then it rotates as the model
does. With few tokens kept, the cache must be the reference: in drawn splits, past evictions, with padding, in both
modes. What the cache must be told of the model, a `Family`, is what passes both.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig as PreTrainedConfig  # its name before transformers 5.0
from transformers import PreTrainedModel

from sinkwindow import Family, StreamingCache, UnsupportedModelError
from sinkwindow.model.families import FAMILIES, ModelFacts, decoder_of, inspect_model
from sinkwindow.model.versions import CACHE_ARGUMENT
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.measure.tiny import VOCABULARY, tiny_copy
from sinkwindow_lab.measure.verify import DOUBLE, ropes_of

STOCK = 1e-4  # error allowed to the reference, as a share of the largest logit: the model's own angles are float32
ROUNDS = 6  # texts, each with a rule of its own
TOKENS = 60  # of each of two rows


@dataclass(frozen=True)
class Case:
    """A text, how it is split into calls, and the rule; one per seed."""

    seed: int

    @property
    def rule(self) -> dict[str, Any]:
        """Arguments of the cache and of the reference; the mode alternates."""
        dice = random.Random(self.seed)  # noqa: S311 - not a secret
        sizes = {"num_sinks": dice.randint(0, 4), "window": dice.randint(1, 8), "buffer": dice.randint(0, 5)}
        return {**sizes, "evict": ("token", "call")[self.seed % 2]}

    @property
    def calls(self) -> list[int]:
        """Lengths of the calls: a prompt, single tokens, longer ones [tokens]."""
        dice = random.Random(self.seed)  # noqa: S311
        first = dice.randint(5, 25)
        lengths = [first, 1, 1, 1, dice.randint(2, 12), 1]
        return [*lengths, TOKENS - sum(lengths)]

    @property
    def ids(self) -> Tensor:
        """Random tokens, [2, TOKENS]."""
        return torch.randint(0, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(self.seed))

    def mask(self, *, holes: bool) -> Tensor:
        """Return 1 for tokens, [2, TOKENS]: a row of the first call is padded, and another one later on if `holes`."""
        mask, last = torch.ones(2, TOKENS, dtype=torch.long), TOKENS - self.calls[-1]
        mask[1, : min(1 + self.seed, self.calls[0] - 1)] = 0
        if holes:
            mask[0, last : last + 1 + self.seed] = 0
        return mask


def check_untested(model: PreTrainedModel, config: PreTrainedConfig | None = None) -> Family:
    """Return what `StreamingCache(model, family=...)` needs to accept a model that is not in the table.

    Args:
        model: Any model; it is not run.
        config: A small configuration to check with; by default one is made of the model's.

    Raises:
        UnsupportedModelError: The tiny copy does not stream exactly; the message has the largest error, and the call.
        LabError: There can be no tiny copy.
    """
    decoder, tiny, refusal, worst = None, None, "", None
    for family in dict.fromkeys([Family(), *FAMILIES.values()]):
        try:
            inspect_model(model, family)
            decoder = decoder or decoder_of(model)
            tiny = tiny or _tiny(model, decoder, config)
            facts = inspect_model(tiny, family)
        except UnsupportedModelError as error:
            refusal = refusal or str(error)
            continue
        found = _worst(tiny, facts, family)
        if found is None:
            return family
        worst = worst or f"model_type {decoder.config.model_type!r} does not stream exactly: {found}."
    raise UnsupportedModelError(worst or refusal)


def _tiny(model: PreTrainedModel, decoder: PreTrainedModel, config: PreTrainedConfig | None) -> PreTrainedModel:
    try:
        return tiny_copy(model, decoder, config)
    except (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        name, reason = type(decoder.config).__name__, f"{type(error).__name__}: {error}"
        raise LabError(
            f"no tiny copy can be made of this {name} ({reason}): call check_untested with a small one, config=..."
        ) from error


def _worst(model: PreTrainedModel, facts: ModelFacts, family: Family) -> str | None:
    """Return what shows best that the cache is wrong under a family, None if nothing does."""
    try:
        return max(_faults(model, facts, family), default=(0.0, None))[1]
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


@torch.no_grad()
def _faults(model: PreTrainedModel, facts: ModelFacts, family: Family) -> Iterator[tuple[float, str]]:
    from sinkwindow_reference import reference_logits

    ropes, ids = ropes_of(model, family), Case(0).ids[:, : facts.trained_length]  # others may rotate otherwise
    stock = model(input_ids=ids).logits
    kept = reference_logits(model, ids, num_sinks=0, window=TOKENS, ropes=ropes)
    yield from _compared(kept, stock, STOCK, "with everything kept, of the reference, which rotates as the cache would")
    for case in map(Case, range(ROUNDS)):
        mask = case.mask(holes=not facts.counts_columns)
        expected = reference_logits(model, case.ids, mask, chunks=case.calls, ropes=ropes, **case.rule)
        cache = StreamingCache(model, family=family, **case.rule)
        end = 0
        for number, length in enumerate(case.calls, 1):
            start, end = end, end + length
            arguments = {CACHE_ARGUMENT: cache}
            logits = model(input_ids=case.ids[:, start:end], attention_mask=mask[:, :end], **arguments).logits
            real = mask[:, start:end].bool()
            where = f"in call {number} of {case.calls} tokens with {case.rule}"
            yield from _compared(logits[real], expected[:, start:end][real], DOUBLE, where)
        cache.detach()


def _compared(found: Tensor, right: Tensor, allowed: float, where: str) -> Iterator[tuple[float, str]]:
    """Yield an error that is larger than allowed, as a share of the largest logit; that of a NaN is infinite."""
    error, size = float((found - right).abs().nan_to_num(nan=torch.inf).max()), float(right.abs().max())
    if error > allowed * size:
        yield error, f"the largest error is {error:.1e} of a logit of up to {size:.1f}, {where}"
