"""The comparison with peers: its arithmetic, its table, its protocol, with fake peers."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peers import __main__ as program
from peers import environments, table
from peers.adapters import Dynamic, Ours, Reference, RefusalError, Size, Static
from peers.client import Client
from peers.measures import Bench
from peers.plan import LEFT_OUT, PEERS, Plan
from peers.run import left_out, measure, skipped_row
from peers.worker import ADAPTERS, serve

from lab_tiny import random_ids, save_tiny
from sinkwindow_lab.render import marked

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PLAN = Plan(((4, 12), (4, 2044)), 2, 3, 1, (4, 12, 30), (4, 4), (4, 2, 1))


class Fake:
    """A peer that answers at once; the measurements in `broken` fail."""

    def __init__(self, milliseconds: float, *broken: str, most: int = 10**6) -> None:
        self.milliseconds, self.broken, self.most = milliseconds, broken, most
        self.asked: list[str] = []

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Return the answer to one request."""
        self.asked.append(do)
        if do in self.broken:
            return {"error": f"RuntimeError: no {do}"}
        if do in ("steps", "attention"):
            return {"result": {"ms": [self.milliseconds] * arguments["count"]}}
        results: dict[str, dict[str, Any]] = {
            "fill": {"cache_bytes": 2_000_000, "growth_bytes": 500_000_000},
            "perplexity": {"perplexity": 21.5, "seconds": 1.0},
            "prompt": {"works": arguments.get("tokens", 0) <= self.most},
        }
        return {"result": results.get(do, {"difference": 2e-5 if self.milliseconds < 50 else 3.0})}


def record(clients: dict[str, Fake]) -> dict[str, Any]:
    """Return the record of a run with these peers, in which no other peer could be built."""
    answers = measure(clients, PLAN)
    rows = [
        {"key": peer.key, "versions": {"torch": "2.13.0"}, "failure": None, "answers": answers[peer.key]}
        if peer.key in clients
        else {"key": peer.key, "versions": {}, "failure": "its environment could not be built: no wheel", "answers": {}}
        for peer in PEERS
    ]
    return {
        "machine": {"commit": "0123456789", "dirty": False, "date": "2026-11-25", "cpu": "a CPU"},
        "threads": 2,
        "model": "tiny",
        "weight_bytes": 1_000_000_000,
        "corpus": "plays",
        "quick": False,
        "plan": {"speed": PLAN.speed, "scored": PLAN.scored, "prompt": PLAN.prompt, "multiples": PLAN.multiples}
        | {"rounds": PLAN.rounds, "steps": PLAN.steps},
        "peers": rows,
    }


def four(ours: float = 40.0) -> dict[str, Fake]:
    """Return fake clients of this project's cache, the baseline and the two peers with bars."""
    return {"dynamic": Fake(45.0), "ours": Fake(ours), "attention_sinks": Fake(80.0), "sink_cache": Fake(60.0)}


def test_ratios_are_of_medians() -> None:
    """A ratio is the median of one peer's samples over the median of another's, at the same limit."""
    run = record(four())
    assert table.ratio(run, "ours", "attention_sinks", 2048) == pytest.approx(0.5)
    assert table.ratio(run, "attention_sinks", "dynamic", 16) == pytest.approx(80 / 45)
    assert table.ratio(run, "ours", "kvpress", 2048) is None


@pytest.mark.parametrize(("ours", "met"), [(40.0, [True, True]), (46.0, [True, False]), (49.0, [False, False])])
def test_bars(ours: float, met: list[bool]) -> None:
    """The bars are 0.6 of attention_sinks and 0.75 of SinkCache, by the medians of the run."""
    assert [one.met for one in table.verdicts(record(four(ours)))] == met


def test_a_bar_without_its_peer_is_missed() -> None:
    """A bar whose peer was not measured is not met."""
    clients = four()
    del clients["attention_sinks"]
    first, second = table.verdicts(record(clients))
    assert not first.met
    assert "not measured" in str(first)
    assert second.met


def test_table_has_a_row_for_every_peer() -> None:
    """Each peer has a row with as many cells as titles; a peer that did not run has the reason in its row."""
    text = table.markdown(record(four()))
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(PEERS)
    assert len({line.count(" |") for line in lines}) == 1
    assert "its environment could not be built: no wheel" in text
    ours = next(line for line in lines if "buffer 0" in line)
    assert "| 40.0 | 0.89 | 1.00 | 40.0 | 2.0 | 1.50 | 21.500 | 32 (4x, the most tried) | yes (2.0e-05)" in ours
    assert "| no (3.0e+00) |" in next(line for line in lines if "SinkCache" in line)


