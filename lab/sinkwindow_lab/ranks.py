"""Several processes that measure together, as torchrun or accelerate start them: who does what.

They share a folder, in which each stores what it has finished (`store.py`), and a key-value store of
`torch.distributed`, in which they count who takes which unit of work. No tensor is sent, so no backend (gloo, nccl) is
opened, and the processes may be on several machines. A unit is taken once, the largest first, by whoever is free. Only
rank 0 prints and writes results; it finds the units of all ranks in the folder, as one process finds its own.
"""

from __future__ import annotations

import datetime as dt
import io
import json
import os
import secrets
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

from sinkwindow_lab.errors import INTERRUPTED, LabError
from sinkwindow_lab.files import write_text
from sinkwindow_lab.progress import Reporter, Together

if TYPE_CHECKING:
    from pathlib import Path

    from torch.distributed.distributed_c10d import Store as Board
    from typing_extensions import Self

    from sinkwindow_lab.pulse import Pulse
    from sinkwindow_lab.store import Store

SHARED = ("perplexity", "tables")  # commands whose work is shared
PATIENCE = "SINKWINDOW_PATIENCE"  # variable of the environment: how long a rank may be silent or idle [s]
DEFAULT_PATIENCE = "45"  # a rank is named within a minute
VISIBLE = 60.0  # within which one machine sees what another one has written into their folder [s]
LEAST_PATIENCE = 5.0  # several beats [s]
TOGETHER = ".together"  # start of the file by which ranks see that their folders are the same one
ALONE = "without torchrun unset RANK and WORLD_SIZE"  # which another launcher may have set


class Unit(NamedTuple):
    """Work that one rank does and stores."""

    name: str
    size: int  # tokens that go through the model
    run: Callable[[], object]


class Group(Reporter):
    """The ranks of a run, as one of them sees it; it reports what this rank does to rank 0."""

    def __init__(self, rank: int, size: int, board: Board, pulse: Pulse) -> None:
        """Take the key-value store of all ranks, and the pulse of this one."""
        self.rank, self.size, self.pulse, self._board = rank, size, pulse, board

    @classmethod
    def meet(cls, rank: int, size: int, patience: float) -> Self:
        """Meet the other ranks at the address in the environment."""
        # Imported here: `sinkwindow --help` must not import torch.
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        from sinkwindow_lab.pulse import STARTING, Pulse

        found, _, _ = next(rendezvous("env://", timeout=dt.timedelta(seconds=STARTING)))
        # Ranks that torchrun starts again find its store as the first ones have left it.
        board = PrefixStore(f"sinkwindow {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", found)
        if board.add(f"started/{rank}", 1) > 1:  # the count is of one machine
            raise RuntimeError("it was started again: give torchrun a fixed --nnodes, without --max-restarts")
        return cls(rank, size, board, Pulse(board, rank, size, patience))

    def begin(self, label: str, total: int) -> None:
        """Tell which unit this rank begins."""
        self.pulse.doing(label, total)

    def advance(self, steps: int = 1) -> None:
        """Count steps as done."""
        self.pulse.advance(steps)

    def share(self, units: Sequence[Unit], store: Store, facts: Mapping[str, Any]) -> None:
        """Have each unit done by one of the ranks; return in rank 0 when all are finished, and end the other ranks.

        `facts` is what all ranks must agree on, by name: each is refused that would measure something else than rank 0.
        """
        if store.folder is None:
            raise LabError("several processes need a folder for what they have finished")
        self.pulse.again = store.again
        todo = sorted(units, key=lambda unit: -unit.size)
        with Together(len(todo), self.size) as shown, ExitStack() as stack:
            if self.rank == 0:
                stack.callback(setattr, self.pulse, "show", lambda _: None)
                self.pulse.show = lambda beats: shown.show(self._board.add("finished", 0), beats)
            self._agree({**facts, "units": [unit[:2] for unit in units]}, store.folder)
            while (place := self._board.add("taken", 1) - 1) < len(todo):
                self.begin(todo[place].name, todo[place].size)
                todo[place].run()
                self._board.add("finished", 1)
            self.pulse.doing("waiting for the other ranks")
            self._board.set(f"written/{self.rank}", json.dumps(store.written))
            self.pulse.wait(lambda: self._board.add("finished", 0) == len(todo))
            if self.rank:
                self.pulse.close()
                raise SystemExit(0)
            self.pulse.wait(self.pulse.all_left)
        for rank in range(self.size):
            store.adopt(self._written(rank, store.folder))

    def _agree(self, facts: Mapping[str, Any], folder: Path) -> None:
        """Refuse ranks that would measure something else, or that store it elsewhere."""
        own = json.loads(json.dumps(facts))
        self._board.set(f"facts/{self.rank}", json.dumps(own))
        self.pulse.doing("waiting for all ranks to have loaded model and text")
        if self.rank:
            self.pulse.wait(lambda: self._board.check(["go"]))
            if not self._appears((folder / self._board.get("go").decode()).is_file):
                raise LabError(f"{folder} is not the folder of rank 0: all ranks need one that they share")
            self._board.add("seen", 1)
            return
        self.pulse.wait(lambda: self._board.check([f"facts/{rank}" for rank in range(self.size)]))
        for rank in range(1, self.size):
            other = json.loads(self._board.get(f"facts/{rank}"))
            if differs := sorted(name for name in own if own[name] != other.get(name)):
                raise LabError(
                    f"{self.pulse.name(rank)} differs from rank 0 in {', '.join(differs)}, so that the result would "
                    "depend on who reads what: give all the same model, text, software, processor and number of threads"
                )
        file = write_text(folder / f"{TOGETHER}-{secrets.token_hex(8)}", "")
        try:
            self._board.set("go", file.name)
            self.pulse.wait(lambda: self._board.add("seen", 0) == self.size - 1)
        finally:
            file.unlink(missing_ok=True)

    def _written(self, rank: int, folder: Path) -> list[str]:
        """Return which files another rank has written, once they are visible here: network disks may take a while."""
        names: list[str] = json.loads(self._board.get(f"written/{rank}"))
        if not self._appears(lambda: set(names) <= {path.name for path in folder.iterdir()}):
            raise LabError(f"rank {rank} has written files into {folder} that rank 0 does not see there")
        return names

    def _appears(self, seen: Callable[[], bool]) -> bool:
        """Wait for what another machine has written; return whether it is there."""
        ends = time.monotonic() + VISIBLE
        while not seen() and time.monotonic() < ends:
            time.sleep(0.1)
        return seen()


