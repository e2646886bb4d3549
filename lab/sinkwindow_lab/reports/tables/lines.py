"""Text for the recall test: facts placed between ordinary lines, each asked for some lines later.

It is modeled on StreamEval of the StreamingLLM paper; its data was never published. There every line is a fact; a model
as small as the embedded one confuses so many, so ordinary text is between them. Every fact is asked for once, so the
distance to its only mention is known.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sinkwindow_lab.errors import LabError

THINGS = (
    "apple", "arrow", "basket", "bell", "bird", "boat", "bottle", "bridge", "candle", "chair", "clock", "cloud",
    "coat", "door", "drum", "flag", "flower", "garden", "glass", "hammer", "horse", "house", "island", "key",
    "kite", "ladder", "lamp", "letter", "lion", "mirror", "mountain", "needle", "paper", "pencil", "piano", "ring",
    "river", "shoe", "spoon", "stone", "table", "tiger", "tower", "train", "tree", "wagon", "wheel", "window",
)  # fmt: skip
DIGITS = 3
APART = 2  # ordinary lines between a question and the next fact


@dataclass(frozen=True)
class Question:
    """The places of a fact and its answer in the text [characters].

    Attributes:
        lines_back: ordinary lines between the fact and the question [lines].
        fact_end: where the fact ends.
        start: where the answer starts, its leading space included.
        end: where it ends.
    """

    lines_back: int
    fact_end: int
    start: int
    end: int


@dataclass(frozen=True)
class Lines:
    """A text with its questions."""

    text: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Answer:
    """A question in tokens.

    Attributes:
        lines_back: ordinary lines between the fact and the question [lines].
        tokens_back: from the fact's last token to the answer's first one [tokens].
        places: indices of the answer's tokens.
    """

    lines_back: int
    tokens_back: int
    places: tuple[int, ...]


def make_lines(filler: Sequence[str], distances: Sequence[int], *, seed: int) -> Lines:
    """Create one text with a fact and its question for each distance, in an order chosen by the seed.

    `filler` are ordinary lines, enough for all distances, taken from a place chosen by the seed. `distances` count the
    ordinary lines between a fact and its question.

    Raises:
        LabError: if there are not enough lines or names.
    """
    needed = sum(distances) + APART * len(distances)
    if len(filler) < needed or not 0 < len(distances) <= len(THINGS):
        raise LabError(
            f"recall over {len(distances)} distances needs {needed} lines of text and has {len(filler)}, "
            f"and 1 to {len(THINGS)} distances: give a longer text with lines"
        )
    chance = random.Random(seed)  # noqa: S311 - names and numbers, no secrets
    first = chance.randrange(len(filler) - needed + 1)
    rest = iter(filler[first : first + needed])
    text, questions = "", []
    for name, distance in zip(
        chance.sample(THINGS, len(distances)), chance.sample(distances, len(distances)), strict=True
    ):
        fact = f"The number of the {name} is"
        number = f" {chance.randrange(10**DIGITS):0{DIGITS}d}"
        text += "".join(f"{next(rest)}\n" for _ in range(APART)) + fact + number
        fact_end = len(text)
        text += ".\n" + "".join(f"{next(rest)}\n" for _ in range(distance)) + fact
        questions.append(Question(distance, fact_end, len(text), len(text) + len(number)))
        text += number + ".\n"
    return Lines(text, tuple(questions))


def in_tokens(lines: Lines, tokenizer: Any) -> tuple[list[int], list[Answer]]:
    """Tokenize a text with a fast tokenizer; return all token ids, and the answers.

    Raises:
        LabError: if the tokenizer has no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise LabError(f"recall needs a fast tokenizer, {type(tokenizer).__name__} has no offsets")
    found = tokenizer(lines.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return found["input_ids"], [_answer(found["offset_mapping"], one) for one in lines.questions]


def _answer(spans: Sequence[tuple[int, int]], question: Question) -> Answer:
    """Return the tokens that overlap the answer: some tokenizers merge the period into the number's last one."""
    places = tuple(index for index, (start, end) in enumerate(spans) if end > question.start and start < question.end)
    fact = max(index for index, (start, _) in enumerate(spans) if start < question.fact_end)
    return Answer(question.lines_back, places[0] - fact, places)
