"""Recall: facts inside the window are found, evicted ones are not.

The right answer is fed after every question, as StreamEval does. An answer counts if each of its tokens was the model's
first choice: exactly when greedy decoding would have given it to the last digit. So one pass over the text in long
calls asks all questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sinkwindow_lab.measure.perplexity import BLOCK
from sinkwindow_lab.records import Measurement, measured
from sinkwindow_lab.reports.tables.bench import Bench
from sinkwindow_lab.reports.tables.lines import Answer, Lines, in_tokens, make_lines
from sinkwindow_lab.ways.configurations import Configuration, open_session


@dataclass(frozen=True)
class Page:
    """A text with facts and questions, its tokens [1, tokens], and the places of the answers."""

    lines: Lines
    ids: torch.Tensor
    answers: list[Answer]


def pages(bench: Bench, seeds: Sequence[int], distances: Sequence[int]) -> list[Page]:
    """Make a text per seed; the first text of the bench gives the ordinary lines.

    `distances` count those between a fact and its question.

    Raises:
        LabError: If the text has too few lines, or the tokenizer has no offsets.
    """
    filler = [line.strip() for line in bench.corpora[0].text.splitlines() if line.strip()]
    made = [make_lines(filler, distances, seed=seed) for seed in seeds]
    tokens = [in_tokens(one, bench.loaded.tokenizer) for one in made]
    return [Page(one, torch.tensor([ids]), answers) for one, (ids, answers) in zip(made, tokens, strict=True)]


def ask(bench: Bench, way: Configuration, asked: Sequence[Page]) -> list[Measurement]:
    """Ask all questions of the pages; return by distance which were answered, and how many tokens ago the fact was."""
    hits: dict[int, list[tuple[float, float]]] = {}
    for page in asked:
        session, choices = open_session(way, bench.loaded.model), []
        try:
            for piece in torch.split(page.ids.to(bench.loaded.model.device), BLOCK, dim=1):
                choices.append(session.feed(piece)[0].argmax(dim=-1).cpu())
                bench.reporter.advance(piece.shape[1])
        finally:
            session.close()
        for answer, hit in zip(page.answers, answered(torch.cat(choices), page.ids[0], page.answers), strict=True):
            hits.setdefault(answer.lines_back, []).append((float(hit), float(answer.tokens_back)))
    found = []
    for lines_back in sorted(hits):
        right, tokens_back = zip(*hits[lines_back], strict=True)
        figures = {"answered": ("", right), "tokens back": ("tokens", tokens_back)}
        found += measured("recall", bench.corpora[0].name, way.name, lines_back, figures)
    return found


def answered(choices: torch.Tensor, ids: torch.Tensor, answers: Sequence[Answer]) -> list[bool]:
    """Return for each answer whether it was given to the last token.

    `choices` [tokens] are the model's first choices after each token of the text, `ids` [tokens].
    """
    return [all(int(choices[place - 1]) == int(ids[place]) for place in one.places) for one in answers]


def example(lines: Lines) -> str:
    """Return the first fact and its question; of the lines between only their number, since they are the corpus's."""
    first = lines.questions[0]
    start = lines.text.rfind("\n", 0, first.fact_end) + 1
    asked = lines.text.rfind("\n", 0, first.start) + 1
    between = f"... {first.lines_back} line{'s' if first.lines_back > 1 else ''} of the text ..."
    return f"{lines.text[start : first.fact_end]}.\n{between}\n{lines.text[asked : first.end]}."
