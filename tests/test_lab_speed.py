"""Times and memory in the tables: fake clocks, interleaved sessions, tensors counted one by one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lab_tiny import generation, random_ids, tiny_model
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.measure import attention_time, memory, speed
from sinkwindow_lab.measure.timing import HostClock, spread
from sinkwindow_lab.records import SpeedRecord
from sinkwindow_lab.ways.configurations import parse
from sinkwindow_lab.ways.sessions import Session, open_session

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPT = torch.tensor([[1, 2, 3]])


class FakeTime:
    """A time that the fake model advances."""

    def __init__(self) -> None:
        self.now = 100.0

    def clock(self) -> HostClock:
        """Return a clock that reads this time."""
        return HostClock(now=lambda: self.now)


class FakeSession(Session):
    """A session whose calls take the given times, the last one repeatedly; it always predicts token 7."""

    def __init__(self, time: FakeTime, name: str, fed: list[tuple[str, list[int]]], times: list[float]) -> None:
        self._time, self._name, self._fed, self._times = time, name, fed, times
        self.evictions = 0

    def _feed(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        assert last_only
        self._fed.append((self._name, ids[0].tolist()))
        self._time.now += self._times.pop(0) if len(self._times) > 1 else self._times[0]
        return torch.nn.functional.one_hot(torch.tensor([[7]]), 10).float()

    @property
    def kept_tokens(self) -> int:
        """Return 0, since nothing is kept."""
        return 0

    @property
    def cache_bytes(self) -> int:
        """Return 0, since nothing is stored."""
        return 0


def fake_run(name: str, time: FakeTime, fed: list[tuple[str, list[int]]], sessions: list[list[float]]) -> speed.Run:
    """Return a run whose sessions, that of the warm-up first, take these times."""
    left = [list(times) for times in sessions]
    return speed.Run(lambda: FakeSession(time, name, fed, left.pop(0)), PROMPT, time.clock(), lambda: None)


# -- speed ------------------------------------------------------------------------------------------------------------


def test_generations_are_interleaved() -> None:
    """After the warm-up, prompts alternate, then tokens; a run that needs no more tokens is left out."""
    time, fed = FakeTime(), list[tuple[str, list[int]]]()
    prompts = 1 + speed.PROMPTS
    one = fake_run("a", time, fed, [[1.0]] * prompts)
    other = fake_run("b", time, fed, [[1.0]] * prompts)
    told: list[int] = []
    facts = speed.take_turns([one, other], [(2, 4), (2,)], told.append)
    warm = [[name, *[name] * speed.WARM_UP_TOKENS] for name in "ab"]
    order = [*warm[0], *warm[1], *"ab" * speed.PROMPTS, *"ab", *"aa"]
    assert [name for name, _ in fed] == order
    after = fed[2 * (1 + speed.WARM_UP_TOKENS) :]
    assert [ids for _, ids in after] == [[1, 2, 3]] * (2 * speed.PROMPTS) + [[7]] * 4
    assert [len(seen) for seen in facts] == [2, 1]
    assert told == [0, 0, 1, 1, 2, 3]


def test_each_run_has_its_own_times() -> None:
    """The first token has the median time of the prompts; time of other runs between two tokens is not counted."""
    time, fed = FakeTime(), list[tuple[str, list[int]]]()
    quick = fake_run("quick", time, fed, [[5.0], [9.0], [1.0], [2.0, 0.25, 0.5]])
    slow = fake_run("slow", time, fed, [[50.0], [70.0], [60.0], [80.0, 30.0, 40.0]])
    speed.take_turns([quick, slow], [(3,), (3,)])
    assert (quick.prompt_times(), quick.token_times()) == ([9.0, 1.0, 2.0], [2.0, 2.25, 2.75])
    assert (slow.prompt_times(), slow.token_times()) == ([70.0, 60.0, 80.0], [70.0, 100.0, 140.0])


def test_a_prompt_closes_the_session_before() -> None:
    """Only one session is open at a time: those of the warm-up and of earlier prompts would keep their caches."""
    time, fed = FakeTime(), list[tuple[str, list[int]]]()
    opened: list[FakeSession] = []
    closed: list[FakeSession] = []

    def start() -> FakeSession:
        session = FakeSession(time, "a", fed, [1.0])
        session.close = lambda: closed.append(session)  # type: ignore[method-assign]
        opened.append(session)
        return session

    run = speed.Run(start, PROMPT, time.clock(), lambda: None)
    speed.take_turns([run], [(2,)])
    assert closed == opened[:-1]
    run.close()
    run.close()
    assert closed == opened


def test_a_run_waits_for_the_device_before_it_starts() -> None:
    """Work that another run has queued on the device is not counted in this run's time."""
    time, fed = FakeTime(), list[tuple[str, list[int]]]()

    def wait() -> None:
        time.now += 100.0

    run = speed.Run(lambda: FakeSession(time, "a", fed, [1.0]), PROMPT, time.clock(), wait)
    speed.take_turns([run], [(3,)])
    assert run.token_times() == [1.0, 2.0, 3.0]


