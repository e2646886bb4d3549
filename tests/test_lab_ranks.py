"""Several processes share the work of a measurement, and write what one process writes; one that dies is named."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import TypeAdapter
from torch.distributed import HashStore  # type: ignore[attr-defined] # as torch documents it

from lab_tiny import ORIGIN, refused, run, tiny_bench
from ranks_inputs import LENGTHS, ROWS, UNITS, command, save_inputs
from sinkwindow_lab import ranks
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.inputs import models
from sinkwindow_lab.ranks import Group, Unit
from sinkwindow_lab.store import Store
from sinkwindow_lab.ways.sessions import Session

if TYPE_CHECKING:
    from collections.abc import Callable
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
    own, taken = threading.local(), dict[int, int]()

    class Watched(HashStore):
        def add(self, key: str, count: int) -> int:
            value: int = super().add(key, count)
            if key == "taken":
                own.place = value
            return value

    board = Watched()
    board.add("others", size - 1)

    def share(rank: int) -> Store:
        keeper = Store(tmp_path)

        def run(unit: int) -> None:
            taken[unit] = own.place
            time.sleep(0.002 * unit)
            keeper.write("unit", {**ORIGIN, "unit": unit}, unit)

        units = [Unit(f"unit {unit}", unit, lambda unit=unit: run(unit)) for unit in (3, 1, 9, 2, 7, 5, 8)]  # type: ignore[misc]
        with pytest.raises(SystemExit, match="0") if rank else nullcontext():
            group(board, rank, size).share(units, keeper, {"model": "m"})
        return keeper

    with ThreadPoolExecutor(size) as pool:
        found = [*pool.map(share, range(size))]
    assert taken == {9: 1, 8: 2, 7: 3, 5: 4, 3: 5, 2: 6, 1: 7}
    assert str(found[0]) == str(Store(tmp_path))
    assert str(found[0]).startswith("7 finished measurements")
    assert sum(len(one.written) for one in found) == len(list(tmp_path.iterdir())) == 7
    kind = TypeAdapter(int)
    for keeper, reused in ((found[0], 0), (Store(tmp_path), 7)):
        for unit in (1, 2, 3, 5, 7, 8, 9):
            assert keeper.read("unit", {**ORIGIN, "unit": unit}, kind) == unit
        assert keeper.reused == reused
    assert found[0].read("unit", {**ORIGIN, "unit": 4}, kind) is None


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
            board.set("go", "nowhere")  # ends the wait of the other one
            board.add("seen", 1)
            return str(refused)
        return ""

    with ThreadPoolExecutor(2) as pool:
        words = [*pool.map(agree, range(2))]
    assert [bool(re.search(error, one)) for one in words].count(True) == 1


def test_two_runs_share_a_folder(tmp_path: Path) -> None:
    """One that begins does not take away by which ranks of another one see that they share it; nothing is left."""
    boards, keeper = (HashStore(), HashStore()), Store(tmp_path)
    boards[0].set("facts/1", json.dumps({}))
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(group(boards[0], 0, 2)._agree, {}, tmp_path)
        boards[0].wait(["go"])
        for done in [pool.submit(group(boards[1], rank, 2)._agree, {}, tmp_path) for rank in range(2)]:
            done.result()
        group(boards[0], 1, 2)._agree({}, tmp_path)
        first.result()
    assert not list(tmp_path.iterdir())
    assert str(keeper).startswith("0 finished")


def test_what_continues_a_fresh_run(tmp_path: Path) -> None:
    """Not the same command, which would begin anew."""
    one = group(HashStore(), 0, 1)
    one.share([], Store(tmp_path, fresh=True), {})
    assert one.pulse.again == "the same command without --fresh continues"


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
    monkeypatch.setattr(ranks, "_CURRENT", SimpleNamespace(get=lambda: group(HashStore(), 3, 4)))
    assert [ranks.own_device(name) for name in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]


def test_no_rank_computes_on_the_gpu_of_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even to see whether there is one; what names no GPU takes the rank's own."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(models, "usable_device", torch.device)

    def refuse(place: torch.device) -> None:
        raise NotImplementedError(place)

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    monkeypatch.setattr(ranks, "_CURRENT", SimpleNamespace(get=lambda: group(HashStore(), 3, 4)))
    assert models.check_place("cuda", "float32")[0] == torch.device("cuda:3")
    with pytest.raises(NotImplementedError, match="cuda:3"):
        models.load_model("none", device="cuda")


def test_ranks_compare_whole_texts() -> None:
    """Also what is cut off: `tables` takes prompts from them."""
    found = list[dict[str, Any]]()
    for more in ("", " w1"):
        one = tiny_bench()
        one.corpora = [dataclasses.replace(one.corpora[0], documents=(one.corpora[0].text + more,))]
        taker: Any = SimpleNamespace(share=lambda units, store, facts: found.append(facts))  # noqa: ARG005
        one.shared_by(taker, [], [])
    assert [name for name in found[0] if found[0][name] != found[1][name]] == ["corpora"]


# -- the command line -------------------------------------------------------------------------------------------------


def test_kept_readings_are_read_once(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same result with and without a folder and from it alone, where equal documents have one file."""
    plain = run(capsys, *command(inputs))
    first = run(capsys, *command(inputs, "--keep", tmp_path / "kept"))
    assert "earlier run" not in first[2]
    assert len(list((tmp_path / "kept").iterdir())) == UNITS
    monkeypatch.setattr(Session, "feed", None)
    again = run(capsys, *command(inputs, "--keep", tmp_path / "kept"))
    assert again[:2] == first[:2] == plain[:2]
    assert f"note: {UNITS} readings are from an earlier run" in again[2]
    assert first[0] == 0
    found = json.loads(first[1])["result"]
    assert [one["configuration"] for one in found] == ROWS.split(",")
    assert {one["targets"] for one in found} == {sum(LENGTHS) + LENGTHS[0] - len(LENGTHS) - 1}


