"""Stateful perplexity: one session reads the text once, and each target is scored once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from sinkwindow_lab.errors import LabError
from sinkwindow_lab.inputs.tokens import LEAST, TokenText
from sinkwindow_lab.measure.timing import Clock, clock_for
from sinkwindow_lab.records import PerplexityRecord
from sinkwindow_lab.ways.configurations import Configuration
from sinkwindow_lab.ways.sessions import Session, open_session

BLOCK = 256  # tokens per call: logits of a block are the largest tensor of an evaluation


@dataclass(frozen=True)
class Perplexity:
    """A measurement with every token's loss.

    Attributes:
        record: the numbers.
        nll: [targets], float64, natural logarithm; of one text entry i is the loss of token i + 1.
    """

    record: PerplexityRecord
    nll: torch.Tensor


def token_losses(
    session: Session,
    ids: torch.Tensor,
    *,
    block: int = BLOCK,
    on_block: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Return the negative log likelihoods of tokens 1 .. n-1 of `ids` [1, n], as float64 on the CPU, [n - 1].

    `session` is fresh. `block` is the number of tokens per call; a chunk-invariant session gives the same losses for
    any. `on_block` gets the number of targets that each block added.

    Raises:
        LabError: if `block` is below 1, there is no target, or a loss is not finite.
    """
    if block < 1:
        raise LabError(f"block={block} must be 1 or more")
    if ids.shape[1] < LEAST:
        raise LabError(f"{ids.shape[1]} token(s) have no target to score: give 2 or more")
    losses = torch.empty(ids.shape[1] - 1, dtype=torch.float64)  # the only tensor that grows with the text
    for start in range(0, len(losses), block):
        stop = min(start + block, len(losses))  # the last token is a target only: nothing follows it
        losses[start:stop] = _block_losses(session.feed(ids[:, start:stop]), ids[:, start + 1 : stop + 1])
        _check_finite(losses, start, stop)
        if on_block is not None:
            on_block(stop - start)
    return losses


def summarise(nll: torch.Tensor, text_bytes: int) -> dict[str, float]:
    """Return token-weighted figures of losses ([targets], float64, natural logarithm).

    These are `mean_nll`, `standard_error` of that mean (tokens taken as independent), `perplexity` and `bits_per_byte`;
    `text_bytes` counts the UTF-8 bytes of the scored text.
    """
    mean = float(nll.mean())
    error = float(nll.std() / math.sqrt(len(nll))) if len(nll) > 1 else 0.0
    bits = float(nll.sum()) / math.log(2) / max(text_bytes, 1)
    return {"mean_nll": mean, "standard_error": error, "perplexity": math.exp(mean), "bits_per_byte": bits}


def measure(
    configuration: Configuration,
    model: PreTrainedModel,
    text: TokenText,
    *,
    block: int = BLOCK,
    clock: Clock | None = None,
    on_block: Callable[[int], None] | None = None,
) -> Perplexity:
    """Measure the perplexity of one configuration on one text; return the record and every token's loss.

    Raises:
        LabError: if the configuration does not fit the model, or an option is out of range.
    """
    device = next(model.parameters()).device
    clock = clock or clock_for(device)
    totals = _Totals()
    for ids in text.texts:
        session = open_session(configuration, model)
        try:
            marks = [clock.mark()]
            totals.nll.append(token_losses(session, ids.to(device), block=block, on_block=on_block))
            marks.append(clock.mark())
            totals.add(session, clock.seconds(marks)[1])
        finally:
            session.close()
    nll = torch.cat(totals.nll)
    return Perplexity(_record(configuration, text, totals, nll, block=block), nll)


def measure_stages(
    configuration: Configuration,
    model: PreTrainedModel,
    texts: Sequence[TokenText],
    *,
    block: int = BLOCK,
    on_block: Callable[[int], None] | None = None,
) -> list[Perplexity]:
    """Read a text once and record several lengths; a loss does not depend on what comes later.

    `texts` are starts of one text, ascending; a call ends at each of their lengths, too. The losses of `configuration`
    must not depend on where calls end. Returns for each length what `measure` finds.

    Raises:
        LabError: if a text is not the start of the next one, or as `measure`.
    """
    _check_starts(configuration, texts)
    device = next(model.parameters()).device
    clock = clock_for(device)
    session = open_session(configuration, model)
    nll, seconds = torch.empty(0, dtype=torch.float64), 0.0
    found = []
    try:
        for text in texts:
            marks = [clock.mark()]
            further = text.ids[:, len(nll) :].to(device)
            nll = torch.cat((nll, token_losses(session, further, block=block, on_block=on_block)))
            marks.append(clock.mark())
            seconds += clock.seconds(marks)[1]
            totals = _Totals()
            totals.add(session, seconds)
            found.append(Perplexity(_record(configuration, text, totals, nll, block=block), nll))
    finally:
        session.close()
    return found


def _check_starts(configuration: Configuration, texts: Sequence[TokenText]) -> None:
    if configuration.depends_on_calls:
        raise LabError(
            f"{configuration.name} gives losses that depend on where calls end: measure each length separately"
        )
    for short, long in itertools.pairwise(texts):
        count = short.ids.shape[1]
        if (
            short.lengths
            or long.lengths
            or count >= long.ids.shape[1]
            or not torch.equal(short.ids, long.ids[:, :count])
        ):
            raise LabError(
                f"{count} tokens of {short.corpus} are not the start of {long.ids.shape[1]} of {long.corpus}"
            )


@dataclass
class _Totals:
    """Sums over texts that are each read by a fresh session."""

    nll: list[torch.Tensor] = field(default_factory=list)
    seconds: float = 0.0
    evictions: int = 0
    kept_tokens: int = 0
    cache_bytes: int = 0

    def add(self, session: Session, seconds: float) -> None:
        self.seconds += seconds
        self.evictions += session.evictions
        self.kept_tokens = max(self.kept_tokens, session.kept_tokens)
        self.cache_bytes = max(self.cache_bytes, session.cache_bytes)


def _record(
    configuration: Configuration, text: TokenText, totals: _Totals, nll: torch.Tensor, *, block: int
) -> PerplexityRecord:
    return PerplexityRecord(
        configuration=configuration.name,
        corpus=text.corpus,
        tokens=text.ids.shape[1],
        targets=len(nll),
        targets_sha256=text.sha256,
        bos=text.bos,
        block=block,
        text_bytes=text.text_bytes,
        seconds=totals.seconds,
        evictions=totals.evictions,
        kept_tokens=totals.kept_tokens,
        cache_bytes=totals.cache_bytes,
        documents=text.documents,
        scored_texts=len(text.texts),
        tokenizer=text.tokenizer,
        **summarise(nll, text.text_bytes),
    )


def _check_finite(losses: torch.Tensor, start: int, stop: int) -> None:
    """Raise where a loss is not finite: one NaN would make the whole perplexity NaN."""
    bad = (~losses[start:stop].isfinite()).nonzero()
    if len(bad):
        place = start + int(bad[0])
        raise LabError(
            f"the loss of target {place} is {float(losses[place])}: the model overflows; try --dtype float32"
        )


def _block_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the losses of one block, computed in float32 at least and returned in float64 [tokens]."""
    wide = logits[0].to(torch.promote_types(logits.dtype, torch.float32))
    losses = torch.nn.functional.cross_entropy(wide, targets[0].to(wide.device), reduction="none")
    return losses.double().cpu()
