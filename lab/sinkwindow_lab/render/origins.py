"""The origin of numbers, in words: the head of every page with measurements."""

from __future__ import annotations

from sinkwindow_lab.records import CorpusRecord, MachineRecord, ModelRecord


def model_line(model: ModelRecord) -> str:
    """Describe a model in one line."""
    origin = ", ".join(part for part in (model.source, model.revision, _digest(model.sha256)) if part)
    size = f"{model.parameters / 1e6:,.1f}M parameters, {model.weight_bytes / 1e9:.3f} GB"
    return f"{model.name} ({origin}); {model.model_type}, {size}, {model.dtype} on {model.device}, {model.attention}"


def corpus_line(corpus: CorpusRecord) -> str:
    """Describe a text in one line."""
    parts = (corpus.config, corpus.split, corpus.revision, _digest(corpus.sha256))
    origin = ", ".join([corpus.source, *(part for part in parts if part)])
    return f"{corpus.name}: {origin}; {corpus.documents:,} document(s), {corpus.characters:,} characters"


def machine_rows(machine: MachineRecord) -> list[tuple[str, str]]:
    """Describe a machine and its software, a row each."""
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    changed = " with local changes" if machine.dirty else ""
    return [
        ("Machine", f"{machine.cpu}, {machine.cores} core(s), {machine.memory_gb:.1f} GB, {machine.gpu or 'no GPU'}"),
        ("Software", f"Python {machine.python}, {packages}; {machine.threads} thread(s); {machine.system}"),
        ("Commit", f"{machine.commit}{changed}" if machine.commit else "not run from a checkout"),
        ("Date", machine.date),
    ]


def _digest(sha256: str | None) -> str:
    return f"sha256 {sha256[:16]}" if sha256 else ""
