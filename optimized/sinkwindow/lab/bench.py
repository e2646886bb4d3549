"""What stays the same while many things are measured: model, texts, finished measurements, progress."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
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

    def text(self, corpus: Corpus, count: int) -> tokens.TokenText:
        """The first tokens of a text.

        Args:
            corpus: one of the texts.
            count: how many tokens; fewer if the text ends before [tokens].

        Returns:
            The tokens.
        """
        known = self._texts.setdefault((corpus.name, count), [])
        if not known:
            known.append(tokens.encode(corpus, self.loaded.tokenizer, tokens=count, bos=self.bos))
        return known[0]

    def losses(self, label: str, configuration: Configuration, text: tokens.TokenText) -> Perplexity:
        """Every token's loss, measured once.

        Args:
            label: which table asks, for the progress bar.
            configuration: how to remember.
            text: what to read.

        Returns:
            The record and the losses.
        """
        self.reporter.begin(f"{label}: PPL {configuration.name}, {text.corpus}", len(text.targets))
        key = {**self.origin, **described(configuration), "code": code_version(*SCORING), "block": BLOCK}
        key |= {"corpus": text.corpus, "text": text.sha256, "lengths": list(text.lengths), "bos": text.bos}
        return self.store.losses(
            f"nll-{configuration.name}",
            key,
            lambda: perplexity.measure(configuration, self.loaded.model, text, on_block=self.reporter.advance),
        )

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

    @functools.cached_property
    def _texts(self) -> dict[tuple[str, int], list[tokens.TokenText]]:
        return {}


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
