"""Masks by hand: sink copies of each epoch, cached columns of unequal rows, and padding.

With S=1, W=2, B=1 token 4 attends to [0, 1, 2, 3, 4], tokens 5 and 6 to [0, 3, ...], token 7 to [0, 5, 6, 7].
"""

from __future__ import annotations

import pytest
import torch

from sinkwindow import Retention
from sinkwindow.attention.mask import additive, columns_with_tokens, epochs_begun, visible
from sinkwindow.lanes import Lane, LaneCall

pytestmark = pytest.mark.usefixtures("meta_by_default")
CPU = torch.device("cpu")
RULE, BY_CALL = Retention(1, 2, 1), Retention(1, 2, 1, "call")
UNEVEN = [LaneCall(Lane(5), Lane(6), 2, [1]), LaneCall(Lane(2), Lane(4), 2, [0, 1])]


def _lane(before: int, after: int) -> LaneCall:
    return LaneCall(Lane(before), Lane(after), after - before, None)


@pytest.mark.parametrize(
    ("rule", "before", "after", "evicted", "epochs"),
    [
        (RULE, 5, 6, 2, 0),
        (RULE, 5, 7, 2, 0),
        (RULE, 5, 8, 2, 1),
        (RULE, 5, 12, 2, 3),
        (RULE, 0, 5, 0, 0),
        (RULE, 0, 6, 0, 1),
        (RULE, 5, 5, 2, 0),
        (BY_CALL, 5, 12, 2, 0),
        (Retention(2, 3), 5, 9, 0, 3),
    ],
)
def test_epochs_begin_with_evictions_inside_a_call(
    rule: Retention, before: int, after: int, evicted: int, epochs: int
) -> None:
    """An eviction counts if a token of the call attends after it; a call that evicts after itself has none."""
    assert epochs_begun(_lane(before, after), evicted, rule) == epochs


def test_each_query_sees_the_sinks_of_its_own_epoch() -> None:
    """Token 7 sees the copy in front, and neither the cached sink nor the evicted tokens 3 and 4."""
    seen = visible([_lane(5, 8)], [2], RULE, 3, 1, CPU, ranked=True)
    #   copy | 0  3  4 | 5  6  7
    assert seen.int().tolist() == [[[[0, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 1, 1, 1]]]]
    assert seen.dtype == torch.bool


def test_copies_are_those_of_all_sinks_and_of_one_epoch_each() -> None:
    """With S=2, W=1, B=0, tokens 3, 4 and 5 attend to both sinks, the token before, and themselves."""
    seen = visible([_lane(3, 6)], [0], Retention(2, 1), 3, 2, CPU, ranked=True)
    #   0' 1' | 0" 1" | 0  1  2 | 3  4  5
    assert seen.int().tolist() == [
        [[[0, 0, 0, 0, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0, 0, 0, 1, 1]]]
    ]


def test_sinks_that_never_move_are_seen_where_they_are() -> None:
    """Where positions are not ranks there are no copies."""
    seen = visible([_lane(5, 8)], [2], RULE, 3, 0, CPU, ranked=False)
    assert seen.int().tolist() == [[[[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 0, 0, 1, 1, 1]]]]


def test_a_call_that_evicts_after_itself_is_causal() -> None:
    """With evict="call" its last token sees all that was cached."""
    seen = visible([_lane(5, 8)], [2], BY_CALL, 3, 0, CPU, ranked=True)
    assert seen.int().tolist() == [[[[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]]]


@pytest.mark.parametrize("rule", [RULE, BY_CALL])
def test_rows_of_unequal_length_are_right_aligned(rule: Retention) -> None:
    """The shorter row has an unused column in front; a query of padding sees itself alone, and nobody else sees it."""
    seen = visible(UNEVEN, [2, 0], rule, 3, 0, CPU, ranked=True)
    #  0  3  4 | -  5  and  -  0  1 | 2  3
    assert seen.int().tolist() == [[[[0, 0, 0, 1, 0], [1, 1, 1, 0, 1]]], [[[0, 1, 1, 1, 0], [0, 1, 1, 1, 1]]]]
    columns = columns_with_tokens(UNEVEN, [2, 0], rule, 3, CPU)
    assert columns.tolist() == [[1, 1, 1, 0, 1], [0, 1, 1, 1, 1]]
    assert columns.dtype == torch.int64


def test_a_rule_without_sinks_has_no_copies() -> None:
    """With S=0, W=2, B=1, tokens 4, 5 and 6 attend to [2, 3, 4], [2, 3, 4, 5] and [4, 5, 6]; an epoch has no copy."""
    seen = visible([_lane(4, 7)], [2], Retention(0, 2, 1), 2, 1, CPU, ranked=True)
    #   2  3 | 4  5  6
    assert seen.int().tolist() == [[[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]]]


def test_a_mask_can_be_added_to_scores() -> None:
    """0 where a query attends, the lowest number of the dtype elsewhere."""
    mask = additive(torch.tensor([True, False], device=CPU), torch.float16)
    assert mask.tolist() == [0, torch.finfo(torch.float16).min]
    assert mask.dtype == torch.float16
