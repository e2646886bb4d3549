"""The origin of numbers, and what is doubtful about them, in words: the head of every page with measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sinkwindow_lab.records import CorpusRecord, MachineRecord, Measurement, ModelRecord, Report, TextRecord
from sinkwindow_lab.render.markdown import bullets, join, name, table

NAMED = 3  # missing weights that are named


def head(report: Report, more: Sequence[tuple[str, str]] = ()) -> str:
    """Return the table of what ran, where and when, and below it what is doubtful about the numbers."""
    rows = [("Model", model_line(one)) for one in report.models]
    rows += [("Corpus", corpus_line(one)) for one in report.corpora]
    if "bos" in report.notes:
        prefix = next((f" (token {one.bos_id})" for one in report.texts if one.bos_id is not None), "")
        rows.append(("BOS", f"added in front of each text{prefix}" if report.notes["bos"] == "add" else "none added"))
    found = doubts(report.models, report.texts, report.measurements)
    warnings = ["**Doubtful numbers:**", bullets([*map(name, found)])] if found else []
    return join([table(("", "value"), [*rows, *more, *machine_rows(report.machine)], words=True), *warnings]).rstrip()


def model_line(model: ModelRecord) -> str:
    """Describe a model in one line."""
    origin = ", ".join(part for part in (model.source, model.revision, _digest(model.sha256)) if part)
    size = f"{model.parameters / 1e6:,.1f}M parameters, {model.weight_bytes / 1e9:.3f} GB"
    kind = f"{model.model_type}, {size}, {model.dtype} on {model.device}, {model.attention}"
    return name(f"{model.name} ({origin}); {kind}")


def corpus_line(corpus: CorpusRecord) -> str:
    """Describe a text in one line."""
    parts = (corpus.source, corpus.config, corpus.split, corpus.revision, _digest(corpus.sha256))
    origin = ", ".join(part for part in parts if part)
    return name(f"{corpus.name}: {origin}; {corpus.documents:,} document(s), {corpus.characters:,} characters")


def machine_rows(machine: MachineRecord) -> list[tuple[str, str]]:
    """Describe a machine and its software, a row each."""
    packages = ", ".join(f"{package} {version}" for package, version in machine.packages.items())
    changed = " with local changes" if machine.dirty else ""
    place = f"{machine.cpu}, {machine.cores} core(s), {machine.memory_gb:.1f} GB, {machine.gpu or 'no GPU'}"
    return [
        ("Machine", name(place)),
        ("Software", name(f"Python {machine.python}, {packages}; {machine.threads} thread(s); {machine.system}")),
        ("Commit", f"{machine.commit}{changed}" if machine.commit else "not run from a checkout"),
        ("Date", machine.date),
    ]


def machine_line(machine: MachineRecord, *rows: str) -> str:
    """Tell on which machine and when numbers were measured, with more of the `rows` above if wanted."""
    known = dict(machine_rows(machine))
    return f"Measured on {'; '.join([known['Machine'], *(f'{one.lower()} {known[one]}' for one in (*rows, 'Date'))])}."


def _digest(sha256: str | None) -> str:
    return f"sha256 {sha256[:16]}" if sha256 else ""


def doubts(
    models: Sequence[ModelRecord], texts: Sequence[TextRecord], measurements: Sequence[Measurement] = ()
) -> list[str]:
    """Return what is doubtful in what was measured, a sentence each."""
    found = [
        f"model {one.name!r} lacks {len(one.missing_weights)} weights in its files, which have random values, so that "
        f"no PPL of it means anything: {', '.join(one.missing_weights[:NAMED])}"
        + (", ..." if len(one.missing_weights) > NAMED else "")
        for one in models
        if one.missing_weights
    ]
    found += [
        f"{one.tokens} tokens of corpus {one.corpus!r} were read{_by(one, models)}, {one.requested} were requested"
        for one in texts
        if one.requested is not None and one.tokens < one.requested
    ]
    scored = [one for one in measurements if one.metric == "PPL"]
    for one in scored:
        several = [text for text in texts if text.corpus == one.subject and text.tokenizer]
        own = [text for text in several if text.model == one.part]  # a report on several models has a part for each
        words = max((text.tokenizer.vocabulary for text in own or several if text.tokenizer), default=math.inf)
        if not one.median <= words:
            found.append(
                f"PPL {one.median:.4g} of {one.configuration} on {one.subject!r} is above the size of the vocabulary, "
                f"{words}, the PPL of guessing: model, dtype or tokenizer do not fit"
            )
    return found


def _by(text: TextRecord, models: Sequence[ModelRecord]) -> str:
    return f" by {text.model!r}" if text.model and len(models) > 1 else ""
