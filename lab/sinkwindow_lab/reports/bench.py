"""What many measurements share: model, texts, finished measurements, progress."""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sinkwindow_lab.inputs import machine, tokens
from sinkwindow_lab.inputs.corpora import Corpus
from sinkwindow_lab.inputs.models import LoadedModel
from sinkwindow_lab.measure import perplexity
from sinkwindow_lab.measure.perplexity import BLOCK, Perplexity
from sinkwindow_lab.progress import Reporter, Silent
from sinkwindow_lab.records import BosPolicy, PerplexityRecord
from sinkwindow_lab.store import Store, code_version
from sinkwindow_lab.ways.configurations import Configuration

SCORING = ("measure.perplexity", "ways.sessions", "ways.ablations", "ways.configurations")


@dataclass
class Bench:
    """A model, its texts, and the store of finished measurements."""

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
        """Return the first `count` tokens of a text, fewer if the text ends before."""
        known = (corpus.name, count)
        if known not in self._texts:
            self._texts[known] = tokens.encode(corpus, self.loaded.tokenizer, tokens=count, bos=self.bos)
        return self._texts[known]

    def foresee(self, readings: Iterable[tuple[Configuration, Corpus, int]]) -> None:
        """Announce readings, so that a text is read once, to its greatest length, instead of once per length."""
        for configuration, corpus, count in readings:
            if not configuration.depends_on_calls:
                text = self.text(corpus, count)
                self._foreseen[configuration, corpus.name][text.ids.shape[1]] = text

    def losses(self, label: str, configuration: Configuration, text: tokens.TokenText) -> Perplexity:
        """Return the record and every token's loss, measured once; `label` is for the progress bar."""
        known = _reading_of(configuration, text)
        stages = [text] if known in self._read else self._stages(configuration, text)
        self.reporter.begin(f"{label}: PPL {configuration.name}, {text.corpus}", len(stages[-1].targets))
        if known not in self._read:
            self._read_stages(configuration, stages)
        return self._read[known]

    def _stages(self, configuration: Configuration, text: tokens.TokenText) -> list[tokens.TokenText]:
        """Return the text and all announced starts of it, the shortest first."""
        foreseen = self._foreseen.get((configuration, text.corpus), {})
        alike = foreseen.get(text.ids.shape[1])
        if alike is None or alike.sha256 != text.sha256:
            return [text]
        return [foreseen[count] for count in sorted(foreseen)]

    def _read_stages(self, configuration: Configuration, stages: Sequence[tokens.TokenText]) -> None:
        """Measure the losses of each stage; all are stored at once, so that an interruption loses none of them."""

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
        """Return the record of `losses` over the first `count` tokens of a text."""
        return self.losses(label, configuration, self.text(corpus, count)).record

    @functools.cached_property
    def origin(self) -> dict[str, Any]:
        """The part of a key that all measurements share: model and machine."""
        return {
            "model": model_digest(self.loaded),
            "dtype": self.loaded.record.dtype,
            "attention": self.loaded.record.attention,
            "machine": machine.fingerprint(self.loaded.model.device),
        }


def _reading_of(configuration: Configuration, text: tokens.TokenText) -> Hashable:
    """Return what distinguishes two readings by the same model with the same BOS policy."""
    return configuration, text.corpus, text.sha256, text.lengths


def described(configuration: Configuration) -> dict[str, Any]:
    """Return a configuration as part of a key: its name and its numbers, defaults included."""
    numbers = [configuration.num_sinks, configuration.window, configuration.buffer]
    return {"configuration": configuration.name, "kind": configuration.kind, "numbers": numbers}


def digest_of(ids: torch.Tensor) -> str:
    """Return the SHA-256 of token ids."""
    return hashlib.sha256(ids.cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def model_digest(loaded: LoadedModel) -> str:
    """Identify the weights: by the file's digest, the commit on the hub, or a digest of the weights themselves."""
    record = loaded.record
    if record.sha256 or record.revision:
        return f"{record.name} {record.sha256 or record.revision}"
    digest = hashlib.sha256()
    for name, weight in sorted(loaded.model.state_dict().items()):
        digest.update(name.encode() + str(weight.dtype).encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"{record.name} {digest.hexdigest()}"
