"""What the lab measures is what it says: arithmetic with fake clocks, and sessions against their definitions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lab_tiny import generation, random_ids, tiny_model
from sinkwindow.lab import attention_time, memory, speed
from sinkwindow.lab.configurations import parse
from sinkwindow.lab.errors import LabError
from sinkwindow.lab.memory import peak_memory
from sinkwindow.lab.records import SpeedRecord
from sinkwindow.lab.sessions import Session, open_session
from sinkwindow.lab.timing import HostClock, spread
from sinkwindow_reference import reference_logits

if TYPE_CHECKING:
    from collections.abc import Callable

NAMES = (
    "baseline",
    "streaming_2_6_3",
    "window_0_8",
    "recompute_8",
    "stale_ranks_2_6_3",
    "eager_eviction_2_6_0",
    "absolute_2_6_3",
)


class FakeTime:
    """A clock that the fake model moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def clock(self) -> HostClock:
        """A clock that reads this time."""
        return HostClock(now=lambda: self.now)


class FakeSession(Session):
    """Takes 2 s for a prefill, then a given time for each token; always predicts token 7."""

    def __init__(self, time: FakeTime, steps: list[float]) -> None:
        self._time, self._steps = time, [2.0, *steps]
        self.fed: list[list[int]] = []

    def _feed(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        assert last_only
        self.fed.append(ids[0].tolist())
        self._time.now += self._steps.pop(0)
        return torch.nn.functional.one_hot(torch.tensor([[7]]), 10).float()

    @property
    def kept_tokens(self) -> int:
        """Nothing is kept."""
        return 0


def feed_in(session: Session, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Logits of calls of these sizes, the last one repeated."""
    parts, start = [], 0
    while start < ids.shape[1]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        parts.append(session.feed(ids[:, start : start + size]))
        start += size
    session.close()
    return torch.cat(parts, dim=1)


def logits_of(name: str, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Logits of a fresh session of this configuration."""
    return feed_in(open_session(parse(name), tiny_model()), ids, sizes)


# -- speed ------------------------------------------------------------------------------------------------------------


def test_token_times_come_from_the_clock() -> None:
    """The prefill counts into the first token, every later token is fed alone, nothing is fed after the last."""
    time = FakeTime()
    session = FakeSession(time, [0.25, 0.5])
    assert speed.token_times(session, torch.tensor([[1, 2, 3]]), 3, clock=time.clock()) == [2.0, 2.25, 2.75]
    assert session.fed == [[1, 2, 3], [7], [7]]


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
    assert record.memory.peak_gb == pytest.approx(0.55)


def test_medians_over_rounds() -> None:
    """One slow round does not move the median."""
    rounds = [generation([1.0, 1.1]), generation([1.0, 1.2]), generation([9.0, 19.0])]
    record = SpeedRecord(configuration="baseline", rounds=rounds)
    assert record.median("tpot_ms") == pytest.approx(200.0)
    assert record.median("ttft_s") == 1.0


@pytest.mark.parametrize("count", [-1, 0, 1])
def test_fewer_than_two_tokens_have_no_tpot(count: int) -> None:
    """The first token is a prefill: a time per token needs a second one."""
    with pytest.raises(LabError, match="generate 2 or more"):
        speed.token_times(FakeSession(FakeTime(), []), torch.tensor([[1]]), count, clock=FakeTime().clock())


def test_measured_speed_is_complete_and_interleaved() -> None:
    """Every round of every configuration is there, in the order a, b, a, b."""
    order: list[str] = []
    rows = [parse("baseline"), parse("streaming_2_6_3")]
    found = speed.measure(
        rows, tiny_model(), random_ids(12), [5, 4], rounds=2, on_start=lambda one, _: order.append(one.name)
    )
    assert order == ["baseline", "streaming_2_6_3"] * 2
    assert [[one.generated_tokens for one in record.rounds] for record in found] == [[5, 5], [4, 4]]
    assert found[0].rounds[0].kept_tokens == 12 + 5 - 1  # the last token is not fed
    assert found[1].rounds[0].cache_bytes > 0


def test_a_short_generation_is_the_start_of_a_long_one() -> None:
    """Stages share their times; what is kept, stored and evicted is that of their own place."""
    row, prompt = parse("streaming_2_6_3"), random_ids(7)
    short, long = speed.measure_stages(row, tiny_model(), prompt, (4, 30))
    assert short.token_times_s == long.token_times_s[:4]
    assert (short.generated_tokens, long.generated_tokens) == (4, 30)
    alone = [speed.measure_round(row, tiny_model(), prompt, count) for count in (4, 30)]
    for found, expected in zip((short, long), alone, strict=True):
        assert (found.kept_tokens, found.evictions) == (expected.kept_tokens, expected.evictions)
        assert found.cache_bytes == expected.cache_bytes
    assert short.memory.peak_bytes <= long.memory.peak_bytes
    assert long.evictions > short.evictions


def test_recomputation_reads_a_context_without_running_it() -> None:
    """What follows is as if it had run; the window holds the same tokens."""
    ids, model = random_ids(30), tiny_model()
    quiet, busy = (open_session(parse("recompute_8"), model) for _ in range(2))
    ran: list[object] = []
    handle = model.register_forward_hook(lambda *_: ran.append(1))
    quiet.read(ids[:, :20])
    quiet.read(ids[:, 20:29])
    handle.remove()
    busy.feed(ids[:, :20])
    busy.feed(ids[:, 20:29])
    assert ran == []
    assert (quiet.kept_tokens, quiet.evictions) == (busy.kept_tokens, busy.evictions) == (8, 21)
    assert torch.equal(quiet.feed(ids[:, 29:]), busy.feed(ids[:, 29:]))


def test_a_record_inside_the_block_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no sample was taken in between."""
    monkeypatch.setattr(memory, "INTERVAL", 1e6)
    with peak_memory(torch.device("cpu"), weight_bytes=1_000) as watch:
        held = torch.ones(20_000_000)
        inside = watch.record()
    assert inside.peak_bytes - inside.before_bytes > 60_000_000
    assert held[0] == 1


def test_the_peak_of_tensors_is_exact() -> None:
    """What lives at once counts: 12 MB before the first is freed, 10 MB after; what was there before does not."""
    before = torch.zeros(1_000_000)

    def work() -> None:
        first, second = torch.zeros(1_000_000), torch.zeros(2_000_000)
        del first
        third = torch.zeros(500_000) + before[:500_000]
        del second, third

    assert memory.tensor_peak(torch.device("cpu"), work) == 12_000_000
    assert memory.tensor_peak(torch.device("cpu"), lambda: None) == 0


def test_peak_memory_sees_an_allocation() -> None:
    """A tensor that lives and dies inside the block shows in its peak."""
    with peak_memory(torch.device("cpu"), weight_bytes=1_000) as watch:
        torch.ones(20_000_000)
    record = watch.record()
    assert record.peak_bytes - record.before_bytes > 60_000_000
    assert record.peak_gb > 0.06


def test_spread_keeps_quartiles() -> None:
    """Median and quartiles; one sample is its own spread; none is an error."""
    assert (spread([4.0, 1.0, 2.0, 3.0, 5.0]).median, spread([4.0, 1.0, 2.0, 3.0, 5.0]).upper) == (3.0, 4.0)
    assert spread([2.0]).lower == 2.0
    with pytest.raises(ValueError, match="nothing was measured"):
        spread([])


# -- sessions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_call_lengths_do_not_matter(name: str) -> None:
    """Whatever the calls, each token gets the logits that it gets one token at a time."""
    ids = random_ids(40)
    alone = logits_of(name, ids, [1])
    for sizes in ([40], [1, 9, 2, 13, 7], [3]):
        assert (logits_of(name, ids, sizes) - alone).abs().max() < 1e-9


@pytest.mark.parametrize(
    "name",
    [
        "streaming_2_60_3",
        "recompute_60",
        "stale_ranks_2_60_3",
        "eager_eviction_2_60_5",
        "call_2_60",
        "absolute_2_60_3",
    ],
)
def test_nothing_evicted_is_dense(name: str) -> None:
    """With room for everything all configurations are the baseline."""
    ids = random_ids(40)
    # Ours makes RoPE's angles in float64, the stock model in float32: 1e-6 apart on these logits.
    assert (logits_of(name, ids, [7]) - logits_of("baseline", ids, [40])).abs().max() < 1e-5


def test_streaming_is_the_reference() -> None:
    """The lab's streaming session is the product: the reference's logits."""
    ids = random_ids(40)
    expected = reference_logits(tiny_model(), ids, num_sinks=2, window=6, buffer=3)
    assert (logits_of("streaming_2_6_3", ids, [40]) - expected).abs().max() < 1e-9


def test_recomputation_is_a_dense_pass_over_each_window() -> None:
    """Token t sees exactly the last W tokens, at positions from 0."""
    ids = random_ids(30)
    found = logits_of("recompute_8", ids, [11])
    for last in range(30):
        window = ids[:, max(0, last - 7) : last + 1]
        expected = tiny_model()(input_ids=window, use_cache=False).logits[:, -1]
        assert (found[:, last] - expected).abs().max() < 1e-9


def test_eager_eviction_by_single_tokens_loses_one_token() -> None:
    """Cut to S + W before attention: the same as keeping one fewer after it. Ranks are right, only tokens miss."""
    ids = random_ids(40)
    expected = reference_logits(tiny_model(), ids, num_sinks=2, window=5, buffer=0)
    assert (logits_of("eager_eviction_2_6_0", ids, [40]) - expected).abs().max() < 1e-6  # the model's own float32 RoPE


def test_stale_ranks_retain_what_streaming_retains_and_differ() -> None:
    """The only mistake is the position: same tokens, same evictions, other logits after the first eviction."""
    ids = random_ids(40)
    stale, right = (open_session(parse(name), tiny_model()) for name in ("stale_ranks_2_6_3", "streaming_2_6_3"))
    difference = (stale.feed(ids) - right.feed(ids)).abs().amax(dim=(0, 2))
    assert (stale.kept_tokens, stale.evictions) == (right.kept_tokens, right.evictions)
    assert difference[:12].max() < 1e-6  # up to and with the query that sees S + W + B + 1 tokens
    assert difference[12:].max() > 1e-2
    right.close()


@pytest.mark.parametrize("size", [1, 7, 40])
def test_calls_see_themselves_whole(size: int) -> None:
    """The seed's chunk-wise rule is the reference's, and the cache is cut to S + W after each call only."""
    ids, sizes = random_ids(40), [size] * (40 // size) + [40 % size] * (40 % size > 0)
    expected = reference_logits(tiny_model(), ids, num_sinks=2, window=6, evict="call", chunks=sizes)
    assert (logits_of("call_2_6", ids, [size]) - expected).abs().max() < 1e-9


def test_absolute_positions_retain_what_streaming_retains_and_differ() -> None:
    """The keys of the right tokens, rotated by their places in the text: other distances to the sinks."""
    ids = random_ids(40)
    absolute, right = (open_session(parse(name), tiny_model()) for name in ("absolute_2_6_3", "streaming_2_6_3"))
    found = absolute.feed(ids)
    kept = absolute.cache.retained_tokens
    absolute.close()
    difference = (found - right.feed(ids)).abs().amax(dim=(0, 2))
    assert kept == right.cache.retained_tokens
    assert difference[:12].max() < 1e-6
    assert difference[12:].max() > 1e-2
    right.close()


def test_absolute_positions_end_at_the_trained_length() -> None:
    """What no longer fits is refused, with the length in the message."""
    session = open_session(parse("absolute_2_6_3"), tiny_model())
    with pytest.raises(LabError, match="512"):
        session.feed(random_ids(513))
    session.close()


def test_closing_leaves_the_model_clean() -> None:
    """After a session an ordinary call gives what it gave before."""
    ids = random_ids(20)
    before = tiny_model()(input_ids=ids, use_cache=False).logits
    logits_of("streaming_2_6_3", ids, [20])
    assert torch.equal(tiny_model()(input_ids=ids, use_cache=False).logits, before)


@pytest.mark.parametrize("name", NAMES)
def test_last_only_gives_the_last_logits(name: str) -> None:
    """A prefill needs one row of logits: it is the last of all."""
    ids = random_ids(23)
    session = open_session(parse(name), tiny_model())
    last = session.feed(ids, last_only=True)
    session.close()
    assert last.shape[1] == 1
    assert (last - logits_of(name, ids, [23])[:, -1:]).abs().max() < 1e-9


def test_cache_bytes_are_exact() -> None:
    """Keys and values, two layers, two heads of four channels in float64."""
    session = open_session(parse("baseline"), tiny_model())
    session.feed(random_ids(10))
    assert session.cache_bytes == 2 * 2 * 2 * 4 * 8 * 10


# -- attention time ---------------------------------------------------------------------------------------------------


def test_stop_watch_adds_outer_calls_only() -> None:
    """A timed call inside a timed call is part of it."""
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


def test_watching_counts_every_layer_and_leaves_no_trace() -> None:
    """One update and one attention per layer; the cache and transformers are as before, the logits too."""
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
    """A model that calls its own attention gives no number rather than a wrong one."""
    with (
        pytest.raises(LabError, match="cannot be isolated"),
        attention_time.attention_watched(DynamicCache(), HostClock()),
    ):
        pass
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


@pytest.mark.parametrize("name", ["baseline", "streaming_2_6_3", "recompute_8"])
def test_attention_probes_are_spread_over_the_generation(name: str) -> None:
    """Places start at the prompt's end, samples are positive, and the mean is of medians."""
    found = attention_time.measure(parse(name), tiny_model(), random_ids(30), prompt_tokens=12, new_tokens=20, probes=4)
    assert [probe.tokens_seen for probe in found.probes] == [12, 17, 22, 27]
    assert all(len(probe.step_ms) == 3 and min(probe.step_ms) > 0 for probe in found.probes)
    assert found.milliseconds > 0


def test_short_generations_have_fewer_probes() -> None:
    """Places never overlap, and there is always one."""
    assert attention_time.places(500, 7, 16) == [500, 503]
    assert attention_time.places(500, 2, 16) == [500]