_CURRENT: ContextVar[Group | None] = ContextVar("group", default=None)


def current() -> Group | None:
    """Return the group that this process belongs to; None if it measures alone."""
    return _CURRENT.get()


def own_device(device: str) -> str:
    """Return the GPU of this rank if `device` names no certain one."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and current() else device


def place() -> tuple[int, int] | None:
    """Return which of how many processes a launcher says this one is; None if there are no others."""
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE") or "1"
    if rank is None or size == "1":
        return None
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise LabError(f"RANK={rank} WORLD_SIZE={size} must be one of a number of processes; {ALONE}")
    return int(rank), int(size)


@contextmanager
def joined(arguments: Sequence[str]) -> Iterator[None]:
    """Measure with the other processes of a launcher within the block, if a command does so; only rank 0 prints."""
    command = next((one for one in arguments if not one.startswith("-")), None)
    found = place() if command in SHARED and not {"-h", "--help", "--version"} & {*arguments} else None
    if found is None:
        yield
        return
    rank, size = found
    try:
        group = Group.meet(rank, size, _patience())
    except (RuntimeError, ValueError) as error:  # as torch raises them
        if isinstance(error, LabError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LabError(f"rank {rank} cannot meet the other ranks ({reason}); {ALONE}") from error
    token = _CURRENT.set(group)
    try:
        yield from _heard(group) if rank == 0 else _mute(group)
    finally:
        group.pulse.close("terminated")  # unless it has left, or has told why it failed
        _CURRENT.reset(token)


def _patience() -> float:
    given = os.environ.get(PATIENCE, DEFAULT_PATIENCE)
    with suppress(ValueError):
        if LEAST_PATIENCE <= float(given) < float("inf"):
            return float(given)
    raise LabError(f"{PATIENCE}={given} must be a number of seconds, {LEAST_PATIENCE:g} or more")


def _heard(group: Group) -> Iterator[None]:
    """Let rank 0 do as a process alone does; if it fails, it says why, and the other ranks do not."""
    try:
        yield
    except BaseException as end:
        if isinstance(end, SystemExit) and not end.code:
            group.pulse.close()
        else:
            group.pulse.first_to_explain()
        raise


def _mute(group: Group) -> Iterator[None]:
    """Print nothing in another rank; if it fails, rank 0 is told why."""
    words = io.StringIO()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(words):
            yield
    except SystemExit as end:
        if not end.code:
            group.pulse.close()
        elif end.code != INTERRUPTED:  # Ctrl-C reaches all ranks
            *_, last = words.getvalue().splitlines() or ["it ended"]
            group.pulse.fail(last.removeprefix("error: "))
        raise
    except Exception as error:
        group.pulse.fail(traceback.format_exception_only(error)[-1].strip())
        raise
