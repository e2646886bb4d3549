"""What is counted of a row, by hand: its tokens, their columns, natural indices and positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from sinkwindow.lanes import Inputs, Lane, LaneCall, batch_slice

if TYPE_CHECKING:
    from collections.abc import Iterator

CPU, META = torch.device("cpu"), torch.device("meta")
PADDED = LaneCall(Lane(5, 2), Lane(7, 2), 4, [1, 3])
PLAIN = LaneCall(Lane(5, 2), Lane(7, 2), 2, None)


@pytest.fixture(autouse=True)
def _another_default_device() -> Iterator[None]:
    """Make the default device one that holds no values: a tensor without a device of its own cannot be read."""
    with META:
        yield


def test_columns_that_hold_tokens_are_counted() -> None:
    """All columns where nothing is padded, else each row's own."""
    assert Inputs(3, 4, CPU, None).counts(1) == [4]
    assert Inputs(3, 4, CPU, None).counts(3) == [4, 4, 4]
    assert Inputs(3, 4, CPU, [[0, 1, 2, 3], [1, 3], []]).counts(3) == [4, 2, 0]


def test_a_call_is_padded_where_a_column_holds_no_token() -> None:
    """Columns that are listed one by one, all of them, are no padding."""
    full = LaneCall(Lane(5), Lane(7), 2, [0, 1])
    assert (PADDED.padded, PLAIN.padded, full.padded) == (True, False, False)


def test_tokens_are_found_in_columns() -> None:
    """Cached tokens end where the call's columns begin; padding is skipped in those."""
    assert [PADDED.column(natural, held=3) for natural in (3, 4, 5, 6)] == [1, 2, 3 + 1, 3 + 3]
    assert [PLAIN.column(natural, held=3) for natural in (3, 4, 5, 6)] == [1, 2, 3, 4]


def test_columns_have_natural_indices_and_positions() -> None:
    """A position is the natural index minus the offset; padding has index -1 and position 0."""
    assert PLAIN.naturals(CPU).tolist() == [5, 6]
    assert PLAIN.positions(CPU).tolist() == [3, 4]
    assert PADDED.naturals(CPU).tolist() == [-1, 5, -1, 6]
    assert PADDED.positions(CPU).tolist() == [0, 3, 0, 4]
    first = LaneCall(Lane(0, 3), Lane(2, 3), 3, [1, 2])  # a first call longer than the positions that there are
    assert first.positions(CPU).tolist() == [0, -3, -2]
    for lane in (PLAIN, PADDED):
        assert (lane.naturals(CPU).dtype, lane.positions(CPU).dtype) == (torch.int64, torch.int64)
        assert (lane.naturals(META).device, lane.positions(META).device) == (META, META)


def test_a_lane_is_a_row_or_all_rows() -> None:
    """One lane stands for the whole batch."""
    assert batch_slice(0, 1) == slice(None)
    assert [batch_slice(row, 3) for row in range(3)] == [slice(0, 1), slice(1, 2), slice(2, 3)]
