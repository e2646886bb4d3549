"""Ranks that die, hang, fail or never start are named by those that live; one that ends tells so."""

from __future__ import annotations

import importlib
import json
import os
import time
from typing import TYPE_CHECKING, Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined] # as torch documents it

from sinkwindow_lab import pulse, ranks
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.pulse import Pulse
from sinkwindow_lab.ranks import Group

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """Return a function that lets rank 0 watch a rank with this beat; it returns what rank 0 prints before it ends."""
    monkeypatch.setattr(pulse, "TICK", 0.02)
    ended, made = list[int](), list[Pulse]()
    monkeypatch.setattr(os, "_exit", ended.append)

    def watch(patience: float = 30.0, until: Callable[[], bool] = lambda: bool(ended), **beat: Any) -> str:
        board = HashStore()
        usual = {"host": "far", "pid": 7, "doing": "PPL x", "beat": 1, "steps": 0, "total": 9}
        board.set("beat/1", json.dumps({**usual, "idle": 0.0, "stuck": 0.0, "end": None, **beat}))
        if beat.get("beat") == 0:
            board.delete_key("beat/1")
        made.append(Pulse(board, 0, 2, patience))
        made[0].doing("watching")
        made[0].wait(until)
        made[0].close()
        (line,) = capfd.readouterr().err.splitlines()
        return line

    yield watch
    made[0].close()


GONE = "was not heard for 1 s: it is dead or stopped; the same command continues"


@pytest.mark.parametrize(
    ("beat", "words"),
    [
        ({"patience": 1.0}, GONE),
        ({"patience": 1.0, "end": "terminated"}, GONE),  # with its machine, whose launcher is gone, too
        # It beats, since its thread lives, but its work does nothing.
        ({"idle": 31.0}, "hangs: it has done nothing for 31 s; the same command continues"),
        ({"end": "no space left"}, "failed: no space left"),
    ],
    ids=["silent", "terminated alone", "idle", "failed"],
)
def test_a_rank_that_ends_a_run_is_named(beat: dict[str, Any], words: str, told: Callable[..., str]) -> None:
    """By host, process and unit, once, with what it did or said last."""
    assert told(**beat) == f"error: rank 1 (host far, pid 7), at 'PPL x', {words}"


@pytest.mark.parametrize(
    ("beat", "words"),
    [
        # It may wait for a download.
        ({"doing": "starting", "idle": 31.0, "total": 0}, "at 'starting', has done nothing for 31 s"),
        # A call may take longer than a minute, which nobody can tell from one that never ends.
        ({"stuck": 31.0}, "at 'PPL x', computes, but made no step for 31 s"),
    ],
    ids=["waits while it loads", "slow"],
)
def test_a_rank_that_may_go_on_is_named(beat: dict[str, Any], words: str, told: Callable[..., str]) -> None:
    """In a warning: the run does not end."""
    ends = time.monotonic() + 1.0
    assert told(**beat, until=lambda: time.monotonic() > ends) == f"warning: rank 1 (host far, pid 7), {words}"


def test_a_rank_that_never_starts_is_named(told: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """After a longer time than one that was heard: imports take a while."""
    monkeypatch.setattr(pulse, "STARTING", 1.0)
    begun = time.monotonic()
    assert "error: rank 1 did not start within 1 s" in told(beat=0, patience=0.2)
    assert time.monotonic() - begun > 1.0


def test_a_rank_that_is_idle_while_it_loads_tells_so() -> None:
    """Though it has no steps yet."""
    one = Pulse(HashStore(), 0, 1, 30.0)
    try:
        one._used, one._last = lambda: 0.0, (0, 0.0)
        one._moved = one._worked = one._moved - 20.0
        one._measure()
        assert one._mine["idle"] > 19.0
        one.doing("waiting")
        one._measure()
        assert one._mine["idle"] == 0.0
    finally:
        one.close()


# -- started again, and ended -----------------------------------------------------------------------------------------


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rank 1 of two find a store."""
    monkeypatch.setattr(pulse, "TICK", 0.02)
    board = HashStore()
    module = importlib.import_module("torch.distributed.rendezvous")  # `torch.distributed` has a function of this name
    monkeypatch.setattr(module, "rendezvous", lambda *_, **__: iter([(board, 0, 2)]))
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("met")
def test_ranks_that_are_started_again_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their launcher has kept what the first ones wrote; if it does not count the starts, they are refused."""
    first = Group.meet(1, 2, 30.0)
    first._board.add("taken", 5)
    first.pulse.close()
    with pytest.raises(LabError, match=r"rank 1 cannot meet .* started again"), ranks.joined(["perplexity"]):
        pass
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    second = Group.meet(1, 2, 30.0)
    second.pulse.close()
    assert second._board.add("taken", 0) == 0


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.usefixtures("met")
def test_an_interrupted_rank_tells_no_more(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread ends, so that nothing is printed later."""
    monkeypatch.setenv("RANK", rank)
    joined = list[Group | None]()

    def interrupt() -> None:
        joined.append(ranks.current())
        raise SystemExit(130)

    with pytest.raises(SystemExit, match="130"), ranks.joined(["perplexity"]):
        interrupt()
    (one,) = joined
    assert one is not None
    assert not one.pulse._thread.is_alive()
    assert json.loads(one._board.get(f"beat/{rank}"))["end"] == "terminated"
