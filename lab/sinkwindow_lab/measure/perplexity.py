"""Stateful perplexity: one session reads the text once, and each target is scored once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from sinkwindow_lab.errors import LabError
from sinkwindow_lab.inputs.tokens import LEAST, TokenText
from sinkwindow_lab.measure.clock import clock_for
from sinkwindow_lab.records import Configuration, Figures, Measurement, measured, ppl
from sinkwindow_lab.ways.configurations import open_session
from sinkwindow_lab.ways.sessions import Session

OnBlock = Callable[[int], object] | None  # gets the number of targets that each block added
ADDED = ("seconds", "evictions")  # facts that are added up over several texts; of the others the largest counts
BLOCK = 256  # tokens per call: logits of a block are the largest tensor of an evaluation


@dataclass(frozen=True)
class Score:
    """The losses of one configuration on one text, and what they took."""

    configuration: str  # its name
    text: TokenText  # what was scored
    block: int  # tokens per call
    nll: torch.Tensor  # [targets], float64, natural logarithm; of one text entry i is the loss of token i + 1
    # `evictions`, `kept_tokens` and `cache_bytes` of the reading; `seconds`, unless other processes computed meanwhile.
    facts: dict[str, float]

    @property
    def perplexity(self) -> float:
        """Exponential of the mean loss; infinite where it is more than a float holds."""
        return ppl(float(self.nll.mean()))

    def figures(self) -> Figures:
        """Return every number as a sample with its unit."""
        nll, facts = self.nll, self.facts
        return {
            "PPL": ("", [self.perplexity]),
            "NLL": ("nat", [float(nll.mean())]),  # over all targets, never a mean of means
            # Of that mean, tokens taken as independent.
            "standard error": ("nat", [float(nll.std() / math.sqrt(len(nll))) if len(nll) > 1 else 0.0]),
            # The sum of the losses over the UTF-8 bytes of the scored text.
            "bits per byte": ("bit", [float(nll.sum()) / math.log(2) / max(self.text.text_bytes, 1)]),
            "targets": ("tokens", [len(nll)]),
            **({"seconds": ("s", [facts["seconds"]])} if "seconds" in facts else {}),
            "evictions": ("", [facts["evictions"]]),
            "kept": ("tokens", [facts["kept_tokens"]]),
            "cache": ("bytes", [facts["cache_bytes"]]),
        }

    def figures_by_name(self) -> dict[str, Any]:
        """Return the configuration, the tokens per call and every number by name, for JSON."""
        numbers: dict[str, Any] = {"configuration": self.configuration, "block": self.block}
        numbers |= {metric.replace(" ", "_"): value for metric, (_, (value,)) in self.figures().items()}
        rate = {"tokens_per_second": len(self.nll) / numbers["seconds"]} if "seconds" in numbers else {}
        return numbers | rate  # of targets, logits and losses included

    def __str__(self) -> str:
        """Return the numbers in one line."""
        found = self.figures_by_name()
        rate = f"{found['tokens_per_second']:.1f} tok/s  " if "seconds" in found else ""
        read = f"{self.configuration}, {self.text.corpus}, {self.block} tok/call"
        return (
            f"PPL {found['PPL']:.4f}  NLL {found['NLL']:.5f} +- {found['standard_error']:.5f}  "
            f"{found['bits_per_byte']:.4f} bits/byte  {found['targets']:,} targets  "
            f"{found['evictions']:.0f} evictions  {rate}({read})"
        )

    def measurements(self, part: str) -> list[Measurement]:
        """Return every number as a measurement of a part, at the text's length."""
        return measured(part, self.text.corpus, self.configuration, self.text.ids.shape[1], self.figures())