def test_failures_stay_visible() -> None:
    """A failed measurement is a dash with its reason; the other measurements of that peer continue."""
    clients = four() | {"kvpress": Fake(50.0, "fill", "perplexity")}
    made = record(clients)
    text = table.markdown(made)
    assert "failed: RuntimeError: no fill" in text
    assert "failed: RuntimeError: no perplexity" in text
    failed = table.failures(made)
    assert "kvpress, perplexity: RuntimeError: no perplexity" in failed
    assert "static: its environment could not be built: no wheel" in failed
    assert not [one for one in failed if one.startswith(("ours:", "ours,", "dynamic"))]
    assert table.failures({"peers": [skipped_row("reference")]}) == []
    assert "steps" not in clients["kvpress"].asked
    assert "batch" in clients["kvpress"].asked


def test_peers_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample is the median of a block of steps as the worker timed them; what fails is not measured again."""
    order: list[Fake] = []

    def ask(self: Fake, do: str, **arguments: Any) -> dict[str, Any]:
        answer = real(self, do, **arguments)
        if do == "steps" and "result" in answer:
            order.append(self)
            answer["result"]["ms"] = [50.0, self.milliseconds, 0.0]
        return answer

    real = Fake.ask
    monkeypatch.setattr(Fake, "ask", ask)
    clients = {"dynamic": Fake(1.0), "static": Fake(1.0, "steps"), "ours": Fake(2.0)}
    answers = measure(clients, PLAN)
    assert order == [clients["dynamic"], clients["ours"]] * PLAN.rounds * len(PLAN.speed)
    assert answers["dynamic"]["steps 16"]["result"]["ms"] == [1.0] * PLAN.rounds
    assert answers["ours"]["steps 16"]["result"]["ms"] == [2.0] * PLAN.rounds
    assert clients["static"].asked.count("steps") == len(PLAN.speed)
    assert answers["static"]["steps 16"] == {"error": "RuntimeError: no steps"}


def test_longest_prompt_is_searched_from_the_top() -> None:
    """The result is the first multiple that works; if none works, it is a failure with the reason."""
    answers = measure({"ours": Fake(1.0, most=20), "static": Fake(1.0, most=0)}, PLAN)
    assert answers["ours"]["prompt"] == {"result": {"tokens": 16, "multiple": 2}}
    assert answers["static"]["prompt"] == {"error": "logits are not finite"}


def test_quick_leaves_the_slow_ones_out_and_says_so() -> None:
    """A quick run skips the slow peers; each still has a row, with the reason."""
    assert set(left_out(plan_is_quick=True)) == {"index_select", "reference"}
    assert left_out(plan_is_quick=False) == []
    assert skipped_row("reference")["failure"] == LEFT_OUT


def test_every_peer_has_an_adapter() -> None:
    """The worker can run every peer of the plan, and every environment belongs to a peer."""
    assert {peer.key for peer in PEERS} == set(ADAPTERS)
    assert set(environments.REQUIREMENTS) <= set(ADAPTERS)


def test_protocol() -> None:
    """Results, refusals and errors are answers; the worker continues after an error."""

    def refuse() -> None:
        raise RefusalError("cannot")

    calls: dict[str, Callable[..., Any]] = {"add": lambda a, b: a + b, "refuse": refuse}
    ours, theirs = multiprocessing.Pipe()
    for request in ({"do": "add", "a": 1, "b": 2}, {"do": "refuse"}, {"do": "nonsense"}, {"do": "add", "a": 1}):
        ours.send(request)
    with ours, theirs:
        asked = threading.Thread(target=serve, args=(theirs, calls))
        asked.start()
        answers = [ours.recv() for _ in range(4)]
        ours.close()
        asked.join()
    assert answers[0] == {"result": 3}
    assert answers[1] == {"refused": "cannot"}
    assert answers[2]["error"].startswith("KeyError")
    assert answers[3]["error"].startswith("TypeError")


ECHO = """
import sys
from multiprocessing.connection import Connection
print("libraries print")
with Connection(int(sys.argv[1])) as pipe:
    pipe.send({"result": pipe.recv()["do"]})
