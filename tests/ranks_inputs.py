"""A model and documents of uneven lengths, and the command that scores them, for the tests of several processes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from lab_tiny import random_text, save_tiny, text_of_lines

if TYPE_CHECKING:
    from pathlib import Path

LENGTHS = (400, 30, 7, 150, 60, 2, 90, 1, 60, 220)  # words of each document
ROWS = "baseline,streaming_2_6_3"
UNITS = 2 * 9  # one document has no target


def save_inputs(path: Path) -> Path:
    """Write a tiny model, a text of documents of which two are equal, and one of lines; return the folder."""
    save_tiny(path / "model")
    rows = [json.dumps({"text": random_text(count, seed=place)}) for place, count in enumerate(LENGTHS)]
    (path / "docs.jsonl").write_text("\n".join([*rows, rows[0]]), encoding="utf-8")
    (path / "lines.txt").write_text(text_of_lines(60), encoding="utf-8")
    return path


def command(inputs: Path, *more: object) -> list[str]:
    """Return the arguments of a perplexity over documents."""
    options = ("--model", inputs / "model", "--corpus", inputs / "docs.jsonl", "--documents", "apart", "--config", ROWS)
    return [str(one) for one in ("perplexity", *options, "--no-times", "--json", "--tokens", 2000, *more)]