def token_losses(session: Session, ids: torch.Tensor, *, block: int = BLOCK, on_block: OnBlock = None) -> torch.Tensor:
    """Return the negative log likelihoods of tokens 1 .. n-1 of `ids` [1, n], as float64 on the CPU, [n - 1]."""
    if block < 1:
        raise LabError(f"block={block} must be 1 or more")
    if ids.shape[1] < LEAST:
        raise LabError(f"{ids.shape[1]} token(s) have no target to score: give 2 or more")
    losses = torch.empty(ids.shape[1] - 1, dtype=torch.float64)  # the only tensor that grows with the text
    for start in range(0, len(losses), block):
        stop = min(start + block, len(losses))  # the last token is a target only: nothing follows it
        losses[start:stop] = _block_losses(session.feed(ids[:, start:stop]), ids[:, start + 1 : stop + 1])
        bad = (~losses[start:stop].isfinite()).nonzero()
        if len(bad):  # one NaN would make the whole perplexity NaN
            place = start + int(bad[0])
            raise LabError(
                f"the loss of target {place} is {float(losses[place])}: the model overflows; try --dtype float32"
            )
        if on_block is not None:
            on_block(stop - start)
    return losses


def _block_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the losses of one block, computed in float32 at least and returned in float64 [tokens]."""
    wide = logits[0].to(torch.promote_types(logits.dtype, torch.float32))
    losses = torch.nn.functional.cross_entropy(wide, targets[0].to(wide.device), reduction="none")
    return losses.double().cpu()


def measure(
    way: Configuration,
    model: PreTrainedModel,
    text: TokenText,
    *,
    block: int = BLOCK,
    on_block: OnBlock = None,
) -> Score:
    """Score one configuration on one text; texts that are read apart have a fresh session each."""
    read = (measure_stages(way, model, [piece], block=block, on_block=on_block) for piece in text.pieces)
    return merged(text, [*itertools.chain(*read)])


def merged(text: TokenText, found: Sequence[Score]) -> Score:
    """Return the score of a text from those of its pieces, in their order."""
    facts = {
        fact: (sum if fact in ADDED else max)(one.facts[fact] for one in found)
        for fact in found[0].facts
        if all(fact in one.facts for one in found)
    }
    return Score(found[0].configuration, text, found[0].block, torch.cat([one.nll for one in found]), facts)


def measure_stages(
    way: Configuration,
    model: PreTrainedModel,
    texts: Sequence[TokenText],
    *,
    block: int = BLOCK,
    on_block: OnBlock = None,
) -> Iterator[Score]:
    """Read a text once and yield the score of several lengths; a loss does not depend on what comes later.

    `texts` are starts of one text, ascending; a call ends at each of their lengths, too. Yields for each what `measure`
    finds, as soon as the reading is there.
    """
    _check_starts(way, texts)
    clock, nll, seconds = clock_for(model.device), torch.empty(0, dtype=torch.float64), 0.0
    with open_session(way, model) as session:
        for text in texts:
            begin = clock.mark()
            further = text.ids[:, len(nll) :].to(model.device)
            nll = torch.cat((nll, token_losses(session, further, block=block, on_block=on_block)))
            seconds += clock.seconds(begin, clock.mark())
            facts = {"seconds": seconds, "evictions": float(session.evictions)}
            facts |= {"kept_tokens": float(session.kept_tokens), "cache_bytes": float(session.cache_bytes)}
            yield Score(way.name, text, block, nll, facts)


def _check_starts(configuration: Configuration, texts: Sequence[TokenText]) -> None:
    if configuration.depends_on_calls and len(texts) > 1:
        raise LabError(
            f"{configuration.name} gives losses that depend on where calls end: measure each length separately"
        )
    for short, long in itertools.pairwise(texts):
        count, apart = short.ids.shape[1], bool(short.lengths or long.lengths)
        if apart or count >= long.ids.shape[1] or not torch.equal(short.ids, long.ids[:, :count]):
            raise LabError(
                f"{count} tokens of {short.corpus} are not the start of {long.ids.shape[1]} of {long.corpus}"
            )