def test_a_failed_generation_removes_its_hooks() -> None:
    """Open sessions are closed; otherwise their hooks would stay on the model."""
    model = tiny_model()
    decoder = model.base_model
    with pytest.raises(RuntimeError, match="enough"):
        speed.generate([parse("streaming_2_6_3")], model, random_ids(9), [(5,)], on_token=_enough)
    assert not decoder._forward_pre_hooks
    assert not decoder._forward_hooks


def _enough(number: int) -> None:
    if number == 3:
        msg = "enough"
        raise RuntimeError(msg)


def test_the_clock_waits_for_the_device() -> None:
    """Time that the device needs after the call returned belongs to the step."""
    time = FakeTime()

    def wait() -> None:
        time.now += 10.0

    marks = [HostClock(now=lambda: time.now, wait=wait).mark() for _ in range(2)]
    assert marks[1] - marks[0] == 10.0


def test_generation_figures() -> None:
    """TTFT is the first time, TPOT leaves the first token out, throughput counts all tokens over all time."""
    record = generation([2.0, 2.25, 2.75])
    assert record.ttft_s == 2.0
    assert record.tpot_ms == 375.0
    assert record.total_s == 2.75
    assert record.throughput == 3 / 2.75
    assert record.step_ms == [250.0, 500.0]
    assert record.memory is not None
    assert record.memory.peak_gb == pytest.approx(0.55)


def test_medians_over_rounds() -> None:
    """One slow round does not change the median."""
    rounds = [generation([1.0, 1.1]), generation([1.0, 1.2]), generation([9.0, 19.0])]
    record = SpeedRecord(configuration="baseline", rounds=rounds)
    assert record.median("tpot_ms") == pytest.approx(200.0)
    assert record.median("ttft_s") == 1.0


@pytest.mark.parametrize("count", [-1, 0, 1])
def test_fewer_than_two_tokens_have_no_tpot(count: int) -> None:
    """The first token is a prefill: a time per token needs a second one."""
    with pytest.raises(LabError, match="generate 2 or more"):
        speed.generate([parse("baseline")], tiny_model(), PROMPT, [(count, 5)])


def test_measured_speed_is_complete() -> None:
    """The records have every round of every configuration."""
    rows, rounds = [parse("baseline"), parse("streaming_2_6_3")], list[int]()
    found = speed.measure(rows, tiny_model(), random_ids(12), 5, rounds=2, on_round=rounds.append)
    assert rounds == [0, 1]
    assert [(one.configuration, len(one.rounds)) for one in found] == [("baseline", 2), ("streaming_2_6_3", 2)]
    assert {one.generated_tokens for record in found for one in record.rounds} == {5}
    assert found[0].rounds[0].kept_tokens == 12 + 5 - 1  # the last token is not fed
    assert found[1].rounds[0].cache_bytes > 0


def test_a_short_generation_is_the_start_of_a_long_one() -> None:
    """Stages share their times; what is kept, stored and evicted is that at the end of each, as if it ran alone."""
    row, prompt = parse("streaming_2_6_3"), random_ids(7)
    _, (short, long) = speed.generate([parse("baseline"), row], tiny_model(), prompt, [(2,), (4, 30)])
    assert short.token_times_s == long.token_times_s[:4]
    assert (short.generated_tokens, long.generated_tokens) == (4, 30)
    alone = [speed.generate([row], tiny_model(), prompt, [(count,)])[0][0] for count in (4, 30)]
    for found, expected in zip((short, long), alone, strict=True):
        assert (found.kept_tokens, found.evictions) == (expected.kept_tokens, expected.evictions)
        assert (found.cache_bytes, found.memory) == (expected.cache_bytes, expected.memory)
    assert long.evictions > short.evictions


def test_spread_keeps_quartiles() -> None:
    """A spread has median and quartiles; one sample is its own spread; no samples are an error."""
    assert (spread([4.0, 1.0, 2.0, 3.0, 5.0]).median, spread([4.0, 1.0, 2.0, 3.0, 5.0]).upper) == (3.0, 4.0)
    assert spread([2.0]).lower == 2.0
    with pytest.raises(ValueError, match="nothing was measured"):
        spread([])


# -- memory -----------------------------------------------------------------------------------------------------------


def test_the_peak_of_tensors_is_exact() -> None:
    """All tensors of one moment count: 12 MB before the first is freed, 10 MB after; earlier tensors do not count."""
    before = torch.zeros(1_000_000)

    def work() -> None:
        first, second = torch.zeros(1_000_000), torch.zeros(2_000_000)
        del first
        third = torch.zeros(500_000) + before[:500_000]
        del second, third

    assert memory.tensor_peak(torch.device("cpu"), work) == 12_000_000
    assert memory.tensor_peak(torch.device("cpu"), lambda: None) == 0


