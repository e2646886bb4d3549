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
from sinkwindow_lab.records import Record
from sinkwindow_lab.reports.bench import Bench, described, digest_of
from sinkwindow_lab.reports.studies.lines import Answer, Lines, in_tokens, make_lines
from sinkwindow_lab.reports.study_records import RecallPoint, RecallStudy
from sinkwindow_lab.store import code_version
from sinkwindow_lab.ways.configurations import Configuration, parse
from sinkwindow_lab.ways.sessions import open_session

CODE = ("ways.sessions", "ways.configurations", "reports.studies.recall", "reports.studies.lines")


class Hits(Record):
    """For each question of a text whether it was answered."""

    found: list[bool]


@dataclass(frozen=True)
class _Page:
    """A text in tokens."""

    lines: Lines
    ids: torch.Tensor
    answers: list[Answer]


def recall(bench: Bench, names: Sequence[str], seeds: Sequence[int], distances: Sequence[int]) -> RecallStudy:
    """Ask each configuration all questions of several texts; return the answers by distance.

    The first text of the bench gives the ordinary lines; `distances` count those between a fact and its question.

    Raises:
        LabError: if the text has too few lines, or the tokenizer has no offsets.
    """
    corpus = bench.corpora[0]
    filler = [line.strip() for line in corpus.text.splitlines() if line.strip()]
    pages = [_page(bench, make_lines(filler, distances, seed=seed)) for seed in seeds]
    rows = [parse(name) for name in names]
    points = [point for row in rows for point in _points(row, pages, [_hits(bench, row, page) for page in pages])]
    return RecallStudy(
        seeds=list(seeds),
        corpus=corpus.name,
        tokens=sum(page.ids.shape[1] for page in pages),
        example=_example(pages[0].lines),
        configurations=[row.record() for row in rows],
        points=points,
    )


def _page(bench: Bench, lines: Lines) -> _Page:
    ids, answers = in_tokens(lines, bench.loaded.tokenizer)
    return _Page(lines, torch.tensor([ids]), answers)


def _hits(bench: Bench, row: Configuration, page: _Page) -> list[bool]:
    bench.reporter.begin(f"recall: {row.name}", page.ids.shape[1])
    key = {**bench.origin, **described(row), "text": digest_of(page.ids), "code": code_version(*CODE)}
    return bench.store.record(f"recall-{row.name}", key, Hits, lambda: _ask(bench, row, page)).found


def _ask(bench: Bench, row: Configuration, page: _Page) -> Hits:
    session = open_session(row, bench.loaded.model)
    choices = []
    try:
        for piece in torch.split(page.ids.to(bench.loaded.model.device), BLOCK, dim=1):
            choices.append(session.feed(piece)[0].argmax(dim=-1).cpu())
            bench.reporter.advance(piece.shape[1])
    finally:
        session.close()
    return Hits(found=answered(torch.cat(choices), page.ids[0], page.answers))


def answered(choices: torch.Tensor, ids: torch.Tensor, answers: Sequence[Answer]) -> list[bool]:
    """Return for each answer whether it was given to the last token.

    `choices` [tokens] are the model's first choices after each token of the text, `ids` [tokens].
    """
    return [all(int(choices[place - 1]) == int(ids[place]) for place in one.places) for one in answers]


def _points(row: Configuration, pages: Sequence[_Page], hits: Sequence[Sequence[bool]]) -> list[RecallPoint]:
    """Group the answers by distance, near ones first."""
    pairs = [pair for page, own in zip(pages, hits, strict=True) for pair in zip(page.answers, own, strict=True)]
    points = []
    for lines_back in sorted({answer.lines_back for answer, _ in pairs}):
        group = [(answer, hit) for answer, hit in pairs if answer.lines_back == lines_back]
        points.append(
            RecallPoint(
                configuration=row.name,
                lines_back=lines_back,
                nearest_tokens=min(answer.tokens_back for answer, _ in group),
                farthest_tokens=max(answer.tokens_back for answer, _ in group),
                asked=len(group),
                found=sum(hit for _, hit in group),
            )
        )
    return points


def _example(lines: Lines) -> str:
    """Return the first fact and its question; of the lines between only their number, since they are the corpus's."""
    first = lines.questions[0]
    start = lines.text.rfind("\n", 0, first.fact_end) + 1
    asked = lines.text.rfind("\n", 0, first.start) + 1
    between = f"... {first.lines_back} line{'s' if first.lines_back > 1 else ''} of the text ..."
    return f"{lines.text[start : first.fact_end]}.\n{between}\n{lines.text[asked : first.end]}."
