"""The data of the tasks, made from the embedded texts; `--metadata` of lm-eval changes the sizes."""

from __future__ import annotations

import random
from typing import Any

from datasets import Dataset

from sinkwindow_lab.inputs.corpora import load_corpus
from sinkwindow_lab.reports.tables.recall import DIGITS, make_lines

CHOICES = 4


def pieces(corpus: str, documents: int = 4, characters: int = 6000, **_: Any) -> dict[str, Dataset]:
    """Return `documents` pieces of a text, spread evenly over it, of up to so many `characters` each."""
    text = load_corpus(corpus).text
    starts = [number * len(text) // documents for number in range(documents)]
    return {"test": Dataset.from_list([{"text": text[start : start + characters]} for start in starts])}


def questions(lines_back: int, documents: int = 16, corpus: str = "shakespeare", **_: Any) -> dict[str, Dataset]:
    """Return questions for a number that stands so many lines back, each with its text and four numbers to choose."""
    filler = [line.strip() for line in load_corpus(corpus).text.splitlines() if line.strip()]
    rows = []
    for seed in range(documents):
        made = make_lines(filler, [lines_back], seed=seed)
        (asked,) = made.questions
        right = made.text[asked.start : asked.end].strip()
        chance = random.Random(seed)  # noqa: S311 - numbers, no secrets
        others = [f"{one:0{DIGITS}d}" for one in chance.sample(range(10**DIGITS), CHOICES)]
        choices = [*[one for one in others if one != right][: CHOICES - 1], right]
        chance.shuffle(choices)
        rows.append({"context": made.text[: asked.start], "choices": choices, "answer": choices.index(right)})
    return {"test": Dataset.from_list(rows)}