def test_pieces_are_counted_together() -> None:
    """What one piece of work keeps counts in the next until it is freed: 8 MB, then 8 and 4, then 4 and 2."""
    held: list[torch.Tensor] = []

    def exchange(count: int) -> None:
        held.append(torch.zeros(count))
        del held[:-1]

    pieces = [partial(exchange, count) for count in (2_000_000, 1_000_000, 500_000)]
    assert memory.tensor_peaks(torch.device("cpu"), pieces) == [8_000_000, 12_000_000, 6_000_000]


@pytest.mark.parametrize(
    "name", ["baseline", "streaming_2_6_3", "streaming_4_20_0", "streaming_4_20_45", "recompute_8"]
)
def test_peaks_are_those_of_the_whole_generation(name: str) -> None:
    """Measuring the prompt and the last steps finds the same peak as measuring every step."""
    model, prompt = tiny_model(), random_ids(12)
    found = memory.generation_peaks(parse(name), model, prompt, (5, 90))
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    for stage, record in zip((5, 90), found, strict=True):
        session = open_session(parse(name), model)

        def generate(session: Session = session, stage: int = stage) -> None:
            session.feed(prompt, last_only=True)
            for _ in range(stage - 1):
                session.feed(prompt[:, :1], last_only=True)

        expected = memory.tensor_peak(torch.device("cpu"), generate)
        session.close()
        assert record is not None
        assert (record.weight_bytes, record.tensor_bytes) == (weights, expected)


def test_a_device_that_cannot_be_measured_gives_no_number() -> None:
    """None of its tensors would be counted, which would look like little memory."""
    prompt = torch.zeros((1, 3), dtype=torch.long, device="meta")
    assert memory.generation_peaks(parse("baseline"), tiny_model(), prompt, (2, 5)) == [None, None]
    record = generation([1.0, 2.0]).model_copy(update={"memory": None})
    assert SpeedRecord(configuration="baseline", rounds=[record]).peak_gb is None


# -- attention time ---------------------------------------------------------------------------------------------------


def test_stop_watch_adds_outer_calls_only() -> None:
    """A timed call inside a timed call is not added again."""
    time = FakeTime()
    watch = attention_time.StopWatch(time.clock())

    def step(seconds: float) -> Callable[[], None]:
        def run() -> None:
            time.now += seconds

        return run

    inner = watch.wrap(step(1.0))

    def outer() -> None:
        step(2.0)()
        inner()

    watch.wrap(outer)()
    time.now += 50.0  # outside: not counted
    inner()
    assert (watch.seconds, watch.calls) == (4.0, 2)


def test_watching_counts_every_layer_and_changes_nothing() -> None:
    """There is one update and one attention per layer; the cache, transformers and the logits are unchanged."""
    model, ids, cache = tiny_model(), random_ids(9), DynamicCache()
    expected = model(input_ids=ids, use_cache=False).logits
    with attention_time.attention_watched(cache, HostClock()) as watch:
        session = open_session(parse("baseline"), model)
        session.cache = cache
        assert torch.equal(session.feed(ids), expected)
    assert watch.calls == 2 * 2
    assert watch.seconds > 0
    assert "update" not in vars(cache)
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


def test_attention_that_cannot_be_isolated_is_an_error() -> None:
    """If attention is not called through transformers, there is an error rather than a wrong number."""
    with (
        pytest.raises(LabError, match="cannot be isolated"),
        attention_time.attention_watched(DynamicCache(), HostClock()),
    ):
        pass
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


def test_probes_of_attention_are_interleaved() -> None:
    """Probes are spread over the generation from the end of the prompt; each place has all configurations."""
    rows = [parse(name) for name in ("baseline", "streaming_2_6_3", "recompute_8")]
    told: list[int] = []
    found = attention_time.measure(
        rows, tiny_model(), random_ids(30), prompt_tokens=12, new_tokens=20, probes=[4, 4, 2], on_probe=told.append
    )
    assert told == [12, 12, 12, 17, 17, 22, 22, 22, 27, 27]
    for record, places in zip(found, ([12, 17, 22, 27], [12, 17, 22, 27], [12, 22]), strict=True):
        assert [probe.tokens_seen for probe in record.probes] == places
        assert all(len(probe.step_ms) == 3 and min(probe.step_ms) > 0 for probe in record.probes)
        assert record.milliseconds > 0
    short = found[0].until(10)
    assert ([probe.tokens_seen for probe in short.probes], short.generated_tokens) == ([12, 17], 10)


def test_short_generations_have_fewer_probes() -> None:
    """Probes never overlap, and there is always at least one."""
    assert attention_time.places(500, 7, 16) == [500, 503]
    assert attention_time.places(500, 2, 16) == [500]