"""
FAILS = "import sys\nsys.exit('ImportError: no such thing')"
SLEEPS = "import time\ntime.sleep(60)"


@pytest.mark.parametrize(
    ("code", "timeout", "expected"),
    [
        (ECHO, 30.0, {"result": "hello"}),
        (FAILS, 30.0, {"error": "process ended: ImportError: no such thing"}),
        (f"print('Loading: 100%|##| 272/272')\n{FAILS}", 30.0, {"error": "process ended: ImportError: no such thing"}),
        (SLEEPS, 0.1, {"error": "no answer to hello within 0 s"}),
    ],
    ids=["answers", "fails", "fails behind a bar", "sleeps"],
)
def test_client(code: str, timeout: float, expected: dict[str, str], tmp_path: Path) -> None:
    """The client returns the answer of a process; one that exits or hangs is an error, in later requests too."""
    client = Client([sys.executable, "-c", code], tmp_path / "log", timeout=timeout)
    try:
        assert client.ask("hello") == expected
        if "error" in expected:
            assert "error" in client.ask("hello")
    finally:
        client.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a tiny model."""
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize("adapter", [Dynamic, Ours, Reference])
@torch.no_grad()
def test_correct_caches_are_measured_as_correct(adapter: Any, tiny: str) -> None:
    """Caches that pass the tests of the cache pass here too; all but the dense one have the same perplexity."""
    bench = Bench(adapter(tiny), random_ids(200))
    assert bench.chunks()["difference"] < table.SAME
    assert bench.batch()["difference"] < table.SAME
    assert bench.prompt(4, 4, 80) == {"works": True}
    expected = Bench(Reference(tiny), random_ids(200)).perplexity(4, 12, 40)["perplexity"]
    same = bench.perplexity(4, 12, 40)["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert same == (adapter is not Dynamic)


@torch.no_grad()
def test_steps_are_timed_at_one_length(tiny: str) -> None:
    """A full cache stays at its limit, attention is part of a step, and the model is unchanged afterwards."""
    for adapter in (Dynamic(tiny), Ours(tiny)):
        bench = Bench(adapter, random_ids(200))
        filled = bench.fill(4, 12, 9)
        before = [vars(module).get("forward") for module in adapter.model.modules()]
        assert len(bench.steps(3)["ms"]) == 3
        assert all(time > 0 for time in bench.attention(2)["ms"])
        assert [vars(module).get("forward") for module in adapter.model.modules()] == before
        assert adapter.cache_bytes() == filled["cache_bytes"]


@torch.no_grad()
def test_static_says_when_it_is_full(tiny: str) -> None:
    """Beyond its capacity, a static cache gives an explanation rather than a wrong number."""
    adapter = Static(tiny)
    bench = Bench(adapter, random_ids(200))
    bench.fill(4, 28, 4)
    assert len(bench.steps(4)["ms"]) == 4
    with pytest.raises(RefusalError, match="full after 32 tokens"):
        bench.steps(1)
    with pytest.raises(RefusalError, match="do not fit"):
        bench.fill(4, 4, 4)
    adapter.start(Size(4, 4))


def test_configuration_is_readable_everywhere() -> None:
    """Old versions read `rope_theta` and `torch_dtype`, new ones `rope_parameters` and `dtype`."""
    config = {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}, "dtype": "float32"}
    assert program.readable(config) == {**config, "rope_theta": 5.0, "torch_dtype": "float32"}


def test_environment_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment is rebuilt only if its requirements changed; our own is the one that is running."""
    built: list[str] = []

    def build(folder: Path, *_: Any) -> None:
        built.append(folder.name)
        folder.mkdir(exist_ok=True)

    monkeypatch.setattr(environments, "HOME", tmp_path)
    monkeypatch.setattr(environments, "_build", build)
    for _ in range(2):
        environments.interpreter("sink_cache")
    assert built == ["sink_cache"]
    (tmp_path / "sink_cache" / environments.BUILT).write_text("older", encoding="utf-8")
    environments.interpreter("sink_cache")
    assert built == ["sink_cache"] * 2
    assert environments.interpreter("ours") == sys.executable


def test_the_page_has_a_place_for_the_table() -> None:
    """If the place for the table is missing, the run fails before anything is measured."""
    marked.check(program.DOCUMENT, program.PLACE)
    marked.check(program.README, program.BARS_PLACE)
