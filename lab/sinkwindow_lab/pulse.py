"""Whether the processes of a run are alive: each tells it every second, and one that dies or hangs is named.

They tell it through a key-value store of `torch.distributed`, so they may be on several machines. Rank 0 watches all
others and prints; the others watch rank 0. The launcher ends all ranks by SIGTERM when it sees one of them die, but it
does not know what that one was doing: so the others look for it before they end.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NoReturn

from torch.distributed.distributed_c10d import Store

from sinkwindow_lab.errors import printable

TICK = 1.0  # how often a rank tells that it is alive [s]
STARTING = 300.0  # in which all ranks must have started: imports from a busy disk take minutes [s]
GRACE = 5.0  # after SIGTERM, in which every rank that is alive has told so [s]; launchers kill after 30 s
BUSY = 0.005  # share of one core; a main thread that uses less does nothing
AGENT = "TORCHELASTIC_USE_AGENT_STORE"  # whether the launcher holds the store, not rank 0
LOADING = "starting"  # what a rank does until it has loaded model and text
LEFT, TERMINATED = "left", "terminated"  # how a rank has ended; otherwise by the words of an error
Beat = dict[str, Any]


class Pulse:
    """The beats of one rank, and what it knows of the others."""

    def __init__(self, board: Store, rank: int, size: int, patience: float) -> None:
        """Begin to tell and to watch; a rank that is silent or idle for `patience` seconds ends the run."""
        self._board, self._rank, self._size, self._patience = board, rank, size, patience
        self.show: Callable[[dict[int, Beat]], object] = lambda _: None  # is told of all ranks, in rank 0
        self.again = "the same command continues"  # what a user can do after a death
        self._mine: Beat = {"host": socket.gethostname(), "pid": os.getpid(), "doing": LOADING, "total": 0}
        self._mine |= {"beat": 0, "steps": 0, "idle": 0.0, "stuck": 0.0, "end": None}
        self.beats: dict[int, Beat] = {rank: self._mine}  # the last of each rank
        now = time.monotonic()
        self._heard = dict.fromkeys(range(size), now)  # when each was last heard, by the clock of this rank
        self._moved = self._worked = self._ticked = now
        self._used = _clock_of_this_thread()
        self._last = 0, self._used()
        self._warned: set[tuple[int, str]] = set()
        self._failed: dict[int, float] = {}  # when this rank first heard that another one has failed
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._inbox, self._outbox = socket.socketpair()
        self._outbox.setblocking(False)  # noqa: FBT003 - has no name
        # The thread, not Python's handler, acts on SIGTERM: a handler would wait for the end of a long call of torch.
        self._handler = signal.signal(signal.SIGTERM, lambda *_: None)
        self._wakeup = signal.set_wakeup_fd(self._outbox.fileno(), warn_on_full_buffer=False)
        self._tell()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def doing(self, what: str, total: int = 0) -> None:
        """Tell what this rank begins to do; with a `total` of steps it is expected to advance."""
        self._moved = time.monotonic()
        self._mine |= {"doing": what, "steps": 0, "total": total}
        self._tell()

    def advance(self, steps: int) -> None:
        """Count steps as done."""
        self._moved = time.monotonic()
        self._mine["steps"] += steps

    def name(self, rank: int) -> str:
        """Return a rank in words: its host, its process and what it is doing, as far as it was heard."""
        known = self.beats.get(rank)
        if known is None:
            return f"rank {rank}, which never started,"
        return f"rank {rank} (host {known['host']}, pid {known['pid']}), at {known['doing']!r},"

    def wait(self, ready: Callable[[], bool]) -> None:
        """Wait until something is so; the thread goes on watching."""
        while not ready():
            time.sleep(TICK / 20)

    def all_left(self) -> bool:
        """Return whether all other ranks have left."""
        return all(one == self._rank or self.beats.get(one, {}).get("end") == LEFT for one in range(self._size))

    def close(self, end: str = LEFT) -> None:
        """Tell how this rank has ended, by default that it has done all that it has to, and watch no more."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        self._mine["end"] = self._mine["end"] or end
        with suppress(RuntimeError):  # the store is lost
            self._tell()
        signal.set_wakeup_fd(self._wakeup)
        signal.signal(signal.SIGTERM, self._handler)
        self._inbox.close()
        self._outbox.close()

    def fail(self, words: str) -> None:
        """Tell why this rank, not the first one, cannot go on, and wait for rank 0 to print it and to end."""
        self._mine["end"] = words
        time.sleep(self._patience)

    def _watch(self) -> None:
        try:
            while not self._closed.is_set():
                if self._signalled(TICK):
                    self._look_for_the_dead()
                self._measure()
                self._tell()
                self._hear([0] if self._rank else range(self._size))
                self._check()
                if self._rank == 0:
                    with suppress(OSError):  # nobody reads what is shown
                        self.show(dict(self.beats))
        except RuntimeError as error:  # as torch's stores raise it
            if not self._closed.is_set():
                held = "the launcher" if os.environ.get(AGENT) == "True" else self.name(0)
                self._stop(f"lost {held} which holds the store of all ranks ({str(error).splitlines()[0]})")

    def _signalled(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._inbox], [], [], seconds)
        return bool(ready) and signal.SIGTERM in self._inbox.recv(64)

    def _measure(self) -> None:
        """Note for how long this rank made no step, and for how long it did nothing at all."""
        now, (steps, used) = time.monotonic(), self._last
        self._last = self._mine["steps"], self._used()
        if self._last[1] - used > BUSY * (now - self._ticked) or steps != self._last[0]:
            self._worked = now
        if now - self._ticked > self._patience / 2:  # the whole machine was asleep, or this process was
            self._moved = self._worked = now
            self._heard = dict.fromkeys(self._heard, now)
        self._ticked, at_work = now, self._mine["total"] > 0
        self._mine["stuck"] = now - self._moved if at_work else 0.0
        at_work |= self._mine["doing"] == LOADING
        self._mine["idle"] = now - max(self._moved, self._worked) if at_work else 0.0

    def _tell(self) -> None:
        with self._lock:
            self._mine["beat"] += 1
            self._board.set(f"beat/{self._rank}", json.dumps(self._mine))

    def _hear(self, ranks: Iterable[int]) -> None:
        for rank in ranks:
            key = f"beat/{rank}"
            if rank != self._rank and self._board.check([key]):
                beat = json.loads(self._board.get(key))
                if beat["beat"] != self.beats.get(rank, {}).get("beat"):
                    self.beats[rank], self._heard[rank] = beat, time.monotonic()

    def _check(self) -> None:
        """End the run if a rank is dead, hangs or has failed; rank 0 looks at all of them, the others at rank 0."""
        now = time.monotonic()
        if self._rank:
            self._check_heard(0, now)
            return
        for rank in range(self._size):
            end = self.beats.get(rank, {}).get("end")
            if end not in (None, LEFT, TERMINATED):
                if now - self._failed.setdefault(rank, now) > 2 * TICK:  # otherwise rank 0 may be about to fail alike
                    self._explain(f"{self.name(rank)} failed: {end}")
                    os._exit(2)
            elif end != LEFT:  # one that was terminated alone, with its machine, is soon silent
                self._check_heard(rank, now)
                if rank in self.beats:
                    self._check_work(rank, self.beats[rank])

    def _check_heard(self, rank: int, now: float) -> None:
        silent = now - self._heard[rank]
        if rank == self._rank:
            return
        if rank not in self.beats:
            if silent > max(STARTING, self._patience):
                self._stop(f"rank {rank} did not start within {silent:.0f} s")
        elif silent > self._patience:
            self._stop(f"{self.name(rank)} was not heard for {silent:.0f} s: it is dead or stopped")

    def _check_work(self, rank: int, beat: Beat) -> None:
        idle, stuck = (beat[one] > self._patience for one in ("idle", "stuck"))
        if idle and beat["doing"] != LOADING:
            self._stop(f"{self.name(rank)} hangs: it has done nothing for {beat['idle']:.0f} s")
        elif (idle or stuck) and (rank, beat["doing"]) not in self._warned:
            self._warned.add((rank, beat["doing"]))
            what = f"computes, but made no step for {beat['stuck']:.0f} s"
            if idle:  # it may wait for a download or a disk
                what = f"has done nothing for {beat['idle']:.0f} s"
            self._print(f"warning: {self.name(rank)} {what}")

    def _look_for_the_dead(self) -> NoReturn:
        """After SIGTERM: name the ranks that neither beat nor tell that they were terminated; then end."""
        self._mine["end"] = self._mine["end"] or TERMINATED
        self._tell()
        self._hear(range(self._size))
        before = {rank: beat["beat"] for rank, beat in self.beats.items() if not beat["end"]}
        ends, silent = time.monotonic() + GRACE, set(before)
        while silent and time.monotonic() < ends:
            time.sleep(TICK / 5)
            self._hear(range(self._size))
            silent = {rank for rank in silent if self.beats[rank]["beat"] == before[rank]}
        failed = [rank for rank, beat in self.beats.items() if beat["end"] not in (None, LEFT, TERMINATED)]
        words = [f"{self.name(rank)} is dead" for rank in sorted(silent)]
        words += [f"{self.name(rank)} failed: {self.beats[rank]['end']}" for rank in failed]
        alive = [rank for rank, beat in self.beats.items() if rank not in silent and beat["end"] != LEFT]
        if words and min(alive) == self._rank:
            self._explain("; ".join([*words, self.again] if silent else words))
        os._exit(128 + signal.SIGTERM)

    def _stop(self, words: str) -> NoReturn:
        """End this process after the death of one, so that the launcher ends the others."""
        self._explain(f"{words}; {self.again}")
        os._exit(1)

    def _explain(self, words: str) -> None:
        """Print why the run ends, unless another rank has."""
        if self.first_to_explain():
            self._print(f"error: {words}")

    def first_to_explain(self) -> bool:
        """Return whether no other rank has printed yet why the run ends."""
        try:
            return self._board.add("explained", 1) == 1
        except RuntimeError:  # the store is lost
            return self._rank <= 1

    def _print(self, words: str) -> None:
        with suppress(OSError):  # nobody reads it
            print(printable(words), file=sys.__stderr__, flush=True)


def _clock_of_this_thread() -> Callable[[], float]:
    """Return what reads the CPU time of this thread, also from another one; of the whole process, where it must."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.process_time
    clock = time.pthread_getcpuclockid(threading.get_ident())
    return lambda: time.clock_gettime(clock)
