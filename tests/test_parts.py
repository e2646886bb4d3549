"""Parts of a stream by hand: weights of copied sinks, previews, events, records; and parts that do not go together."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from calling import CPU, POOL, RETENTION, begun, stream_of
from sinkwindow import Retention
from sinkwindow.lanes import Inputs, Lane
from sinkwindow.storage.bank import KeyValue, allocate
from sinkwindow.storage.slots import PoolLane, Slots
from sinkwindow.stream.events import Eviction
from sinkwindow.stream.history import _shortened, select_past, tokens_fed
from sinkwindow.stream.state import CallRecord, Snapshot, State
from sinkwindow.stream.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sinkwindow.stream.call import StreamCall


def test_weights_of_copies_go_to_the_sinks_themselves() -> None:
    """Sinks are at the head of each row's list, which is right-aligned, or among the columns of the call."""
    stream = stream_of(9, [list(range(9)), [6, 7, 8], [8], []])
    call = begun(stream, 12, [list(range(12)), list(range(12)), list(range(2, 12)), [11]])
    (part,) = call.parts
    assert (part.held, part.epochs, part.front) == (7, 6, 12 + 7)
    weights = torch.rand(4, 3, 12, part.front + 12, dtype=torch.float64)
    expected = weights[..., 12:].clone()
    for row, columns in enumerate([[0, 1], [4, 5], [6, 7 + 2], [7 + 11]]):
        for sink, column in enumerate(columns):
            expected[row, ..., column] += sum(weights[row, ..., sink + 2 * epoch] for epoch in range(6))
    assert torch.allclose(part.fold(weights), expected, atol=1e-12)


def test_weights_without_copies_are_returned_as_they_are() -> None:
    """Where no epoch begins, and without sinks."""
    weights = torch.rand(1, 3, 1, 8)
    assert begun(stream_of(9), 1).parts[0].fold(weights) is weights
    (part,) = begun(stream_of(9, rule=Retention(0, 4, 1)), 3).parts
    weights = torch.rand(1, 3, 3, part.front + 3)
    assert part.fold(weights) is weights


def test_events_say_what_left_and_what_stayed() -> None:
    """Rows that agree are listed eviction by eviction, others row by row; a call of evict="call" has one each."""
    stream = Stream([POOL], 100)
    call = stream.begin(Inputs(2, 10, CPU, None))
    states = torch.ones(2, 1, 10, 4)
    call.parts[0].update(0, states, states)
    both = [Eviction(row, tokens, 8, 6) for tokens in (range(2, 4), range(4, 6)) for row in (0, 1)]
    assert stream.commit(call) == both
    stream = Stream([POOL], 100)
    assert stream.commit(begun(stream, 10, [list(range(10)), list(range(2, 10))])) == [
        Eviction(0, range(2, 4), 8, 6),
        Eviction(0, range(4, 6), 8, 6),
        Eviction(1, range(2, 4), 8, 6),
    ]
    stream = Stream([replace(POOL, retention=Retention(2, 4, 1, "call"))], 100)
    assert stream.commit(begun(stream, 10)) == [Eviction(0, range(2, 6), 10, 6)]


def test_columns_that_held_tokens_are_remembered() -> None:
    """Padding is that of recorded calls, of each row or of all; the default device does not matter."""
    record = CallRecord(1, 3, ([2], None), (Lane(1), Lane(1)), ((0, 0),))
    with torch.device("meta"):
        fed = tokens_fed((record, CallRecord(4, 1, ([],), (Lane(2),), ((0,),))), 2)
    assert fed.int().tolist() == [[1, 0, 0, 1, 0], [1, 1, 1, 1, 0]]
    assert fed.dtype == torch.bool


