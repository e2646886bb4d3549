"""Recall: facts inside the window are found, evicted ones are not.

The right answer is fed after every question, as StreamEval does. An answer counts if each of its tokens was the model's
first choice: exactly when greedy decoding would have given it to the last digit. So one pass over the text in long
calls asks all questions.

The text is modeled on StreamEval, whose data was never published. There every line is a fact; a model as small as the
embedded one confuses so many, so ordinary lines are between them. Every fact is asked for once, so the distance to its
only mention is known.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from sinkwindow_lab.errors import LabError
from sinkwindow_lab.measure.perplexity import BLOCK
from sinkwindow_lab.records import Configuration, Measurement, measured
from sinkwindow_lab.reports.tables.bench import Bench
from sinkwindow_lab.ways.configurations import open_session

THINGS = (
    "apple", "arrow", "basket", "bell", "bird", "boat", "bottle", "bridge", "candle", "chair", "clock", "cloud",
    "coat", "door", "drum", "flag", "flower", "garden", "glass", "hammer", "horse", "house", "island", "key",
    "kite", "ladder", "lamp", "letter", "lion", "mirror", "mountain", "needle", "paper", "pencil", "piano", "ring",
    "river", "shoe", "spoon", "stone", "table", "tiger", "tower", "train", "tree", "wagon", "wheel", "window",
)  # fmt: skip
DIGITS = 3
APART = 2  # ordinary lines between a question and the next fact


class Question(NamedTuple):
    """A question, and the places of its fact and its answer in the text [characters]."""

    lines_back: int  # ordinary lines between the fact and the question [lines]
    fact_end: int  # where the fact ends
    start: int  # where the answer starts, its leading space included
    end: int  # where it ends


class Lines(NamedTuple):
    """A text with its questions."""

    text: str
    questions: tuple[Question, ...]


class Answer(NamedTuple):
    """A question in tokens."""

    lines_back: int  # ordinary lines between the fact and the question [lines]
    tokens_back: int  # from the fact's last token to the answer's first one [tokens]
    places: tuple[int, ...]  # indices of the answer's tokens


class Page(NamedTuple):
    """A text with facts and questions, its tokens [1, tokens], and the places of the answers."""

    lines: Lines
    ids: torch.Tensor
    answers: list[Answer]


def make_lines(filler: Sequence[str], distances: Sequence[int], *, seed: int) -> Lines:
    """Create a text with a fact and its question for each distance [lines], in ordinary lines, some `filler`."""
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
    order = chance.sample(THINGS, len(distances)), chance.sample(distances, len(distances))
    for name, distance in zip(*order, strict=True):
        fact = f"The number of the {name} is"
        number = f" {chance.randrange(10**DIGITS):0{DIGITS}d}"
        text += "".join(f"{next(rest)}\n" for _ in range(APART)) + fact + number
        fact_end = len(text)
        text += ".\n" + "".join(f"{next(rest)}\n" for _ in range(distance)) + fact
        questions.append(Question(distance, fact_end, len(text), len(text) + len(number)))
        text += number + ".\n"
    return Lines(text, tuple(questions))


def in_tokens(lines: Lines, tokenizer: Any) -> Page:
    """Tokenize a text with a fast tokenizer."""
    if not getattr(tokenizer, "is_fast", False):
        raise LabError(f"recall needs a fast tokenizer, {type(tokenizer).__name__} has no offsets")
    found = tokenizer(lines.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    answers = [_answer(found["offset_mapping"], one) for one in lines.questions]
    return Page(lines, torch.tensor([found["input_ids"]]), answers)


def _answer(spans: Sequence[tuple[int, int]], question: Question) -> Answer:
    """Return the tokens that overlap the answer: some tokenizers merge the period into the number's last one."""
    places = tuple(index for index, (start, end) in enumerate(spans) if end > question.start and start < question.end)
    fact = max(index for index, (start, _) in enumerate(spans) if start < question.fact_end)
    return Answer(question.lines_back, places[0] - fact, places)


def pages(bench: Bench, seeds: Sequence[int], distances: Sequence[int]) -> list[Page]:
    """Make a text per seed; the first text of the bench gives the ordinary lines between facts and questions."""
    filler = [line.strip() for line in bench.corpora[0].text.splitlines() if line.strip()]
    return [in_tokens(make_lines(filler, distances, seed=seed), bench.loaded.tokenizer) for seed in seeds]


def ask(bench: Bench, way: Configuration, asked: Sequence[Page]) -> list[Measurement]:
    """Ask all questions of the pages; return by distance which were answered, and how many tokens ago the fact was."""
    hits: dict[int, list[tuple[float, float]]] = {}
    for page in asked:
        choices = []
        with open_session(way, bench.loaded.model) as session:
            for piece in torch.split(page.ids.to(bench.loaded.model.device), BLOCK, dim=1):
                choices.append(session.feed(piece)[0].argmax(dim=-1).cpu())
                bench.reporter.advance(piece.shape[1])
        for answer, hit in zip(page.answers, answered(torch.cat(choices), page.ids[0], page.answers), strict=True):
            hits.setdefault(answer.lines_back, []).append((float(hit), float(answer.tokens_back)))
    found = []
    for lines_back in sorted(hits):
        right, tokens_back = zip(*hits[lines_back], strict=True)
        figures = {"answered": ("", right), "tokens back": ("tokens", tokens_back)}
        found += measured("recall", bench.corpora[0].name, way.name, lines_back, figures)
    return found


def answered(choices: torch.Tensor, ids: torch.Tensor, answers: Sequence[Answer]) -> list[bool]:
    """Return which answers were given to the last token, from the first `choices` after each of the `ids` [tokens]."""
    return [all(int(choices[place - 1]) == int(ids[place]) for place in one.places) for one in answers]


def example(lines: Lines) -> str:
    """Return the first fact and its question; of the lines between only their number, since they are the corpus's."""
    first = lines.questions[0]
    start = lines.text.rfind("\n", 0, first.fact_end) + 1
    asked = lines.text.rfind("\n", 0, first.start) + 1
    between = f"... {first.lines_back} line{'s' if first.lines_back > 1 else ''} of the text ..."
    return f"{lines.text[start : first.fact_end]}.\n{between}\n{lines.text[asked : first.end]}."
