"""What the measurements of a run share: model, texts, finished measurements, progress."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from sinkwindow_lab.inputs import machine, tokens
from sinkwindow_lab.inputs.corpora import Corpus
from sinkwindow_lab.inputs.models import LoadedModel
from sinkwindow_lab.measure import perplexity
from sinkwindow_lab.measure.perplexity import BLOCK, Score
from sinkwindow_lab.progress import Reporter
from sinkwindow_lab.ranks import Group, Unit
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
    timed: bool = True  # whether readings have this machine for themselves; otherwise their times are left out
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
            self.texts[known] = self.loaded.encode(corpus, tokens=count, bos=self.bos)
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
            stages = self._stages(*known) or [self.text(corpus, count)]
            for one in self._scores(configuration, stages, BLOCK, self.reporter.found):
                self._read[configuration, corpus.name, one.text.ids.shape[1]] = one
        return self._read[known]

    def score_pieces(self, configuration: Configuration, text: tokens.TokenText, block: int) -> Score:
        """Return the losses of texts that are read apart, each stored as soon as it is there."""
        pieces = [self._scores(configuration, [piece], block) for piece in text.pieces]
        return perplexity.merged(text, [*itertools.chain(*pieces)])

    def units_of_text(self, configuration: Configuration, text: tokens.TokenText, block: int) -> list[Unit]:
        """Return a unit of work for each text that is read apart, once for texts that are equal."""
        apart = {piece.sha256: piece for piece in text.pieces}
        return [
            _unit(
                f"PPL {configuration.name}, {text.corpus}, {block} tok/call, text {place} of {len(apart)}",
                configuration,
                len(piece.targets),
                functools.partial(self.score_pieces, configuration, piece, block),
            )
            for place, piece in enumerate(apart.values(), start=1)
        ]

    def unit(self, configuration: Configuration, corpus: Corpus, count: int) -> Unit:
        """Return the unit of work that `score` needs: for all announced lengths the same, under the same name."""
        once = f", {count:,} tokens" if configuration.depends_on_calls else ""
        name = f"PPL {configuration.name}, {corpus.name}{once}"
        targets = self.targets_left(configuration, corpus, count)
        return _unit(name, configuration, targets, functools.partial(self.score, configuration, corpus, count))

    def shared_by(self, group: Group, units: Iterable[Unit], texts: Iterable[tokens.TokenText]) -> None:
        """Have units done by the processes of a group; return in rank 0, which finds them in the store."""
        own, self.reporter, self.timed = self.reporter, group, False
        distinct = {unit.name: unit for unit in units}
        facts = {"configurations": sorted(distinct), "texts": [text.sha256 for text in texts], **self.key(SCORING)}
        facts["corpora"] = [one.record().sha256 for one in self.corpora]
        group.share([*distinct.values()], self.store, facts)
        self.reporter = own

    def targets_left(self, configuration: Configuration, corpus: Corpus, count: int) -> int:
        """Return how many targets `score` would read now."""
        text = self.text(corpus, count)
        known = configuration, corpus.name, text.ids.shape[1]
        return 0 if known in self._read else len([text, *self._stages(*known)][-1].targets)

    def _stages(self, configuration: Configuration, corpus: str, length: int) -> list[tokens.TokenText]:
        """Return all announced starts of a text, the shortest first, if one of them is this long."""
        announced = self._announced.get((configuration, corpus), {})
        return [announced[one] for one in sorted(announced)] if length in announced else []

    def _scores(
        self,
        configuration: Configuration,
        stages: Sequence[tokens.TokenText],
        block: int,
        found: Callable[[str], object] = lambda _: None,
    ) -> Iterator[Score]:
        """Yield the score of each length, each stored, and its number told to `found`, as soon as it is there."""
        made = perplexity.measure_stages(
            configuration, self.loaded.model, stages, block=block, on_block=self.reporter.advance
        )
        keys = [
            self.key(SCORING, way=configuration, corpus=one.corpus, text=one.sha256, bos=one.bos, block=block)
            for one in stages
        ]
        what = f"nll-{configuration.name}"
        stored = [known for known in (self.store.read(what, key, LOSSES) for key in keys) if known is not None]
        if len(stored) == len(stages):
            for stage, (nll, facts) in zip(stages, stored, strict=True):
                losses = torch.tensor(nll, dtype=torch.float64)
                yield Score(configuration.name, stage, block, losses, self._facts(facts))
            return
        for key, one in zip(keys, made, strict=True):
            score = dataclasses.replace(one, facts=self._facts(one.facts))
            self.store.write(what, key, (score.nll.tolist(), score.facts))
            found(f"PPL {score.perplexity:.3f} of {len(score.nll) + 1:,} tokens")
            yield score

    def _facts(self, facts: dict[str, float]) -> dict[str, float]:
        return {name: fact for name, fact in facts.items() if self.timed or name != "seconds"}

    def key(self, modules: Sequence[str], **parts: Any) -> dict[str, Any]:
        """Return the key of measurements: model, machine, the code of `modules`, and what else they depend on."""
        if self.store.folder is None:  # nothing is stored, and a digest of weights takes a while
            return {}
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


def _unit(name: str, configuration: Configuration, targets: int, run: Callable[[], object]) -> Unit:
    """Return a unit with its size: re-computation reads a whole window for each target."""
    return Unit(name, targets * (configuration.size if configuration.kind == "recompute" else 1), run)


def model_digest(loaded: LoadedModel) -> str:
    """Identify configuration, code and weights, the latter by the file's digest or the commit on the hub, if known."""
    record, digest = loaded.record, hashlib.sha256()
    settings = json.loads(loaded.model.config.to_json_string(use_diff=False))
    settings.pop("_name_or_path", None)  # machines that share work may keep the same model in other places
    digest.update(json.dumps(settings, sort_keys=True).encode())
    digest.update(Path(inspect.getfile(type(loaded.model))).read_bytes())  # which --trust-remote-code may bring
    if known := record.sha256 or record.revision:
        return f"{record.name} {known} {digest.hexdigest()}"
    for name, weight in sorted(loaded.model.state_dict().items()):
        digest.update(name.encode() + str(weight.dtype).encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"{record.name} {digest.hexdigest()}"
