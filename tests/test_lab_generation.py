"""Times and memory in the tables: one timer with fake clocks, interleaved generations, tensors counted one by one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lab_tiny import listen, random_ids, tiny_model
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.measure import generation, memory, steps
from sinkwindow_lab.measure.clock import HostClock, Side, interleave, quartiles
from sinkwindow_lab.ways.configurations import open_session, parse
from sinkwindow_lab.ways.sessions import DenseSession, Session

if TYPE_CHECKING:
    from collections.abc import Callable

    from sinkwindow_lab.records import Figures

CPU = torch.device("cpu")


def untimed(figures: Figures) -> dict[str, Any]:
    """Return the numbers of a generation that are no times."""
    names = ("kept", "cache", "evictions")
    return {"peak": figures["peak memory"], **{name: figures[f"generation: {name}"] for name in names}}


class FakeTime:
    """A time that the work itself advances."""

    def __init__(self) -> None:
        self.now = 100.0

    def clock(self, wait: Callable[[], None] = lambda: None) -> HostClock:
        """Return a clock that reads this time."""
        return HostClock(now=lambda: self.now, wait=wait)

    def work(self, *seconds: float, told: list[str] | None = None, name: str = "") -> Callable[[], None]:
        """Return work that takes these times, the last one repeatedly."""
        left = list(seconds)

        def run() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]
            if told is not None:
                told.append(name)

        return run


# -- the timer --------------------------------------------------------------------------------------------------------


def test_sides_take_turns() -> None:
    """Each round has a sample of every side; a side that needs fewer stops; warm-up rounds are not told."""
    time, done, told = FakeTime(), list[str](), list[str]()
    sides = {
        "a": Side(time.work(1.0, told=done, name="a"), ready=partial(done.append, "-")),
        "b": Side(time.work(2.0, told=done, name="b"), samples=2),
    }
    found = interleave(sides, 3, CPU, warm_up=1, clock=time.clock(), on_sample=told.append)
    assert "".join(done) == "-ab-ab-ab-a"
    assert {name: one.ms for name, one in found.items()} == {"a": [1000.0] * 3, "b": [2000.0] * 2}
    assert "".join(told) == "ababa"


def test_only_the_work_of_a_side_is_timed() -> None:
    """What prepares a sample, other sides and what the device does later for them are in no sample."""
    time = FakeTime()
    sides = {
        "quick": Side(time.work(9.0, 0.25, 0.5), ready=time.work(50.0)),
        "slow": Side(time.work(90.0, 30.0, 40.0)),
    }
    found = interleave(sides, 2, CPU, warm_up=1, clock=time.clock())
    assert found["quick"].ms == [250.0, 500.0]
    assert found["slow"].ms == [30_000.0, 40_000.0]


def test_the_clock_waits_for_the_device() -> None:
    """Time that the device needs after the call returned belongs to the sample."""
    time = FakeTime()

    def wait() -> None:
        time.now += 10.0

    assert interleave({"a": Side(time.work(1.0))}, 2, CPU, clock=time.clock(wait))["a"].ms == [11_000.0] * 2


def test_events_are_known_by_their_sample() -> None:
    """A side can say what happened in a sample; warm-up rounds count for nothing."""
    events = iter(["warm", "", "eviction"])
    side = Side(lambda: None, event=lambda: next(events))
    assert interleave({"a": side}, 2, CPU, warm_up=1)["a"].events == {1: "eviction"}


def test_no_sample_is_an_error() -> None:
    """Nothing would be measured."""
    with pytest.raises(ValueError, match="samples=0 must be 1 or more"):
        interleave({"a": Side(lambda: None)}, 0, CPU)


def test_quartiles_are_those_of_all_samples() -> None:
    """The median is between the others; one sample is all three; no samples are an error."""
    assert quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == [2.0, 3.0, 4.0]
    assert quartiles([2.0]) == [2.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="nothing was measured"):
        quartiles([])


# -- generations ------------------------------------------------------------------------------------------------------


def test_generations_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the warm-up, prompts alternate, then tokens; a run that needs no more tokens is left out."""
    fed: list[tuple[str, int]] = []

    def noted(session: Session, ids: torch.Tensor, *, last_only: bool) -> None:
        assert last_only
        fed.append((type(session).__name__[0], ids.shape[1]))

    listen(monkeypatch, noted)
    monkeypatch.setattr(generation, "generation_peaks", lambda *arguments: [None] * len(arguments[-1]))
    told: list[str] = []
    rows = [parse("baseline"), parse("streaming_2_6_3")]
    generation.generate(rows, tiny_model(), random_ids(9), [(2, 4), (2,)], on_token=told.append)
    warm = [[(name, 9), *[(name, 1)] * generation.WARM_UP_TOKENS] for name in "DS"]
    prompts = [("D", 9), ("S", 9)] * generation.PROMPTS
    assert fed == [*warm[0], *warm[1], *prompts, ("D", 1), ("S", 1), ("D", 1), ("D", 1)]
    assert told == ["baseline", "streaming_2_6_3", "baseline", "baseline"]