def test_records_of_chosen_rows_are_theirs() -> None:
    """A record of rows that agreed is that of any rows."""
    lanes = [Lane(3, 0, 1), Lane(4, 0, 2), Lane(2)]
    rows = CallRecord(4, 2, ([0], None, []), tuple(lanes), ((1, 2, 0), (5, 6, 7)))
    agreed = CallRecord(6, 1, (None,), (Lane(5),), ((2,), (7,)))
    chosen = CallRecord(4, 2, ([], [0], [0]), (lanes[2], lanes[0], lanes[0]), ((0, 1, 1), (7, 5, 5)))
    assert select_past((rows, agreed), [2, 0, 0]) == (chosen, agreed)


@pytest.mark.parametrize(
    ("column", "columns", "real"),
    [
        (7, 3, ([0, 2], None, [])),
        (8, 3, ([0, 2], None, [])),
        (6, 2, (range(1), None, [])),
        (5, 1, (range(1), None, [])),
    ],
)
def test_a_record_ends_where_columns_are_taken_back(
    column: int, columns: int, real: tuple[Sequence[int] | None, ...]
) -> None:
    """Before its own first column nothing of it is left."""
    first = CallRecord(0, 4, ([1], None, [2]), (Lane(),) * 3, ((0, 0, 0),))
    second = CallRecord(4, 3, ([0, 2], None, []), (Lane(1), Lane(4), Lane(1)), ((0, 0, 0),))
    assert _shortened((first, second), column) == (first, replace(second, columns=columns, real=real))
    assert _shortened((first, second), 4) == (first,)
    assert _shortened((), column) == ()
    stream = stream_of(9, [list(range(9)), list(range(8))])
    stream.crop(2)
    assert [(record.columns, record.real) for record in stream.state.past] == [(7, (range(7), range(7)))]


def test_columns_without_padding_held_tokens() -> None:
    """There is no record of them."""
    assert tokens_fed((), 2).shape == (2, 0)


def test_a_snapshot_names_what_differs() -> None:
    """Settings and short facts of the model by value, digests by name alone; `on_overflow` may differ."""
    snapshot = Snapshot({"window": 4, "on_overflow": "evict"}, {"dtype": "float32", "weights": "a" * 33}, State(()))
    snapshot.check({"window": 4, "on_overflow": "error"}, {"weights": "unknown", "dtype": "float32"})
    replace(snapshot, model={"weights": "unknown"}).check({}, {"weights": "a"})
    with pytest.raises(ValueError, match="dtype"):  # what is known is compared
        snapshot.check({}, {"weights": "unknown", "dtype": "float64"})
    for settings, model, words in (
        ({"window": "5" * 33}, {}, f"a cache with window=4, this one has window='{'5' * 33}'"),
        ({}, {"dtype": "b" * 32}, f"a model with dtype='float32', this one has dtype='{'b' * 32}'"),
        ({}, {"weights": "b" * 33}, "a model with other weights"),
        ({"static": True}, {}, "a cache with static=None, this one has static=True"),
        ({"window": "unknown"}, {}, "a cache with window=4, this one has window='unknown'"),
    ):
        with pytest.raises(ValueError, match=f"The snapshot is of {words}: a cache that goes on from it"):
            snapshot.check(settings, model)


def test_tensors_are_used_again_where_they_fit() -> None:
    """Of the same layers, shapes and dtypes; a text that needs others gets others."""
    like = {0: KeyValue(torch.zeros(2, 3, 1, 4), torch.zeros(2, 3, 1, 5))}
    like[1] = like[0]
    (bank,) = allocate([0, 1], like, 9, 2, apart=False)
    assert [tuple(tensor.shape) for tensor in bank.tensors] == [
        (2, 2, 3, tokens, width) for tokens in (9, 2) for width in (4, 5)
    ]
    assert allocate([0, 1], like, 9, 2, apart=False, spare=[bank]) == [bank]
    wider = {layer: KeyValue(pair.keys, torch.zeros(2, 3, 1, 6)) for layer, pair in like.items()}
    double = {layer: KeyValue(*(tensor.double() for tensor in pair)) for layer, pair in like.items()}
    for layers, other, size, sinks, apart in (
        ([1, 0], like, 9, 2, False),
        ([0, 1], like, 8, 2, False),
        ([0, 1], like, 9, 1, False),
        ([0, 1], like, 9, 2, True),
        ([0, 1], wider, 9, 2, False),
        ([0, 1], double, 9, 2, False),
    ):
        assert bank not in allocate(layers, other, size, sinks, apart=apart, spare=[bank])
    with pytest.raises(ValueError, match="zip"):
        bank.has([])


