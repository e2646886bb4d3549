"""The peers, and how much is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Peer:
    """A row of the table.

    Attributes:
        key: of `worker.ADAPTERS`; also the name of its environment, if it has one.
        title: for the table.
        slow: whether it reads token by token or without a cache, so that `--quick` skips it.
    """

    key: str
    title: str
    slow: bool = False


PEERS: Final = (
    Peer("dynamic", "DynamicCache, held at the limit"),
    Peer("static", "StaticCache"),
    Peer("ours", "sinkwindow StreamingCache, buffer 0"),
    Peer("ours_buffered", "sinkwindow StreamingCache, buffer 64"),
    Peer("attention_sinks", "attention_sinks"),
    Peer("sink_cache", "transformers SinkCache"),
    Peer("kvpress", "kvpress StreamingLLMPress in KeyRerotationPress"),
    Peer("index_select", "sinkwindow_reference, index_select loop", slow=True),
    Peer("reference", "sinkwindow_reference, no cache", slow=True),
)
LEFT_OUT: Final = "skipped by --quick"


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        speed: sizes at which steps are timed, (S, W) [tokens].
        rounds: number of rounds; each round measures every peer.
        steps: timed steps of a peer per round.
        attention: steps of a peer per round in which attention is timed.
        scored: cache size and length of the text for perplexity, (S, W, tokens) [tokens].
        prompt: cache size for the longest prompt, (S, W) [tokens].
        multiples: lengths of prompts to try, longest first, in limits.
    """

    speed: tuple[tuple[int, int], ...]
    rounds: int
    steps: int
    attention: int
    scored: tuple[int, int, int]
    prompt: tuple[int, int]
    multiples: tuple[int, ...]

    @property
    def single_steps(self) -> int:
        """Number of single tokens after the cache is filled [tokens]."""
        return self.rounds * (self.steps + self.attention)


FULL: Final = Plan(((4, 1020), (4, 2044)), 5, 20, 3, (4, 1020, 2000), (4, 252), (20, 10, 5, 2, 1))
QUICK: Final = Plan(((4, 2044),), 3, 10, 2, (4, 252, 400), (4, 60), (20, 10, 5, 2, 1))