def test_one_session_of_a_way_is_open_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the warm-up and of earlier prompts are closed: their caches and hooks would stay."""
    opened: list[Session] = []
    closed: list[Session] = []

    def noted(*arguments: object) -> Session:
        assert closed == opened
        session = open_session(*arguments)  # type: ignore[arg-type]
        real = session.close

        def close() -> None:
            closed.append(session)
            real()

        session.close = close  # type: ignore[method-assign]
        opened.append(session)
        return session

    monkeypatch.setattr(generation, "open_session", noted)
    generation.generate([parse("streaming_2_6_3")], tiny_model(), random_ids(9), [(3,)])
    assert closed == opened
    assert len(opened) == 1 + generation.PROMPTS


def test_a_failed_generation_removes_its_hooks() -> None:
    """Open sessions are closed; otherwise their hooks would stay on the model."""
    model, told = tiny_model(), list[str]()

    def enough(name: str) -> None:
        told.append(name)
        if len(told) == 3:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        generation.generate([parse("streaming_2_6_3")], model, random_ids(9), [(5,)], on_token=enough)
    assert not model.base_model._forward_pre_hooks
    assert not model.base_model._forward_hooks


def test_generation_figures() -> None:
    """TPOT leaves the first token out; throughput counts all tokens over all time."""
    made = generation.figures(3, [9000.0, 1000.0, 2000.0], [250.0, 500.0], 750.0, DenseSession(tiny_model()))
    assert made["total"] == ("s", [2.75])
    assert made["TTFT"] == ("s", [9.0, 1.0, 2.0])
    assert made["TPOT"] == ("ms", [250.0, 500.0])
    assert made["throughput"] == ("tok/s", [3 / 2.75])
    several = generation.together([made, made])
    assert several["TPOT"] == ("ms", [250.0, 500.0] * 2)
    assert several["total"] == ("s", [2.75, 2.75])


@pytest.mark.parametrize("count", [-1, 0, 1])
def test_fewer_than_two_tokens_have_no_tpot(count: int) -> None:
    """The first token is a prefill: a time per token needs a second one."""
    with pytest.raises(LabError, match="generate 2 or more"):
        generation.generate([parse("baseline")], tiny_model(), random_ids(3), [(count, 5)])


def test_a_short_generation_is_the_start_of_a_long_one() -> None:
    """Stages share their times; what is kept, stored and evicted is that at the end of each, as if it ran alone."""
    row, prompt = parse("streaming_2_6_3"), random_ids(7)
    _, found = generation.generate([parse("baseline"), row], tiny_model(), prompt, [(2,), (4, 30)])
    (_, short), (_, long) = (found[count]["TPOT"] for count in (4, 30))
    assert short == long[:3]
    assert (len(short), len(long)) == (3, 29)
    assert found[4]["TTFT"] == found[30]["TTFT"]
    assert len(found[4]["TTFT"][1]) == generation.PROMPTS > 1
    for count in (4, 30):
        assert untimed(found[count]) == untimed(generation.generate([row], tiny_model(), prompt, [(count,)])[0][count])
    assert found[30]["generation: evictions"][1][0] > found[4]["generation: evictions"][1][0]


@pytest.mark.parametrize(("count", "places"), [(10, None), (260, 4), (261, 4), (984, 4), (1000, 4), (66, 1)])
def test_timed_steps_are_spread_evenly(count: int, places: int | None) -> None:
    """Every step is either timed or read; the runs that are timed are whole cycles, in the middle of equal parts."""
    runs = generation.turns(count, places)
    assert sum(map(sum, runs)) == count
    timed = [length for _, length in runs if length]
    if places is None or count <= places * generation.TURN:
        assert timed == [count]
        return
    assert timed == [generation.TURN] * places
    centers = [sum(map(sum, runs[:number])) + skipped + generation.TURN / 2 for number, (skipped, _) in enumerate(runs)]
    assert centers[:places] == pytest.approx([count * (2 * place + 1) / (2 * places) for place in range(places)], abs=2)


def test_what_is_not_timed_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generation that is timed in places ends where one that is timed throughout does; its time is that of all."""
    monkeypatch.setattr(generation, "TURN", 6)
    row, prompt, told = parse("streaming_2_6_3"), random_ids(7), list[str]()
    (sampled,) = generation.generate([row], tiny_model(), prompt, [(9, 60)], places=2, on_token=told.append)
    (whole,) = generation.generate([row], tiny_model(), prompt, [(9, 60)])
    assert [len(one["TPOT"][1]) for one in sampled.values()] == [8, 8 + 12]
    assert len(told) == generation.timed_steps([(9, 60)], 2) == 20
    assert list(sampled) == list(whole) == [9, 60]
    assert [*map(untimed, sampled.values())] == [*map(untimed, whole.values())]


