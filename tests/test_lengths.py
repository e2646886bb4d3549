"""Lengths of calls by hand: how many columns run at once, how far positions reach; and steps, of one column each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from calling import CPU, POOL, begun, stream_of
from sinkwindow import Retention, StreamingCache
from sinkwindow.lanes import Inputs, Lane
from sinkwindow.storage.slots import PoolLane
from sinkwindow.stream.steps import Steps
from sinkwindow.stream.stream import Stream
from strategies import ModelSpec, call, tokens

# -- pieces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "columns", "length"),
    [
        (stream_of(0), 5, 5),
        (stream_of(0), 300, 256),
        (stream_of(0, rule=Retention(20, 4, 0)), 300, 2048 // 20),
        (stream_of(0, rule=Retention(20, 4, 1)), 300, 2048 // 10),
        (stream_of(0, rule=Retention(4096, 4, 1)), 300, 1),
        (stream_of(0, rule=Retention(4096, 4, 0)), 300, 1),
        (stream_of(0, rule=Retention(20, 4, 0, "call")), 300, 300),
        (stream_of(9, bound=14), 20, 14 - 7),
        (stream_of(9, bound=10), 20, 4),
        (stream_of(9, longest=20), 20, 20 - 7),
        (stream_of(9, bound=10, longest=20), 20, 20 - 7),
        (stream_of(3, rule=Retention(0, 600), longest=303), 300, 300),
        (stream_of(3, rule=Retention(0, 600), longest=302), 300, 256),
    ],
)
def test_pieces_are_as_long_as_masks_are_cheap(stream: Stream, columns: int, length: int) -> None:
    """256 columns, or 2,048 of copied sinks; fewer where positions end; a call that fits the slots is whole."""
    assert stream.piece_length(Inputs(1, columns, CPU, None), masked=True) == length


@pytest.mark.parametrize(
    ("real", "columns", "length"),
    [
        (None, 5, 1),
        ([[0, 4], [0, 1, 2, 3, 4]], 5, 1),
        ([[3, 4], [0, 1, 2, 3, 4]], 5, 4),
        ([[], [0, 1, 2, 3, 4]], 6, 6),
        ([[], [0, 1, 2, 3, 4, 5]], 6, 5),
    ],
)
def test_without_masks_pieces_end_at_evictions(real: list[list[int]] | None, columns: int, length: int) -> None:
    """The first row's list has room for one token, the second one's for five."""
    stream = stream_of(9, [list(range(9)), [6, 7, 8]])
    inputs = Inputs(2, columns, CPU, None if real is None else [*real])
    assert stream.piece_length(inputs, masked=False) == length


def test_a_call_has_room_where_its_tokens_and_the_list_fit_the_slots() -> None:
    """Slots of a stream that holds nothing are not there yet; padded calls and rings are another matter."""
    stream = stream_of(3)
    assert stream.has_room(Inputs(1, 16 - 3, CPU, None))
    assert not stream.has_room(Inputs(1, 16 - 2, CPU, None))
    assert not stream.has_room(Inputs(1, 3, CPU, [[1, 2]]))
    assert not stream_of(0).has_room(Inputs(1, 1, CPU, None))
    ring = Stream([replace(POOL, static=True)], 10**6)
    ring.commit(begun(ring, 3))
    assert not ring.has_room(Inputs(1, 1, CPU, None))


def test_positions_of_a_call_reach_to_both_sides() -> None:
    """From the first one, if it is below 0, to the one behind the last."""
    assert begun(stream_of(3), 4).reach == 7
    for lanes, reach in (
        ([(3, 7, 2)], 5),
        ([(0, 4, 9)], 9),
        ([(0, 4, 9), (5, 9, 2)], 9),
        ([(5, 12, 2), (0, 4, 9)], 10),
    ):
        columns, stream = max(after - before for before, after, _ in lanes), stream_of(0)
        real = [[*range(columns - (after - before), columns)] for before, after, _ in lanes]
        slots = replace(stream.state.pools[0], lanes=(PoolLane(),) * len(lanes))
        own = tuple(Lane(before, offset) for before, _, offset in lanes)
        stream.state = replace(stream.state, lanes=own, pools=(slots,))
        assert stream.begin(Inputs(len(lanes), columns, CPU, real)).reach == reach


def test_what_a_call_would_do_is_known_before_it() -> None:
    """Tokens of the longest row, and whether some row evicts."""
    stream = stream_of(5, [[0, 1, 2, 3, 4], [3, 4]])
    assert stream.preview(Inputs(2, 2, CPU, None)) == (7, False)
    assert stream.preview(Inputs(2, 3, CPU, None)) == (8, True)
    assert stream.preview(Inputs(2, 3, CPU, [[2], [0, 1, 2]])) == (6, False)
    assert Stream([POOL], 100).preview(Inputs(2, 3, CPU, [[], []])) == (0, False)


def test_a_call_may_be_as_long_as_the_table_of_positions() -> None:
    """And no longer: the error has both lengths; a copy has the same table."""
    stream = Stream([POOL], 100, longest=10)
    stream.commit(begun(stream, 6))
    aside = stream.begin(Inputs(1, 4, CPU, None), aside=True)
    aside.parts[0].update(0, torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"brings 5 columns and .* ends at 10"):
        begun(stream.fork(stream.after(aside)[0]), 5)
    for one in (stream, stream.fork(stream.state.cloned())):
        begun(one, 4)
        with pytest.raises(ValueError, match=r"brings 5 columns and 6 are cached, .* ends at 10"):
            begun(one, 5)


# -- what slots hold --------------------------------------------------------------------------------------------------


def test_a_window_that_moves_leaves_what_was_evicted_behind() -> None:
    """Also without sinks, of which none are put over it: a roll-back must not find it."""
    stream = stream_of(9, rule=Retention(0, 4, 1))
    before, moved = stream.state.pools[0], False
    while not moved:
        before = stream.state.pools[0]
        stream.commit(begun(stream, 1))
        moved = stream.state.pools[0].end <= before.end
    assert stream.state.pools[0].lanes[0].floor == before.lanes[0].evicted
    assert not stream.can_crop(4)


def test_sinks_are_not_in_front_of_a_window_that_was_moved() -> None:
    """Whatever number of tokens had been evicted."""
    stream = stream_of(4, rule=Retention(1, 2, 0))
    stream.record_past()
    assert stream.state.pools[0].lanes[0] == PoolLane(evicted=1, floor=2, placed=-1, mark=2)


# -- steps ------------------------------------------------------------------------------------------------------------


def test_steps_are_counted_by_the_stream() -> None:
    """With what they left of the past: seven tokens beyond the list; and a call between them is not forgotten."""
    stream = Stream([replace(POOL, static=True)], 10**6)
    stream.commit(begun(stream, 3))
    steps = Steps(stream, ["full_attention"])
    steps.follow()
    for _ in range(20):
        steps.begin({"input_ids": torch.zeros(1, 1)}, "sdpa")
        steps.update(0, torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))
        steps.commit()
    assert steps.state().lanes[0].seen == 23
    steps.sync()
    assert (stream.state.columns, stream.state.forwarded) == (23, 23)
    assert stream.state.pools[0].lanes == (PoolLane(evicted=16, floor=23 - 13),)
    stream.commit(begun(stream, 2))
    assert steps.state() is stream.state


def test_a_step_brings_one_token_for_each_row() -> None:
    """Another shape, a stream that holds nothing, another attention and a gradient are refused."""
    stream = Stream([replace(POOL, static=True)], 100)
    steps = Steps(stream, ["full_attention"])
    one = torch.zeros(1, 1)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"input_ids has shape \(1, 1\); a compiled call brings one token"):
            steps.begin({"input_ids": one}, "sdpa")
        steps.follow()
    stream.commit(begun(stream, 3))
    steps.follow()
    for ids, shape in ((torch.zeros(1, 2), "1, 2"), (torch.zeros(2, 1), "2, 1"), (torch.zeros(1, 2, 4), "1, 2")):
        with pytest.raises(ValueError, match=rf"input_ids has shape \({shape}\)"):
            steps.begin({"input_ids": ids}, "sdpa")
    with pytest.raises(ValueError, match="works with attn_implementation sdpa or eager, got 'flash'"):
        steps.begin({"input_ids": one}, "flash")
    mask = steps.begin({"input_ids": one}, "sdpa")["attention_mask"]
    assert isinstance(mask, torch.Tensor)  # where all layers have the same window
    assert mask.int().tolist() == [[[[1, 1, 1, 1, *[0] * 12]]]]
    states = torch.ones(1, 1, 1, 4)
    for key, value in ((states.requires_grad_(), states.detach()), (states.detach(), states)):
        with pytest.raises(RuntimeError, match="has no gradient"):
            steps.update(0, key, value)


# -- what a cache answers ---------------------------------------------------------------------------------------------


def test_the_default_rule_is_that_of_the_readme() -> None:
    """S=4, W=1,020, B=64; methods that take a layer mean the first one if none is given."""
    model = ModelSpec(layers=1, max_positions=2048).model()
    cache = StreamingCache(model)
    assert cache.retention == Retention(4, 1020, 64, "token")
    call(model, cache, tokens(0, 1, 5))
    assert (cache.get_mask_sizes(3), cache.get_query_offset(), cache.get_seq_length()) == ((8, 0), 5, 5)


def test_a_static_cache_returns_all_slots_to_a_step_alone() -> None:
    """Other calls get the list in front of their own columns, which are counted from the start of the text."""
    model = ModelSpec().model()
    cache = StreamingCache(model, 2, 4, 1, static=True)
    assert cache.get_mask_sizes(1) == (1, 0)
    call(model, cache, tokens(0, 1, 9))
    assert (cache.get_mask_sizes(1), cache.get_mask_sizes(2)) == ((16, 0), (7 + 2, 9 - 7))
    assert cache.get_query_offset() == 9
