"""The ring of a static cache by hand: two sinks and six further slots, token n at 2 + (n - 2) mod 6."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sinkwindow.lanes import Lane
from sinkwindow.storage import ring

pytestmark = pytest.mark.usefixtures("meta_by_default")
S, SIZE = 2, 8


def _cpu(*values: int) -> Tensor:
    return torch.tensor(values, device="cpu")


def test_sinks_have_slots_of_their_own_and_other_tokens_go_round() -> None:
    """Token 8 takes the slot of token 2, token 14 that of token 8."""
    slots = ring.slot_of(_cpu(0, 1, 2, 7, 8, 9, 14), S, SIZE)
    assert slots.tolist() == [0, 1, 2, 7, 2, 3, 2]


@pytest.mark.parametrize(
    ("newest", "tokens"),
    [
        (0, [0, -1, -1, -1, -1, -1, -1, -1]),
        (1, [0, 1, -1, -1, -1, -1, -1, -1]),
        (2, [0, 1, 2, -1, -1, -1, -1, -1]),
        (4, [0, 1, 2, 3, 4, -1, -1, -1]),
        (7, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, [0, 1, 8, 3, 4, 5, 6, 7]),
        (13, [0, 1, 8, 9, 10, 11, 12, 13]),
        (15, [0, 1, 14, 15, 10, 11, 12, 13]),
    ],
)
def test_each_slot_holds_its_newest_token(newest: int, tokens: list[int]) -> None:
    """Slots without a token hold -1; rows are independent."""
    assert ring.tokens_in(_cpu(newest, 2), S, SIZE).tolist() == [tokens, [0, 1, 2, -1, -1, -1, -1, -1]]


def test_a_step_sees_sinks_and_what_is_not_evicted() -> None:
    """Rows that evicted 2, 3 and no tokens: from token 4, 5 and 2 on; an empty slot is hidden."""
    seen = ring.visible_slots(_cpu(8, 8, 3), _cpu(2, 3, 0), S, SIZE)
    assert seen.int().tolist() == [[1, 1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0]]


def test_windows_are_listed_right_aligned() -> None:
    """Tokens 4 to 8 of the first row, token 2 of the second; what is in front has slot 0."""
    slots = ring.list_slots([Lane(9), Lane(3)], [4, 2], S, SIZE, 7)
    assert slots.tolist() == [[0, 0, 4, 5, 6, 7, 2], [0, 0, 0, 0, 0, 0, 2]]


@pytest.mark.parametrize("index", [[[7, 2, 0]], [[7, 2, 0], [1, 1, 3]]])
def test_slots_are_read_in_the_order_of_an_index(index: list[list[int]]) -> None:
    """One list of slots for each row, or one for all rows."""
    slots = torch.arange(3 * 2 * 2 * SIZE * 2, device="cpu").view(3, 2, 2, SIZE, 2)
    copies = ring.read(slots, torch.tensor(index, device="cpu"))
    for row in range(2):
        assert torch.equal(copies[:, row], slots[:, row][:, :, index[row % len(index)]])
    assert ring.read(slots.to("meta"), torch.tensor(index, device="cpu")).device.type == "meta"


def test_the_newest_tokens_are_written_to_their_slots() -> None:
    """Three tokens of a row that has seen 9 and one of a row that has seen 3; other slots keep what they hold."""
    slots = torch.full((2, 1, SIZE, 1), -1.0, device="cpu")
    window = torch.tensor([[6, 7, 8], [0, 1, 2]], device="cpu", dtype=torch.float64).view(2, 1, 3, 1)
    ring.write(slots, window, [Lane(9), Lane(3)], [3, 1], S)
    assert slots[:, 0, :, 0].tolist() == [[-1, -1, 8, -1, -1, -1, 6, 7], [-1, -1, 2, -1, -1, -1, -1, -1]]


def test_one_lane_writes_all_rows() -> None:
    """While rows agree, one count serves them."""
    slots = torch.full((2, 1, SIZE, 1), -1.0, device="cpu")
    window = torch.tensor([[4.0, 5.0], [14.0, 15.0]], device="cpu").view(2, 1, 2, 1)
    ring.write(slots, window, [Lane(6)], [2], S)
    assert slots[:, 0, 4:6, 0].tolist() == [[4, 5], [14, 15]]


def test_lanes_without_a_count_are_refused() -> None:
    """A row is never left out without a word."""
    with pytest.raises(ValueError, match="zip"):
        ring.write(torch.zeros(2, 1, SIZE, 1), torch.zeros(2, 1, 1, 1), [Lane(1), Lane(1)], [1], S)