def test_times_of_parts_count_by_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of which every step is timed weighs no more than one that is sampled: the sum is that of all steps."""
    monkeypatch.setattr(generation, "TURN", 4)
    monkeypatch.setattr(generation, "generation_peaks", lambda *arguments: [None] * len(arguments[-1]))
    monkeypatch.setattr(generation, "PROMPTS", 1)
    time = FakeTime()

    def slower(session: Session, *_: object, **__: object) -> None:
        time.now += session.kept_tokens / 1e3  # a step takes as many milliseconds as there are tokens

    listen(monkeypatch, slower)
    stages = [(9, 201), (9,)]
    rows = [parse("baseline"), parse("streaming_2_6_3")]
    found, _ = generation.generate(rows, tiny_model(), random_ids(7), stages, places=3, clock=time.clock())
    for count, one in found.items():
        steps = range(7, 7 + count - 1)
        assert 1e3 * (one["total"][1][0] - one["TTFT"][1][0]) == pytest.approx(sum(steps), rel=0.02)
    tpot = found[201]["TPOT"][1]
    assert sum(tpot) / len(tpot) * 200 < 0.85 * sum(range(7, 207)), "the plain mean is too low"


# -- memory -----------------------------------------------------------------------------------------------------------


def test_the_peak_of_tensors_is_exact() -> None:
    """All tensors of one moment count: 12 MB before the first is freed, 10 MB after; earlier tensors do not count."""
    before = torch.zeros(1_000_000)

    def work() -> None:
        first, second = torch.zeros(1_000_000), torch.zeros(2_000_000)
        del first
        third = torch.zeros(500_000) + before[:500_000]
        del second, third

    assert memory.tensor_peak(CPU, work) == 12_000_000
    assert memory.tensor_peak(CPU, lambda: None) == 0


def test_pieces_are_counted_together() -> None:
    """What one piece of work keeps counts in the next until it is freed: 8 MB, then 8 and 4, then 4 and 2."""
    held: list[torch.Tensor] = []

    def exchange(count: int) -> None:
        held.append(torch.zeros(count))
        del held[:-1]

    pieces = [partial(exchange, count) for count in (2_000_000, 1_000_000, 500_000)]
    assert memory.tensor_peaks(CPU, pieces) == [8_000_000, 12_000_000, 6_000_000]


@pytest.mark.parametrize(
    "name", ["baseline", "streaming_2_6_3", "streaming_4_20_0", "streaming_4_20_45", "recompute_8"]
)
def test_peaks_are_those_of_the_whole_generation(name: str) -> None:
    """Measuring the prompt and the last steps finds the same peak as measuring every step."""
    model, prompt = tiny_model(), random_ids(12)
    found = memory.generation_peaks(parse(name), model, prompt, (5, 90))
    for stage, peak in zip((5, 90), found, strict=True):
        session = open_session(parse(name), model)

        def generate(session: Session = session, stage: int = stage) -> None:
            session.feed(prompt, last_only=True)
            for _ in range(stage - 1):
                session.feed(prompt[:, :1], last_only=True)

        expected = memory.tensor_peak(CPU, generate)
        session.close()
        assert peak == expected > 0
    made = generation.generate([parse(name)], model, prompt, [(5, 90)])[0]
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    assert [one["peak memory"] for one in made.values()] == [("bytes", [weights + (peak or 0)]) for peak in found]


def test_a_device_that_cannot_be_measured_gives_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of its tensors would be counted, which would look like little memory."""
    prompt = torch.zeros((1, 3), dtype=torch.long, device="meta")
    assert memory.generation_peaks(parse("baseline"), tiny_model(), prompt, (2, 5)) == [None, None]
    monkeypatch.setattr(memory, "COUNTED", ())
    assert "peak memory" not in generation.generate([parse("baseline")], tiny_model(), random_ids(3), [(2,)])[0][2]


