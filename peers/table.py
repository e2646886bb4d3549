"""The table and the targets (bars), as pure functions of the measurements."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, Final

from peers.plan import PEERS
from sinkwindow_lab.render.page import markdown_table

SUBJECT: Final = "ours"
BASE: Final = "dynamic"
BARS: Final = (("attention_sinks", 0.60), ("sink_cache", 0.75))
BAR_LIMIT: Final = 2048  # the cache size of the targets [tokens]
SAME: Final = 1e-3  # largest difference of equal logits: float32 rounding gives about 1e-4
NOTHING: Final = "-"
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


def median(row: dict[str, Any], name: str) -> float | None:
    """Return the median of a row's samples [ms], None if there are none."""
    samples = row["answers"].get(name, {}).get("result", {}).get("ms")
    return statistics.median(samples) if samples else None


def ratio(record: dict[str, Any], key: str, base: str, limit: int) -> float | None:
    """Return the median TPOT of one peer over another's at the same limit [1]; None if a side is missing."""
    rows = {row["key"]: row for row in record["peers"]}
    sides = [median(rows[name], f"steps {limit}") if name in rows else None for name in (key, base)]
    return None if sides[0] is None or not sides[1] else sides[0] / sides[1]


def verdicts(record: dict[str, Any]) -> list[Verdict]:
    """Return a verdict for each target."""
    return [Verdict(peer, most, ratio(record, SUBJECT, peer, BAR_LIMIT)) for peer, most in BARS]


def markdown(record: dict[str, Any]) -> str:
    """Return the whole table with its notes.

    Args:
        record: as in results/peers.json.

    Returns:
        Markdown.
    """
    notes = Notes()
    limits = [sum(size) for size in record["plan"]["speed"]]
    rows = [cells(record, row, limits, notes) for row in record["peers"]]
    header = titles(record, limits)
    lines = [head(record), "", markdown_table(header, rows), ""]
    lines += [bars(record)]
    lines += ["", explanations(record), "", *notes.lines(), "", *environments(record)]
    return "\n".join(lines).strip() + "\n"


def bars(record: dict[str, Any]) -> str:
    """Return each target with the result of this run.

    Args:
        record: as in results/peers.json.

    Returns:
        Markdown bullets.
    """
    return "\n".join(f"- {one}." for one in verdicts(record))


class Notes:
    """Reasons for empty cells, numbered in the order of first use."""

    def __init__(self) -> None:
        """Start without notes."""
        self._found: dict[str, int] = {}

    def mark(self, text: str) -> str:
        """Return a dash with the number of its reason."""
        return f"{NOTHING} [{self._found.setdefault(text, len(self._found) + 1)}]"

    def lines(self) -> list[str]:
        """Return the reasons."""
        return [f"[{number}] {text}  " for text, number in self._found.items()]


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


def cells(record: dict[str, Any], row: dict[str, Any], limits: list[int], notes: Notes) -> list[str]:
    """Return one row; if the peer did not run, the first cell has the reason."""
    title = TITLES[row["key"]]
    if row["failure"]:
        return [f"{title} {notes.mark(row['failure'])}", *[NOTHING] * (len(titles(record, limits)) - 1)]
    speed = [cell for limit in limits for cell in speed_cells(record, row, limit, notes)]
    filled = f"fill {limits[-1]}"
    return [
        title,
        *speed,
        shown(row, filled, lambda one: f"{one['cache_bytes'] / 1e6:.1f}", notes),
        shown(row, filled, lambda one: f"{(record['weight_bytes'] + one['growth_bytes']) / 1e9:.2f}", notes),
        shown(row, "perplexity", lambda one: f"{one['perplexity']:.3f}", notes),
        shown(row, "prompt", lambda one: longest(record, one), notes),
        shown(row, "batch", lambda one: same(one["difference"]), notes),
        shown(row, "chunks", lambda one: same(one["difference"]), notes),
    ]


def speed_cells(record: dict[str, Any], row: dict[str, Any], limit: int, notes: Notes) -> list[str]:
    """Return TPOT, both ratios and the attention time at one limit."""
    steps, attention = median(row, f"steps {limit}"), median(row, f"attention {limit}")
    if steps is None:
        why = row["answers"].get(f"steps {limit}") or row["answers"].get(f"fill {limit}") or {}
        return [notes.mark(reason(why)), NOTHING, NOTHING, NOTHING]
    ratios = [ratio(record, row["key"], base, limit) for base in (BASE, SUBJECT)]
    last = shown(row, f"attention {limit}", lambda _: f"{attention:.1f}", notes)
    return [f"{steps:.1f}", *(NOTHING if one is None else f"{one:.2f}" for one in ratios), last]


def shown(row: dict[str, Any], name: str, write: Any, notes: Notes) -> str:
    """Return a cell for an answer, or a dash with the reason."""
    answer = row["answers"].get(name, {})
    return str(write(answer["result"])) if "result" in answer else notes.mark(reason(answer))


def reason(answer: dict[str, Any]) -> str:
    """Return why there is no result."""
    if "refused" in answer:
        return str(answer["refused"])
    return f"failed: {answer['error']}" if "error" in answer else "not measured"


def same(difference: float) -> str:
    """Return yes or no, with the largest difference of logits."""
    return f"{'yes' if difference <= SAME else 'no'} ({difference:.1e})"


def longest(record: dict[str, Any], answer: dict[str, Any]) -> str:
    """Return the tokens of the longest prompt, and whether it was the longest that was tried."""
    most = max(record["plan"]["multiples"])
    return f"{answer['tokens']:,} ({answer['multiple']}x{', the most tried' if answer['multiple'] == most else ''})"


def head(record: dict[str, Any]) -> str:
    """Return what ran, where and when."""
    machine, plan = record["machine"], record["plan"]
    commit = (machine["commit"] or "no checkout")[:8] + (" with changes" if machine["dirty"] else "")
    quick = " with `--quick`" if record["quick"] else ""
    return (
        f"Written by `nox -s peers`{quick} at commit {commit}, {machine['date']}, {machine['cpu']}, "
        f"{record['threads']} threads, {record['model']} in float32, text: {record['corpus']}. "
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


def environments(record: dict[str, Any]) -> list[str]:
    """Return the versions in each environment."""
    rows = [row for row in record["peers"] if row["versions"]]
    return [f"- {TITLES[row['key']]}: {', '.join(f'{k} {v}' for k, v in row['versions'].items())}" for row in rows]
