"""Several processes share the work of a measurement, and write what one process writes; one that dies is named."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import TypeAdapter
from torch.distributed import HashStore  # type: ignore[attr-defined] # as torch documents it
from transformers import PreTrainedTokenizerFast

from lab_tiny import random_text, tiny_tokenizer
from ranks_inputs import LENGTHS, ROWS, UNITS, command, save_inputs
from sinkwindow_lab import pulse, ranks
from sinkwindow_lab.cli import main
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.inputs import tokens
from sinkwindow_lab.inputs.corpora import Corpus
from sinkwindow_lab.pulse import Pulse
from sinkwindow_lab.ranks import Group, Unit
from sinkwindow_lab.store import Store
from sinkwindow_lab.ways.sessions import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Calm:
    """A pulse that tells nobody."""

    def __init__(self, board: HashStore) -> None:
        self.left, self._board = False, board

    def doing(self, what: str, total: int = 0) -> None:
        """Begin something."""

    def advance(self, steps: int) -> None:
        """Count steps."""

    def name(self, rank: int) -> str:
        """Return a rank in words."""
        return f"rank {rank}"

    def wait(self, ready: Callable[[], bool]) -> None:
        """Wait until something is so."""
        while not ready():
            time.sleep(0.001)

    def all_left(self) -> bool:
        """Return whether the other ranks have left."""
        return self._board.add("left", 0) == self._board.add("others", 0)

    def close(self) -> None:
        """Leave."""
        self._board.add("left", 1)


def group(board: HashStore, rank: int, size: int) -> Group:
    """Return a rank of a group whose ranks are threads."""
    return Group(rank, size, board, Calm(board))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model and texts."""
    return save_inputs(tmp_path_factory.mktemp("inputs"))


# -- who does what ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 5])
def test_units_are_done_once_and_the_largest_first(size: int, tmp_path: Path) -> None:
    """Whoever is free takes the next one; rank 0 alone goes on, and what others have stored is this run's."""
    board, taken, lock = HashStore(), list[int](), threading.Lock()
    board.add("others", size - 1)

    def share(rank: int) -> Store:
        keeper = Store(tmp_path)

        def run(unit: int) -> None:
            with lock:
                taken.append(unit)
            time.sleep(0.002 * unit)
            keeper.write("unit", {"unit": unit}, unit)

        units = [Unit(f"unit {unit}", unit, lambda unit=unit: run(unit)) for unit in (3, 1, 9, 2, 7, 5, 8)]  # type: ignore[misc]
        with pytest.raises(SystemExit, match="0") if rank else nullcontext():
            group(board, rank, size).share(units, keeper, {"model": "m"})
        return keeper

    with ThreadPoolExecutor(size) as pool:
        found = [*pool.map(share, range(size))]
    assert taken[0] == 9
    assert sorted(taken, reverse=True) == [9, 8, 7, 5, 3, 2, 1]
    assert all(abs(one - other) < size for one, other in zip(taken, sorted(taken, reverse=True), strict=True))
    assert sum(len(one.written) for one in found) == len(list(tmp_path.iterdir())) == 7
    kind = TypeAdapter(int)
    for keeper, reused in ((found[0], 0), (Store(tmp_path), 7)):
        assert [keeper.read("unit", {"unit": unit}, kind) for unit in (1, 2, 3, 5, 7, 8, 9)] == [1, 2, 3, 5, 7, 8, 9]
        assert keeper.reused == reused
    assert found[0].read("unit", {"unit": 4}, kind) is None