def test_larger_tensors_of_a_recorded_past_are_given_back() -> None:
    """The next text takes those of the usual size; until then a second `reset` keeps them."""
    stream = stream_of(9)
    emptied = POOL.emptied(stream.state.pools[0])
    assert emptied.spare == stream.state.pools[0].banks == POOL.emptied(emptied).spare
    stream.record_past()
    assert POOL.emptied(stream.state.pools[0]).spare == ()


@pytest.mark.parametrize("static", [False, True])
def test_cached_tensors_become_wider_before_a_call_alone(*, static: bool) -> None:
    """Not where a graph or a layer of the call has read them; narrower ones are refused, except under autocast."""
    stream = Stream([replace(POOL, layers=(0, 1), static=static)], 100)
    single = torch.ones(1, 1, 3, 4)
    call = stream.begin(Inputs(1, 3, CPU, None))
    for layer in (0, 1):
        call.parts[0].update(layer, single, single)
    stream.commit(call)
    call = stream.begin(Inputs(1, 3, CPU, None))
    if static:
        with pytest.raises(ValueError, match=r"keys and values are torch\.float64"):
            call.parts[0].update(0, single.double(), single)
        return
    call.parts[0].update(0, single, single)
    with pytest.raises(
        ValueError, match=r"keys and values are torch\.float32, torch.float64 of 1 heads on cpu, and this"
    ):
        call.parts[0].update(1, single, single.double())
    call = stream.begin(Inputs(1, 3, CPU, None))
    for layer in (0, 1):
        keys, values = call.parts[0].update(layer, single, single.double())
        assert (keys.dtype, values.dtype) == (torch.float32, torch.float64)
    stream.commit(call)
    keys, values = stream.begin(Inputs(1, 3, CPU, None)).parts[0].update(0, single.double(), single.double())
    assert (keys.dtype, values.dtype) == (torch.float64, torch.float64)
    call = stream.begin(Inputs(1, 3, CPU, None))
    with pytest.raises(ValueError, match="Undo that, or feed the text again"):
        call.parts[0].update(0, single, single)
    with torch.autocast("cpu", torch.bfloat16):
        assert call.parts[0].update(0, single, single)[1].dtype == torch.float64


def test_a_crop_over_an_eviction_leaves_no_sinks_in_place() -> None:
    """They lie over tokens that are in the window again; a crop that takes no eviction back leaves them."""
    stream = stream_of(7)
    stream.commit(begun(stream, 1))
    stream.crop(1)
    assert stream.state.pools[0].lanes == (PoolLane(0, 0, 2, -1, 0),)
    stream.commit(begun(stream, 1))
    stream.commit(begun(stream, 1))
    stream.crop(1)
    assert stream.state.pools[0].lanes == (PoolLane(2, 0, 4, 2, 0),)


def test_rows_that_lose_unequal_counts_keep_their_recorded_past() -> None:
    """Their windows are moved, with what was evicted while recording, so that more can be taken back."""
    stream = stream_of(12, [list(range(12)), list(range(12))])
    stream.record_past()
    stream.commit(begun(stream, 3, [[0, 1, 2], [0]]))
    for columns in (1, 2):
        assert stream.can_crop(columns)
        stream.crop(columns)
    assert [lane.seen for lane in stream.state.lanes] == [12, 12]


def test_a_forgotten_past_begins_at_the_window() -> None:
    """What was evicted while recording may be written over from then on."""
    stream = stream_of(9)
    stream.record_past()
    stream.commit(begun(stream, 4))
    assert stream.state.pools[0].lanes[0].mark == RETENTION.first(2)
    assert POOL.must_copy(stream.state.pools[0])
    stream.forget_past()
    assert stream.state.pools[0].lanes[0].mark == RETENTION.first(6)
    assert not POOL.must_copy(stream.state.pools[0])