def test_both_methods_need_one_configuration(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are compared with each other."""
    assert "--method both" in refused(capsys, *command(inputs, "--method", "both"))


def test_what_a_group_cannot_do_is_refused(
    inputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A speed is measured alone, and shared work needs a folder; nobody is met for what no group does."""
    with monkeypatch.context() as patched:
        patched.delenv("MASTER_ADDR", raising=False)
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
            patched.setenv(name, value)
        status, _, err = run(capsys, "speed", "--model", inputs / "model")
        assert (status, "speed runs in one process" in err, "unset RANK" in err) == (2, True, True)
        for words in (["--version"], ["--help"], ["perplexity", "--help"]):
            assert run(capsys, *words)[::2] == (0, "")
        reason = "error: rank 0 cannot meet the other ranks .*MASTER_ADDR.*; without torchrun unset RANK and WORLD_SIZE"
        status, _, err = run(capsys, *command(inputs, "--keep", inputs / "kept"))
        assert (status, bool(re.fullmatch(reason, err.strip()))) == (2, True), err
        patched.setenv("WORLD_SIZE", "two")
        assert "WORLD_SIZE=two must be" in refused(capsys, *command(inputs, "--keep", inputs / "kept"))
    monkeypatch.setattr(ranks, "_CURRENT", SimpleNamespace(get=lambda: group(HashStore(), 0, 2)))
    status, _, err = run(capsys, *command(inputs))
    assert (status, "--keep: 2 processes need a folder" in err) == (2, True)


@pytest.mark.parametrize("name", ["x", "nan seconds", "nan", "inf", "4"])
def test_patience_is_a_number(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An error in one line, before ranks meet."""
    for variable, value in (("RANK", "0"), ("WORLD_SIZE", "2"), (ranks.PATIENCE, name)):
        monkeypatch.setenv(variable, value)
    assert f"{ranks.PATIENCE}={name} must be" in refused(capsys, "perplexity")
