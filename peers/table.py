"""The table and the targets, as pure functions of the measurements."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from peers.plan import LEFT_OUT, PEERS
from sinkwindow_lab.render.markdown import NOT_MEASURED, bullets, join, name, table

if TYPE_CHECKING:
    from collections.abc import Callable

SUBJECT: Final = "ours"
BASE: Final = "dynamic"
BARS: Final = (("attention_sinks", 0.60), ("sink_cache", 0.75))
BAR_LIMIT: Final = 2048  # the cache size of the targets [tokens]
SAME: Final = 1e-3  # largest difference of equal logits: float32 rounding gives about 1e-4
TITLES: Final = {peer.key: peer.title for peer in PEERS}


@dataclass(frozen=True)
class Verdict:
    """A target for a ratio of times, and the measured ratio, None if a side was not measured."""

    peer: str
    most: float
    ratio: float | None

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        return self.ratio is not None and self.ratio <= self.most

    def __str__(self) -> str:
        """Return the target and the result in one line."""
        bar = f"TPOT over {TITLES[self.peer]} at {BAR_LIMIT:,} tokens: at most {self.most:.2f}"
        found = "not measured" if self.ratio is None else f"{self.ratio:.2f}"
        return f"{bar}; this run: {found}, {'met' if self.met else 'MISSED'}"


def median(row: dict[str, Any], what: str) -> float | None:
    """Return the median of a row's samples [ms], None if there are none."""
    samples = row["answers"].get(what, {}).get("result", {}).get("ms")
    return statistics.median(samples) if samples else None


def ratio(record: dict[str, Any], key: str, base: str, limit: int) -> float | None:
    """Return the median TPOT of one peer over another's at the same limit [1]; None if a side is missing."""
    rows = {row["key"]: row for row in record["peers"]}
    sides = [median(rows[one], f"steps {limit}") if one in rows else None for one in (key, base)]
    return None if sides[0] is None or not sides[1] else sides[0] / sides[1]


def verdicts(record: dict[str, Any]) -> list[Verdict]:
    """Return a verdict for each target."""
    return [Verdict(peer, most, ratio(record, SUBJECT, peer, BAR_LIMIT)) for peer, most in BARS]


def bars(record: dict[str, Any]) -> str:
    """Return each target with the result of this run, as Markdown."""
    return bullets([f"{one}." for one in verdicts(record)])


def markdown(record: dict[str, Any]) -> str:
    """Return the whole table with its notes, as Markdown, from a record as in results/peers.json."""
    notes: list[str] = []  # reasons for empty cells, numbered in the order of first use
    limits = [sum(size) for size in record["plan"]["speed"]]
    header = titles(record, limits)
    rows = [cells(record, row, limits, notes, len(header)) for row in record["peers"]]
    reasons = bullets([f"[{number}] {name(text)}" for number, text in enumerate(notes, 1)])
    versions = [
        f"{TITLES[row['key']]}: {name(', '.join(map(' '.join, row['versions'].items())))}"
        for row in record["peers"]
        if row["versions"]
    ]
    return join([head(record), table(header, rows), bars(record), explanations(record), reasons, bullets(versions)])


def titles(record: dict[str, Any], limits: list[int]) -> list[str]:
    """Return the titles of the columns."""
    speed = [
        f"{what} {limit:,}"
        for limit in limits
        for what in ("TPOT (ms) at", "over DynamicCache at", "over ours at", "Attn (ms) at")
    ]
    sinks, window, tokens = record["plan"]["scored"]
    more = [f"PPL, {tokens:,} tokens, {sinks}+{window}", "Longest prompt in one call", "Batch invariant"]
    return ["Peer", *speed, "Cache (MB)", "Peak Mem (GB)", *more, "Chunk invariant"]


