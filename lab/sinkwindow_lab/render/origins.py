"""The origin of numbers, in words: the head of every page with measurements."""

from __future__ import annotations

from collections.abc import Sequence

from sinkwindow_lab.records import CorpusRecord, MachineRecord, ModelRecord, Report
from sinkwindow_lab.render.doubts import doubts
from sinkwindow_lab.render.markdown import bullets, join, name, table


def head(report: Report, more: Sequence[tuple[str, str]] = ()) -> str:
    """Return the table of what ran, where and when, and below it what is doubtful about the numbers."""
    rows = [("Model", model_line(one)) for one in report.models]
    rows += [("Corpus", corpus_line(one)) for one in report.corpora]
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


def _digest(sha256: str | None) -> str:
    return f"sha256 {sha256[:16]}" if sha256 else ""
