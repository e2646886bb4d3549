"""What stays the same while many things are measured: model, texts, finished measurements, progress."""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sinkwindow.lab import machine, perplexity, tokens
from sinkwindow.lab.configurations import Configuration
from sinkwindow.lab.corpora import Corpus
from sinkwindow.lab.models import LoadedModel
from sinkwindow.lab.perplexity import BLOCK, Perplexity
from sinkwindow.lab.progress import Reporter, Silent
from sinkwindow.lab.records import BosPolicy, PerplexityRecord
from sinkwindow.lab.store import Store, code_version

SCORING = ("perplexity", "sessions", "ablations", "configurations")


@dataclass
class Bench:
    """A model, its texts, and where finished measurements are kept."""

    loaded: LoadedModel
    corpora: Sequence[Corpus]
    bos: BosPolicy = "none"
    store: Store = field(default_factory=Store)
    reporter: Reporter = field(default_factory=Silent)
    _texts: dict[tuple[str, int], tokens.TokenText] = field(default_factory=dict, init=False)
    # By configuration and corpus, then by number of tokens.
    _foreseen: defaultdict[tuple[Configuration, str], dict[int, tokens.TokenText]] = field(
        default_factory=lambda: defaultdict(dict), init=False
    )
    _read: dict[Hashable, Perplexity] = field(default_factory=dict, init=False)

    def text(self, corpus: Corpus, count: int) -> tokens.TokenText:
        """The first tokens of a text.

        Args:
            corpus: one of the texts.
            count: how many tokens; fewer if the text ends before [tokens].

        Returns:
            The tokens.
        """
        known = (corpus.name, count)
        if known not in self._texts:
            self._texts[known] = tokens.encode(corpus, self.loaded.tokenizer, tokens=count, bos=self.bos)
        return self._texts[known]

    def foresee(self, readings: Iterable[tuple[Configuration, Corpus, int]]) -> None:
        """Names what will be read, so that a text is read once, to the greatest length, and not once per length.

        Args:
            readings: how to remember, one of the texts, how many tokens.
        """
        for configuration, corpus, count in readings:
            if not configuration.depends_on_calls:
                text = self.text(corpus, count)
                self._foreseen[configuration, corpus.name][text.ids.shape[1]] = text

    def losses(self, label: str, configuration: Configuration, text: tokens.TokenText) -> Perplexity:
        """Every token's loss, measured once.

        Args:
            label: which table asks, for the progress bar.
            configuration: how to remember.
            text: what to read.

        Returns:
            The record and the losses.
        """
        known = _reading_of(configuration, text)
        stages = [text] if known in self._read else self._stages(configuration, text)
        self.reporter.begin(f"{label}: PPL {configuration.name}, {text.corpus}", len(stages[-1].targets))
        if known not in self._read:
            self._read_stages(configuration, stages)
        return self._read[known]

    def _stages(self, configuration: Configuration, text: tokens.TokenText) -> list[tokens.TokenText]:
        """The text and all that was foreseen of it, the shortest first."""
        foreseen = self._foreseen.get((configuration, text.corpus), {})
        alike = foreseen.get(text.ids.shape[1])
        if alike is None or alike.sha256 != text.sha256:
            return [text]
        return [foreseen[count] for count in sorted(foreseen)]

    def _read_stages(self, configuration: Configuration, stages: Sequence[tokens.TokenText]) -> None:
        """Finds the losses of each stage: all are kept at once, or an interruption would lose the long ones."""

        @functools.cache
        def measured() -> list[Perplexity]:
            model, advance = self.loaded.model, self.reporter.advance
            if len(stages) == 1:
                return [perplexity.measure(configuration, model, stages[0], on_block=advance)]
            return perplexity.measure_stages(configuration, model, stages, on_block=advance)

        for number, stage in enumerate(stages):
            key = {**self.origin, **described(configuration), "code": code_version(*SCORING), "block": BLOCK}
            key |= {"corpus": stage.corpus, "text": stage.sha256, "lengths": list(stage.lengths), "bos": stage.bos}
            found = self.store.losses(f"nll-{configuration.name}", key, lambda number=number: measured()[number])  # type: ignore[misc]
            self._read[_reading_of(configuration, stage)] = found

    def score(self, label: str, configuration: Configuration, corpus: Corpus, count: int) -> PerplexityRecord:
        """The record alone of `losses` over the first tokens of a text.

        Args:
            label: which table asks.
            configuration: how to remember.
            corpus: one of the texts.
            count: tokens to read [tokens].

        Returns:
            The record.
        """
        return self.losses(label, configuration, self.text(corpus, count)).record

    @functools.cached_property
    def origin(self) -> dict[str, Any]:
        """The part of a key that is the same for all measurements: model and machine."""
        return {
            "model": model_digest(self.loaded),
            "dtype": self.loaded.record.dtype,
            "attention": self.loaded.record.attention,
            "machine": machine.fingerprint(self.loaded.model.device),
        }


def _reading_of(configuration: Configuration, text: tokens.TokenText) -> Hashable:
    """What tells one reading from another while model and BOS policy stay."""
    return configuration, text.corpus, text.sha256, text.lengths


def described(configuration: Configuration) -> dict[str, Any]:
    """A configuration as part of a key: its name and its numbers, defaults included."""
    numbers = [configuration.num_sinks, configuration.window, configuration.buffer]
    return {"configuration": configuration.name, "kind": configuration.kind, "numbers": numbers}


def digest_of(ids: torch.Tensor) -> str:
    """SHA-256 of token ids."""
    return hashlib.sha256(ids.cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def model_digest(loaded: LoadedModel) -> str:
    """What identifies the weights: the file's digest, the commit on the hub, or a digest of the weights themselves.

    Args:
        loaded: the model.

    Returns:
        A text that is equal for equal weights from the same place.
    """
    record = loaded.record
    if record.sha256 or record.revision:
        return f"{record.name} {record.sha256 or record.revision}"
    digest = hashlib.sha256()
    for name, weight in sorted(loaded.model.state_dict().items()):
        digest.update(name.encode() + str(weight.dtype).encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"{record.name} {digest.hexdigest()}"