def cells(record: dict[str, Any], row: dict[str, Any], limits: list[int], notes: list[str], count: int) -> list[str]:
    """Return one row; if the peer did not run, the first cell has the reason."""
    title = TITLES[row["key"]]
    if row["failure"]:
        return [f"{title} {mark(row['failure'], notes)}", *[NOT_MEASURED] * (count - 1)]

    def shown(what: str, write: Callable[[Any], str]) -> str:
        answer = row["answers"].get(what, {})
        return write(answer["result"]) if "result" in answer else mark(reason(answer), notes)

    def same(answer: dict[str, float]) -> str:
        return f"{'yes' if answer['difference'] <= SAME else 'no'} ({answer['difference']:.1e})"

    def longest(answer: dict[str, int]) -> str:
        most = ", the most tried" if answer["multiple"] == max(record["plan"]["multiples"]) else ""
        return f"{answer['tokens']:,} ({answer['multiple']}x{most})"

    filled, weights = f"fill {limits[-1]}", record["weight_bytes"]
    return [
        title,
        *(cell for limit in limits for cell in speed_cells(record, row, limit, notes)),
        shown(filled, lambda one: f"{one['cache_bytes'] / 1e6:.1f}"),
        shown(filled, lambda one: f"{(weights + one['growth_bytes']) / 1e9:.2f}"),
        shown("perplexity", lambda one: f"{one['perplexity']:.3f}"),
        shown("prompt", longest),
        shown("batch", same),
        shown("chunks", same),
    ]


def speed_cells(record: dict[str, Any], row: dict[str, Any], limit: int, notes: list[str]) -> list[str]:
    """Return TPOT, both ratios and the attention time at one limit."""
    answers, steps, attention = row["answers"], median(row, f"steps {limit}"), median(row, f"attention {limit}")
    if steps is None:
        why = answers.get(f"steps {limit}") or answers.get(f"fill {limit}") or {}
        return [mark(reason(why), notes), *[NOT_MEASURED] * 3]
    ratios = [ratio(record, row["key"], base, limit) for base in (BASE, SUBJECT)]
    why = answers.get(f"attention {limit}", {})
    last = mark(reason(why), notes) if attention is None else f"{attention:.1f}"
    return [f"{steps:.1f}", *(NOT_MEASURED if one is None else f"{one:.2f}" for one in ratios), last]


def mark(text: str, notes: list[str]) -> str:
    """Return a dash with the number of its reason."""
    if text not in notes:
        notes.append(text)
    return f"{NOT_MEASURED} [{notes.index(text) + 1}]"


def reason(answer: dict[str, Any]) -> str:
    """Return why there is no result."""
    if "refused" in answer:
        return str(answer["refused"])
    return f"failed: {answer['error']}" if "error" in answer else "not measured"


def failures(record: dict[str, Any]) -> list[str]:
    """Return which peers failed, at what and why; what a peer refuses or lacks by design is no failure."""
    found = [f"{row['key']}: {row['failure']}" for row in record["peers"] if row["failure"] not in (None, LEFT_OUT)]
    answers = [(row["key"], name, answer) for row in record["peers"] for name, answer in row["answers"].items()]
    return found + [f"{key}, {name}: {answer['error']}" for key, name, answer in answers if "error" in answer]


def head(record: dict[str, Any]) -> str:
    """Return what ran, where and when."""
    machine, plan = record["machine"], record["plan"]
    commit = (machine["commit"] or "no checkout")[:8] + (" with changes" if machine["dirty"] else "")
    quick = " with `--quick`" if record["quick"] else ""
    what = f"{machine['cpu']}, {record['threads']} threads, {record['model']} in float32, text: {record['corpus']}"
    return (
        f"Written by `nox -s peers`{quick} at commit {commit}, {machine['date']}, {name(what)}. "
        f"{plan['rounds']} interleaved rounds, {plan['steps']} timed steps each; medians."
    )


def explanations(record: dict[str, Any]) -> str:
    """Return the explanation of the columns."""
    sinks, window = record["plan"]["prompt"]
    last = sum(record["plan"]["speed"][-1])
    return (
        f'"at N": N tokens kept, with S=4 and W=N-4. Cache and peak memory: at {last:,} tokens, filled in calls of 256 '
        "tokens if the peer allows it; the peak is the weights plus the growth of the process. Attn: time in the "
        "attention modules without their projections, and in cache work elsewhere, for all layers of one token. "
        f"Longest prompt: cache {sinks}+{window}; all logits of the prompt and of three tokens after it are finite. "
        "The last column shows whether they are correct. Invariant: the largest difference of logits is at most "
        f"{SAME:g}, with a cache of 4+12, over several evictions."
    )
