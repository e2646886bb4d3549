"""The closed forms of `Retention` agree with the list program of the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sinkwindow import Retention
from sinkwindow_reference import RetainedList, retained_lists
from strategies import BOTH, Rule, rules, splits


@given(rule=rules(BOTH), lengths=splits(most=200))
def test_retained_list_equals_the_list_program_after_every_call(rule: Rule, lengths: list[int]) -> None:
    """Two integers, seen and evicted, describe the list that results from appending and evicting."""
    retention, program = Retention(**rule.arguments), RetainedList(rule.num_sinks, rule.window, rule.buffer)
    seen = evicted = 0
    for length in lengths:
        for _ in range(length):
            program.append(seen)
            seen += 1
            if rule.evict == "token":
                program.evict_if_full()
        program.evict_if_full()
        evicted = retention.evicted_after(seen, evicted)
        assert retention.retained(seen, evicted) == program.tokens
        assert seen - evicted == len(program.tokens)


@given(rule=rules(), total=st.integers(1, 200))
def test_every_query_attends_to_its_own_list(rule: Rule, total: int) -> None:
    """`evicted_before` gives the list that a query attends to, itself included, and `capacity` bounds its length."""
    retention = Retention(**rule.arguments)
    lists = retained_lists(total, num_sinks=rule.num_sinks, window=rule.window, buffer=rule.buffer)
    for token, expected in enumerate(lists):
        assert retention.retained(token + 1, retention.evicted_before(token)) == expected
        assert len(expected) <= retention.capacity


@given(rule=rules(), total=st.integers(1, 60))
def test_tensors_of_tokens_are_counted_as_ints_are(rule: Rule, total: int) -> None:
    """`evicted_before` returns a tensor for a tensor, an int for an int."""
    retention = Retention(**rule.arguments)
    assert retention.evicted_before(torch.arange(total)).tolist() == [*map(retention.evicted_before, range(total))]


@given(rule=rules(BOTH), lengths=splits(most=200))
def test_sinks_and_the_last_window_are_never_evicted(rule: Rule, lengths: list[int]) -> None:
    """The first S and the last W tokens are always in the list, which never has more than S + W + B tokens."""
    retention = Retention(**rule.arguments)
    seen = evicted = 0
    for length in lengths:
        seen += length
        evicted = retention.evicted_after(seen, evicted)
        kept = retention.retained(seen, evicted)
        assert kept[: rule.num_sinks] == list(range(min(seen, rule.num_sinks)))
        assert kept[-rule.window :] == list(range(max(0, seen - rule.window), seen))[-len(kept) :]
        assert len(kept) <= rule.limit + rule.buffer


def test_the_length_of_the_list_is_that_of_the_original_reproduction() -> None:
    """With S=8, W=256, B=64 the list grows to 328 and 329, is cut to 264, and grows again, as in its log."""
    retention = Retention(8, 256, 64)
    lengths = [token + 1 - retention.evicted_before(token) for token in range(396)]
    assert lengths[327:331] == [328, 329, 265, 266]
    assert lengths[393:395] == [329, 265]


@pytest.mark.parametrize("name", ["num_sinks", "window", "buffer"])
@pytest.mark.parametrize("value", [1.0, "4", None, True, False])
def test_a_size_that_is_no_int_is_refused(name: str, value: Any) -> None:
    """A TypeError names the argument and the value; a bool is not an int here."""
    with pytest.raises(TypeError, match=rf"{name} must be an int, got {value!r}"):
        Retention(**_with(name, value))


@pytest.mark.parametrize(("name", "value"), [("num_sinks", -1), ("window", 0), ("window", -5), ("buffer", -1)])
def test_a_size_out_of_range_is_refused(name: str, value: int) -> None:
    """A ValueError names the argument, the value, and what is allowed."""
    with pytest.raises(ValueError, match=rf"{name} must be at least \d, got {value}"):
        Retention(**_with(name, value))


@pytest.mark.parametrize("value", ["Token", "", "never", None, 1])
def test_an_unknown_mode_is_refused(value: Any) -> None:
    """A ValueError names both modes and the value."""
    with pytest.raises(ValueError, match=rf'evict must be "token" or "call", got {value!r}'):
        Retention(1, 4, 0, value)


def _with(name: str, value: object) -> dict[str, Any]:
    return {"num_sinks": 1, "window": 4, "buffer": 0, name: value}