# -- attention time ---------------------------------------------------------------------------------------------------


def test_stop_watch_adds_outer_calls_only() -> None:
    """A timed call inside a timed call is not added again; as a clock it times the wrapped part of a sample alone."""
    time = FakeTime()
    watch = steps.StopWatch(time.clock())
    inner = watch.wrap(time.work(1.0))

    def outer() -> None:
        time.work(2.0)()
        inner()

    watch.wrap(outer)()
    time.now += 50.0  # outside: not counted
    inner()
    assert (watch.elapsed, watch.calls) == (4.0, 2)

    def sample() -> None:
        time.work(7.0)()
        inner()

    assert interleave({"a": Side(sample)}, 2, CPU, clock=watch)["a"].ms == [1000.0] * 2


@pytest.mark.parametrize(("name", "calls"), [("baseline", 4), ("streaming_2_6_3", 4 + 3)])
def test_watching_counts_every_layer_and_changes_nothing(name: str, calls: int) -> None:
    """One update and one attention per layer; `StreamingCache` also begins a call and ends it, twice in the hooks."""
    model, ids = tiny_model(), random_ids(9)
    expected = model(input_ids=ids, use_cache=False).logits
    session = open_session(parse(name), model)
    with steps.attention_watched([session.cache], HostClock()) as watch:
        assert (session.feed(ids) - expected).abs().max() < 1e-5
    session.close()
    assert watch.calls == calls
    assert watch.elapsed > 0
    assert not {"_begin", "update", "_end"} & vars(session.cache).keys()
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


def test_attention_that_cannot_be_isolated_is_an_error() -> None:
    """If attention is not called through transformers, there is an error rather than a wrong number."""
    with (
        pytest.raises(LabError, match="cannot be isolated"),
        steps.attention_watched([DynamicCache()], HostClock()),
    ):
        pass
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


def test_probes_of_attention_take_turns() -> None:
    """Probes are spread over the generation from the end of the prompt; configurations are interleaved at each."""
    rows = [parse(name) for name in ("baseline", "streaming_2_6_3", "recompute_8")]
    told: list[str] = []
    probes = [(way, steps.places(12, 20, count), steps.STEPS) for way, count in zip(rows, (4, 4, 2), strict=True)]
    found = steps.measure("attention", "tiny", probes, tiny_model(), random_ids(30), lambda name: told.append(name[0]))
    assert "".join(told) == "bsr" * 6 + "bs" * 6
    assert [(one.configuration, one.at) for one in found] == [
        *(("baseline", place) for place in (12, 17, 22, 27)),
        *(("streaming_2_6_3", place) for place in (12, 17, 22, 27)),
        *(("recompute_8", place) for place in (12, 22)),
    ]
    assert all(len(one.samples) == steps.STEPS and min(one.samples) > 0 for one in found)
    assert {(one.part, one.subject, one.metric, one.unit) for one in found} == {
        ("attention", "tiny", "attention", "ms")
    }


def test_short_generations_have_fewer_probes() -> None:
    """Probes never overlap, and there is always at least one."""
    assert steps.places(500, 7, 16) == [500, 503]
    assert steps.places(500, 2, 16) == [500]