@pytest.mark.parametrize(
    ("facts", "folder", "error"),
    [
        ({"model": "m", "machine": "other"}, ".", r"rank 1 differs from rank 0 in machine, so"),
        ({"model": "m", "machine": "c"}, "other", r"other is not the folder of rank 0"),
    ],
)
def test_ranks_that_would_measure_something_else_are_refused(
    facts: dict[str, str], folder: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model, text or machine, and a folder that is not shared."""
    monkeypatch.setattr(ranks, "VISIBLE", 0.3)
    board = HashStore()
    first, second = ({"model": "m", "machine": "c"}, tmp_path), (facts, tmp_path / folder)

    def agree(rank: int) -> str:
        given, place = (first, second)[rank]
        try:
            group(board, rank, 2)._agree(given, Store(place).folder or place)
        except LabError as refused:
            board.set("go", "")  # ends the wait of the other one
            return str(refused)
        return ""

    with ThreadPoolExecutor(2) as pool:
        words = [*pool.map(agree, range(2))]
    assert [bool(re.search(error, one)) for one in words].count(True) == 1


def test_files_that_rank_0_does_not_see_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than measured again, which would hide that the folder is not shared."""
    monkeypatch.setattr(ranks, "VISIBLE", 0.1)
    board = HashStore()
    board.set("written/1", json.dumps(["nll-x.json"]))
    with pytest.raises(LabError, match="rank 1 has written files"):
        group(board, 0, 2)._written(1, tmp_path)


def test_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank of a machine takes another one, unless one is named."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert ranks.own_device("cuda") == "cuda"
    token = ranks._CURRENT.set(group(HashStore(), 3, 4))
    try:
        assert [ranks.own_device(name) for name in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]
    finally:
        ranks._CURRENT.reset(token)


# -- who is alive -----------------------------------------------------------------------------------------------------


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
        made.append(Pulse(board, 0, 2, patience))
        made[0].wait(until)
        made[0].close()
        (line,) = capfd.readouterr().err.splitlines()
        return line

    yield watch
    made[0].close()


def test_a_rank_that_is_silent_is_named(told: Callable[..., str]) -> None:
    """By host, process and unit."""
    assert "error: rank 1 (host far, pid 7), at 'PPL x', was not heard for 1 s" in told(patience=1.0)


def test_a_rank_that_is_idle_is_named(told: Callable[..., str]) -> None:
    """It beats, since its thread lives, but its work does nothing."""
    assert "error: rank 1 (host far, pid 7), at 'PPL x', hangs: it has done nothing for 31 s" in told(idle=31.0)


def test_a_rank_that_fails_is_quoted(told: Callable[..., str]) -> None:
    """Its own words are printed by rank 0, once."""
    assert "rank 1 (host far, pid 7), at 'PPL x', failed: no space left;" in told(end="no space left")


def test_a_slow_rank_is_named_and_goes_on(told: Callable[..., str]) -> None:
    """A call may take longer than a minute, which nobody can tell from one that never ends."""
    ends = time.monotonic() + 1.0
    words = told(stuck=31.0, until=lambda: time.monotonic() > ends)
    assert words == "warning: rank 1 (host far, pid 7), at 'PPL x', computes, but made no step for 31 s"


# -- the command line -------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run a command; return exit status, standard output and standard error."""
    with pytest.raises(SystemExit) as stop:
        main([str(one) for one in arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_kept_readings_are_read_once(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same result with and without a folder and from it alone, where equal documents have one file."""
    plain = run(capsys, *command(inputs))
    first = run(capsys, *command(inputs, "--keep", tmp_path / "kept"))
    assert len(list((tmp_path / "kept").iterdir())) == UNITS
    monkeypatch.setattr(Session, "feed", None)
    assert run(capsys, *command(inputs, "--keep", tmp_path / "kept"))[:2] == first[:2] == plain[:2]
    assert first[0] == 0
    found = json.loads(first[1])["result"]
    assert [one["configuration"] for one in found] == ROWS.split(",")
    assert {one["targets"] for one in found} == {sum(LENGTHS) + LENGTHS[0] - len(LENGTHS) - 1}


def test_both_methods_need_one_configuration(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are compared with each other."""
    status, _, err = run(capsys, *command(inputs, "--method", "both"))
    assert (status, err.count("\n")) == (2, 1)
    assert "--method both" in err


def test_what_a_group_cannot_do_is_refused(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A speed is measured alone, and shared work needs a folder."""
    token = ranks._CURRENT.set(group(HashStore(), 0, 2))
    try:
        status, _, err = run(capsys, "speed", "--model", inputs / "model")
        assert (status, "speed runs in one process" in err) == (2, True)
        status, _, err = run(capsys, *command(inputs))
        assert (status, "--keep: 2 processes need a folder" in err) == (2, True)
    finally:
        ranks._CURRENT.reset(token)


@pytest.mark.parametrize("name", ["x", "nan seconds"])
def test_patience_is_a_number(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An error in one line, before ranks meet."""
    for variable, value in (("RANK", "0"), ("WORLD_SIZE", "2"), (ranks.PATIENCE, name)):
        monkeypatch.setenv(variable, value)
    status, _, err = run(capsys, "configs")
    assert (status, err.count("\n"), f"{ranks.PATIENCE}={name} must be" in err) == (2, 1, True)


# -- long texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["w1 ", "w1" + " " * 30, "x" * 300 + " "])
def test_long_texts_are_tokenized_by_a_guess_from_their_start(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Little more than what is needed, if the start is like the rest; if it is not, the same tokens."""
    monkeypatch.setattr(tokens, "SAMPLE", 1_000)
    tokenizer, lengths = tiny_tokenizer(), list[int]()

    class Watched(PreTrainedTokenizerFast):
        def __call__(self, text: Any, *arguments: Any, **options: Any) -> Any:
            lengths.append(len(text))
            return super().__call__(text, *arguments, **options)

    text = first * (3_000 // len(first)) + random_text(60_000)
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    tokenizer.__class__ = Watched
    found = tokens.encode(Corpus("words", (text,), "test"), tokenizer, tokens=30_000)
    assert found.ids[0].tolist() == whole[:30_000]
    needed = len(" ".join(text.split(" ")[:30_000]))
    assert max(lengths) < (1.2 if first == "w1 " else 2.5) * needed
