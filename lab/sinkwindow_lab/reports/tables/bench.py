"""What the measurements of a run share: model, texts, finished measurements, progress."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import TypeAdapter

from sinkwindow_lab.inputs import machine, tokens
from sinkwindow_lab.inputs.corpora import Corpus
from sinkwindow_lab.inputs.models import LoadedModel
from sinkwindow_lab.measure import perplexity
from sinkwindow_lab.measure.perplexity import BLOCK, Score
from sinkwindow_lab.progress import Reporter
from sinkwindow_lab.records import BosPolicy, Configuration
from sinkwindow_lab.store import Store, code_version

LOSSES = TypeAdapter(tuple[list[float], dict[str, float]])  # of a reading, and its facts
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
    _read: dict[tuple[Configuration, str, int], Score] = field(default_factory=dict, init=False)

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
        known = configuration, corpus.name, self.text(corpus, count).ids.shape[1]
        if known not in self._read:
            for one in self._scores(configuration, self._stages(*known) or [self.text(corpus, count)]):
                self._read[configuration, corpus.name, one.text.ids.shape[1]] = one
        return self._read[known]

    def targets_left(self, configuration: Configuration, corpus: Corpus, count: int) -> int:
        """Return how many targets `score` would read now."""
        text = self.text(corpus, count)
        known = configuration, corpus.name, text.ids.shape[1]
        return 0 if known in self._read else len([text, *self._stages(*known)][-1].targets)

    def _stages(self, configuration: Configuration, corpus: str, length: int) -> list[tokens.TokenText]:
        """Return all announced starts of a text, the shortest first, if one of them is this long."""
        announced = self._announced.get((configuration, corpus), {})
        return [announced[one] for one in sorted(announced)] if length in announced else []

    def _scores(self, configuration: Configuration, stages: Sequence[tokens.TokenText]) -> Iterator[Score]:
        """Yield the score of each length, each stored as soon as it is there."""
        keys = [
            self.key(SCORING, way=configuration, corpus=one.corpus, text=one.sha256, bos=one.bos, block=BLOCK)
            for one in stages
        ]
        what = f"nll-{configuration.name}"
        stored = [found for found in (self.store.read(what, key, LOSSES) for key in keys) if found is not None]
        if len(stored) == len(stages):
            self.store.reused += len(stages)
            for stage, (nll, facts) in zip(stages, stored, strict=True):
                yield Score(configuration.name, stage, BLOCK, torch.tensor(nll, dtype=torch.float64), facts)
            return
        made = perplexity.measure_stages(configuration, self.loaded.model, stages, on_block=self.reporter.advance)
        for key, one in zip(keys, made, strict=True):
            self.store.write(what, key, (one.nll.tolist(), one.facts))
            self.reporter.found(f"PPL {one.perplexity:.3f} of {len(one.nll) + 1:,} tokens")
            yield one

    def key(self, modules: Sequence[str], **parts: Any) -> dict[str, Any]:
        """Return the key of measurements: model, machine, the code of `modules`, and what else they depend on."""
        record = self.loaded.record
        origin = {"dtype": record.dtype, "attention": record.attention, "code": code_version(*modules)}
        machine_now = machine.fingerprint(self.loaded.model.device)
        key = {**origin, "model": self._model, "machine": machine_now, **parts}
        # Configurations by their names and numbers, defaults included.
        text = json.dumps(key, default=lambda way: way.model_dump(exclude={"meaning"}))
        return json.loads(text)  # type: ignore[no-any-return]

    @functools.cached_property
    def _model(self) -> str:
        return model_digest(self.loaded)


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
