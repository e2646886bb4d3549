"""Numbers that cannot be right, or are not what was asked for, in words: a page and the terminal say so."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sinkwindow_lab.records import Measurement, ModelRecord, TextRecord

NAMED = 3  # missing weights that are named


def doubts(
    models: Sequence[ModelRecord], texts: Sequence[TextRecord], measurements: Sequence[Measurement] = ()
) -> list[str]:
    """Return what is doubtful in what was measured, a sentence each."""
    found = [
        f"model {one.name!r} lacks {len(one.missing_weights)} weights in its files, which have random values, so that "
        f"no PPL of it means anything: {', '.join(one.missing_weights[:NAMED])}"
        + (", ..." if len(one.missing_weights) > NAMED else "")
        for one in models
        if one.missing_weights
    ]
    found += [
        f"corpus {one.corpus!r} has {one.tokens} tokens, {one.requested} were requested: fewer were read"
        for one in texts
        if one.requested is not None and one.tokens < one.requested
    ]
    words = {one.corpus: one.tokenizer.vocabulary for one in texts if one.tokenizer}
    found += [
        f"PPL {one.median:.4g} of {one.configuration} on {one.subject!r} is above the size of the vocabulary, "
        f"{words[one.subject]}, the PPL of guessing: model, dtype or tokenizer do not fit"
        for one in measurements
        if one.metric == "PPL" and not one.median <= words.get(one.subject, math.inf)
    ]
    return found
