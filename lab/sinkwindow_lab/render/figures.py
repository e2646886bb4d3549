"""Pictures of the studies: pure functions of their records, each returning an `svg` element."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from sinkwindow_lab.render.canvas import COLOURS, GREY, INK, MARKERS, Canvas, canvas, nice_ticks
from sinkwindow_lab.reports.study_records import (
    AlongStudy,
    RecallStudy,
    ScoreStudy,
    StepsRecord,
    StepsStudy,
    WhereStudy,
)


def mistakes(study: ScoreStudy) -> str:
    """Draw the PPL of every row, a mark per text."""
    names = [one.name for one in study.configurations]
    with canvas("mistakes", "Perplexity of right and wrong rules", 0.6 + 0.3 * len(names)) as one:
        for number, corpus in enumerate(_corpora(study)):
            found = [study.score(name, corpus) for name in names]
            values = [math.nan if score is None else score.perplexity for score in found]
            one.axes.plot(values, range(len(names)), MARKERS[number], color=COLOURS[number], label=corpus)
        one.axes.set_yticks(range(len(names)), names)
        one.axes.invert_yaxis()
        one.axes.grid(axis="y", color=GREY, alpha=0.3, linewidth=0.5)
        one.log_ticks("x", nice_ticks([score.perplexity for score in study.scores]))
        one.axes.set_xlabel("PPL (logarithmic)")
        one.legend()
    return one.svg


def sinks(study: ScoreStudy) -> str:
    """Draw PPL against the number of sinks, with the dense model as a horizontal line."""
    rows = [(one.name, one.num_sinks or 0) for one in study.configurations if one.window is not None]
    return _against(study, rows, ("sinks", "Perplexity against the number of sinks", "sinks S"), logarithmic=False)


def sizes(study: ScoreStudy) -> str:
    """Draw PPL against the size of the cache, with the dense model as a horizontal line."""
    rows = [(one.name, one.window + (one.num_sinks or 0)) for one in study.configurations if one.window is not None]
    return _against(study, rows, ("sizes", "Perplexity against the size of the cache", "cache S + W (tokens)"))


def along(study: AlongStudy) -> str:
    """Draw the PPL of consecutive parts of a text."""
    with canvas("along", "Perplexity along a text") as one:
        for number, curve in enumerate(study.curves):
            places = [(index + 0.5) * study.bin_tokens for index in range(len(curve.mean_nll))]
            values = [math.exp(loss) for loss in curve.mean_nll]
            one.axes.plot(places, values, color=COLOURS[number], label=curve.configuration)
        _trained(one, study)
        one.log_ticks("y", nice_ticks([math.exp(loss) for curve in study.curves for loss in curve.mean_nll]))
        one.axes.set_xlim(0, study.tokens)
        one.labels("tokens read", f"PPL of {study.bin_tokens} tokens")
        one.legend(1)
    return one.svg


def step_time(study: StepsStudy) -> str:
    """Draw time per token against tokens streamed."""
    with canvas("step-time", "Time per token against tokens streamed") as one:
        _lines(one, study.along, lambda step: step.milliseconds, "ms per token", times=True)
    return one.svg


def step_memory(study: StepsStudy) -> str:
    """Draw bytes of keys and values against tokens streamed."""
    with canvas("step-memory", "Cache memory against tokens streamed") as one:
        _lines(one, study.along, lambda step: step.cache_bytes / 1e6, "keys and values (MB)", times=False)
    return one.svg


def step_sizes(study: StepsStudy) -> str:
    """Draw time per token against the size of the cache, for streaming and re-computation."""
    with canvas("step-sizes", "Time per token against the size of the cache") as one:
        for number, kind in enumerate(("streaming", "recompute")):
            found = [step for step in study.sizes if step.kind == kind]
            places = [step.cache_tokens or 0 for step in found]
            times = [step.milliseconds for step in found]
            one.axes.plot(places, times, marker=MARKERS[number], color=COLOURS[number], label=kind)
        one.log_ticks("x", sorted({step.cache_tokens or 0 for step in study.sizes}))
        one.log_ticks("y", nice_ticks([step.milliseconds for step in study.sizes]))
        one.labels("cache S + W, or window (tokens)", "ms per token (logarithmic)")
        one.legend()
    return one.svg


def where(study: WhereStudy) -> str:
    """Draw the difference of the loss to the dense one, by distance to the last occurrence of the 4-gram."""
    names = list(dict.fromkeys(distance_name(cell.nearest, cell.farthest) for one in study.curves for cell in one.bins))
    corpora = list(dict.fromkeys(one.corpus for one in study.curves))
    rules = list(dict.fromkeys(one.configuration for one in study.curves))
    with canvas("where", "Where the loss sits") as one:
        for number, curve in enumerate(study.curves):
            shift = 0.16 * (number - (len(study.curves) - 1) / 2)
            one.axes.errorbar(
                [names.index(distance_name(cell.nearest, cell.farthest)) + shift for cell in curve.bins],
                [cell.mean_difference for cell in curve.bins],
                yerr=[cell.standard_error for cell in curve.bins],
                fmt=MARKERS[rules.index(curve.configuration)],
                color=COLOURS[corpora.index(curve.corpus)],
                linewidth=1,
                label=f"{curve.configuration}, {curve.corpus}",
            )
        one.axes.axhline(0, color=GREY, linewidth=0.8)
        one.axes.set_xticks(range(len(names)), names)
        one.labels("tokens since the same 4-gram", "NLL minus dense")
        one.legend(1)
    return one.svg


def recall(study: RecallStudy) -> str:
    """Draw the share of questions answered, by distance."""
    with canvas("recall", "Questions answered by distance to the fact") as one:
        for number, rule in enumerate(study.configurations):
            found = [point for point in study.points if point.configuration == rule.name]
            places = [(point.nearest_tokens + point.farthest_tokens) / 2 for point in found]
            shares = [100 * point.share for point in found]
            one.axes.plot(places, shares, marker=MARKERS[number], color=COLOURS[number], label=rule.name)
            if rule.window is not None:
                one.axes.axvline(rule.window, color=COLOURS[number], linewidth=0.8, linestyle=":")
        one.axes.set_ylim(-3, 103)
        one.labels("tokens from fact to question (dotted: window)", "answered (%)")
        one.legend(1)
    return one.svg


def distance_name(nearest: int | None, farthest: int | None) -> str:
    """Return the label of a bin of distances."""
    if nearest is None:
        return "never"
    return f"> {nearest - 1:,}" if farthest is None else f"{nearest:,}-{farthest:,}"


def _corpora(study: ScoreStudy) -> list[str]:
    return list(dict.fromkeys(score.corpus for score in study.scores))


def _against(
    study: ScoreStudy, rows: Sequence[tuple[str, int]], words: tuple[str, str, str], *, logarithmic: bool = True
) -> str:
    """Draw PPL against a number, a line per text, with the dense PPL as a dashed horizontal line."""
    name, title, below = words
    places = [value for _, value in rows]
    with canvas(name, title) as one:
        for number, corpus in enumerate(_corpora(study)):
            found = [study.score(row, corpus) for row, _ in rows]
            values = [math.nan if score is None else score.perplexity for score in found]
            spots = places if logarithmic else range(len(places))
            one.axes.plot(spots, values, marker=MARKERS[number], color=COLOURS[number], label=corpus)
            dense = study.score("baseline", corpus)
            if dense is not None:
                label = f"{corpus}, dense"
                one.axes.axhline(dense.perplexity, color=COLOURS[number], linewidth=1, linestyle="--", label=label)
        if logarithmic:
            one.log_ticks("x", places)
        else:
            one.axes.set_xticks(range(len(places)), [str(value) for value in places])
        one.log_ticks("y", nice_ticks([score.perplexity for score in study.scores]))
        one.labels(below, "PPL (logarithmic)")
        one.legend()
    return one.svg


def _trained(one: Canvas, study: AlongStudy) -> None:
    """Mark the length that the model was trained on if the text is longer."""
    if study.trained_length is None or study.trained_length >= study.tokens:
        return
    one.axes.axvline(study.trained_length, color=GREY, linewidth=0.8, linestyle="--")
    top = one.axes.get_xaxis_transform()
    one.axes.text(study.trained_length, 1.0, " trained length", transform=top, va="top", fontsize=8, color=INK)


def _lines(
    one: Canvas, records: Sequence[StepsRecord], value: Callable[[StepsRecord], float], label: str, *, times: bool
) -> None:
    """Draw a line per configuration against tokens seen."""
    for number, name in enumerate(dict.fromkeys(step.configuration for step in records)):
        found = [step for step in records if step.configuration == name]
        places = [step.tokens_seen for step in found]
        one.axes.plot(
            places, [value(step) for step in found], marker=MARKERS[number], color=COLOURS[number], label=name
        )
    one.log_ticks("x", sorted({step.tokens_seen for step in records}))
    if times:
        one.log_ticks("y", nice_ticks([value(step) for step in records]))
    one.labels("tokens streamed", f"{label} (logarithmic)" if times else label)
    one.legend(1)