def test_a_list_without_a_window_can_always_be_reached() -> None:
    """With S=2, the list of one or two tokens needs no slot of the window; that of three needs token 2."""
    row = PoolLane(evicted=8, floor=7)
    assert [POOL.reachable(row, seen, 0) for seen in (1, 2, 3)] == [True, True, False]
    assert [POOL.reachable(row, 20, evicted) for evicted in (4, 5, 6)] == [False, True, True]


def test_a_state_with_other_tensors_has_none_to_spare() -> None:
    """Its pools must not hand the old ones to the next text."""
    state = stream_of(3).state
    (held,) = replace(state, pools=(Slots(spare=state.pools[0].banks),)).with_banks([state.pools[0].banks]).pools
    assert (held.banks, held.spare) == (state.pools[0].banks, ())


def _two_lanes(stream: Stream) -> Stream:
    stream.state = replace(stream.state, lanes=stream.state.lanes * 2)
    return stream


def _no_pool(stream: Stream) -> Stream:
    stream.state = replace(stream.state, pools=())
    return stream


@pytest.mark.parametrize(
    "act",
    [
        lambda: POOL.held(stream_of(3).state.pools[0], stream_of(3).state.lanes * 2),
        lambda: POOL.relocation(stream_of(3).state.pools[0], stream_of(3).state.lanes * 2, recording=False),
        lambda: POOL.place_sinks(stream_of(3).state.pools[0], stream_of(3).state.lanes * 2, [], 3),
        lambda: POOL.place_sinks(stream_of(3).state.pools[0], stream_of(3).state.lanes, [], 3),
        lambda: _two_lanes(stream_of(3)).preview(Inputs(1, 1, CPU, None)),
        lambda: _two_lanes(stream_of(3)).begin(Inputs(1, 1, CPU, None)),
        lambda: _two_lanes(stream_of(9)).can_crop(1),
        lambda: _no_pool(stream_of(3)).has_room(Inputs(1, 1, CPU, None)),
        lambda: _no_pool(stream_of(3)).can_crop(1),
        lambda: _no_pool(stream_of(3)).record_past(),
        lambda: _no_pool(stream_of(3)).forget_past(),
        lambda: _no_pool(stream_of(3)).reset(),
    ],
)
def test_parts_that_do_not_go_together_are_refused(act: Callable[[], object]) -> None:
    """A lane or a pool is never left out without a word."""
    with pytest.raises(ValueError, match="zip"):
        act()


@pytest.mark.parametrize(
    "act",
    [
        lambda _, call: call.parts[0].outcome(),
        lambda _, call: call.parts[0].is_uneven(),
        lambda _, call: call.parts[0].fold(torch.zeros(1, 1, 4, call.parts[0].front + 4)),
        lambda stream, call: stream.commit(call),
    ],
)
def test_lanes_that_are_not_those_of_the_slots_are_refused(act: Callable[[Stream, StreamCall], object]) -> None:
    """A lane is never left out without a word."""
    stream = stream_of(9)
    call = begun(stream, 4)
    (part,) = call.parts
    part.slots = replace(part.slots, lanes=part.slots.lanes * 2)
    part._aside = None
    with pytest.raises(ValueError, match="zip"):
        act(stream, call)


def test_narrowed_slots_are_views() -> None:
    """Of keys and of values, along the slots."""
    pair = KeyValue(torch.arange(24).view(1, 1, 2, 6, 2), torch.arange(12).view(1, 1, 2, 6, 1))
    run = pair.narrowed(2, 3)
    assert torch.equal(run.keys, pair.keys[:, :, :, 2:5])
    assert torch.equal(run.values, pair.values[:, :, :, 2:5])
    assert run.keys.data_ptr() == pair.keys[:, :, :, 2].data_ptr()
