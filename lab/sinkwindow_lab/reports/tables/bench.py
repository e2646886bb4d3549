"""What the measurements of a run share: model, texts, finished measurements, progress."""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sinkwindow_lab.inputs import machine, tokens
from sinkwindow_lab.inputs.corpora import Corpus
from sinkwindow_lab.inputs.models import LoadedModel
from sinkwindow_lab.measure import perplexity
from sinkwindow_lab.measure.perplexity import BLOCK, Score
from sinkwindow_lab.progress import Reporter
from sinkwindow_lab.records import BosPolicy
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
    reporter: Reporter = field(default_factory=Reporter)
    texts: dict[tuple[str, int], tokens.TokenText] = field(default_factory=dict, init=False)
    # By configuration and corpus, then by number of tokens.
    _announced: defaultdict[tuple[Configuration, str], dict[int, tokens.TokenText]] = field(
        default_factory=lambda: defaultdict(dict), init=False
    )
    _read: dict[Hashable, Score] = field(default_factory=dict, init=False)

    def text(self, corpus: Corpus, count: int) -> tokens.TokenText:
        """Return the first `count` tokens of a text, fewer if the text ends before."""
        known = (corpus.name, count)
        if known not in self.texts:
            text = tokens.encode(corpus, self.loaded.tokenizer, tokens=count, bos=self.bos)
            self.loaded.check_ids(text)
            self.texts[known] = text
        return self.texts[known]

    def announce(self, configuration: Configuration, corpus: Corpus, count: int) -> None:
        """Announce a reading, so that a text is read once, to its greatest length, instead of once per length."""
        if not configuration.depends_on_calls:
            text = self.text(corpus, count)
            self._announced[configuration, corpus.name][text.ids.shape[1]] = text

    def score(self, configuration: Configuration, corpus: Corpus, count: int) -> Score:
        """Return the losses over the first `count` tokens of a text, measured once."""
        text = self.text(corpus, count)
        known = configuration, text.corpus, text.sha256
        if known not in self._read:
            for one in self._scores(configuration, self._stages(configuration, text)):
                self._read[configuration, one.text.corpus, one.text.sha256] = one
        return self._read[known]

    def targets_left(self, configuration: Configuration, corpus: Corpus, count: int) -> int:
        """Return how many targets `score` would read now."""
        text = self.text(corpus, count)
        known = (configuration, text.corpus, text.sha256) in self._read
        return 0 if known else len(self._stages(configuration, text)[-1].targets)

    def _stages(self, configuration: Configuration, text: tokens.TokenText) -> list[tokens.TokenText]:
        """Return all announced starts of the text that this one is of, the shortest first, or this one alone."""
        announced = self._announced.get((configuration, text.corpus), {})
        stages = [announced[length] for length in sorted(announced)]
        return stages if text.sha256 in {stage.sha256 for stage in stages} else [text]

    def _scores(self, configuration: Configuration, stages: Sequence[tokens.TokenText]) -> Iterator[Score]:
        """Yield the score of each length, each stored as soon as it is there."""
        keys = [self._reading_key(configuration, stage) for stage in stages]
        what = f"nll-{configuration.name}"
        stored = [self.store.losses(what, key) for key in keys]
        if all(stored):
            self.store.reused += len(stages)
            for stage, found in zip(stages, stored, strict=True):
                assert found is not None  # noqa: S101 - see above
                yield Score(configuration.name, stage, BLOCK, *found)
            return
        model, advance = self.loaded.model, self.reporter.advance
        if configuration.depends_on_calls:
            made = iter([perplexity.measure(configuration, model, stages[0], on_block=advance)])
        else:
            made = perplexity.measure_stages(configuration, model, stages, on_block=advance)
        for key, one in zip(keys, made, strict=True):
            self.store.keep_losses(what, key, one.nll, one.facts)
            self.reporter.found(f"PPL {one.perplexity:.3f} of {len(one.nll) + 1:,} tokens")
            yield one

    def _reading_key(self, configuration: Configuration, text: tokens.TokenText) -> dict[str, Any]:
        key = {**self.origin, "configuration": described(configuration), "code": code_version(*SCORING), "block": BLOCK}
        return key | {"corpus": text.corpus, "text": text.sha256, "bos": text.bos}

    @functools.cached_property
    def origin(self) -> dict[str, Any]:
        """The part of a key that all measurements share: model and machine."""
        record = self.loaded.record
        return {
            "model": model_digest(self.loaded),
            "dtype": record.dtype,
            "attention": record.attention,
            "machine": machine.fingerprint(self.loaded.model.device),
        }


def described(configuration: Configuration) -> list[Any]:
    """Return a configuration as part of a key: its name and its numbers, defaults included."""
    numbers = (configuration.num_sinks, configuration.window, configuration.buffer)
    return [configuration.name, configuration.kind, *numbers]


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
