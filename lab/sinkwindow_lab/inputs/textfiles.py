"""Documents of a local file: plain text is one, jsonl and parquet have one per row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from sinkwindow_lab.errors import LabError, require

COLUMN = "text"


def read_documents(path: Path) -> tuple[str, ...]:
    """Return the documents of an existing file.

    `.jsonl` (objects with a field `text`, or plain strings) and `.parquet` (a column `text`) are read by row, anything
    else is one UTF-8 text.

    Raises:
        LabError: if it is not what its name says, or cannot be read.
    """
    readers: dict[str, Callable[[Path], tuple[str, ...]]] = {".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}
    try:
        return readers.get(path.suffix.lower(), _plain)(path)
    except UnicodeDecodeError as error:
        raise LabError(f"corpus file {path} is not UTF-8 text (byte {error.start}): convert it first") from error
    except OSError as error:
        raise LabError(f"corpus file {path} cannot be read: {error.strerror or error}") from error


def _plain(path: Path) -> tuple[str, ...]:
    return (path.read_text(encoding="utf-8"),)


def _jsonl(path: Path) -> tuple[str, ...]:
    documents = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                documents.append(_json_text(path, number, line))
    return tuple(documents)


def _json_text(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise LabError(
            f"corpus file {path}, line {number} is not JSON ({error.msg}): a jsonl file has one object per line"
        ) from error
    text = row.get(COLUMN) if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise LabError(f"corpus file {path}, line {number} has no string in a field {COLUMN!r}: rename the field")
    return text


def _parquet(path: Path) -> tuple[str, ...]:
    arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        values = file.read(columns=[COLUMN]).column(COLUMN).to_pylist() if COLUMN in names else None
    except arrow.ArrowException as error:
        raise LabError(f"corpus file {path} is not a parquet file that can be read: {error}") from error
    if values is None:
        raise LabError(f"corpus file {path} has no column {COLUMN!r}, only {', '.join(names)}: rename one")
    if not all(isinstance(one, str | None) for one in values):
        raise LabError(f"corpus file {path}: column {COLUMN!r} does not hold strings")
    return tuple(one for one in values if one is not None)
