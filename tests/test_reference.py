"""The parts of the reference compared with hand-written lists, textbook rotation and textbook dense attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reference_tools import OURS, frequencies, gap, heads, seeds, sizes
from sinkwindow_reference import RetainedList, rank_attention, retained_after, retained_lists, rotate

# --- the rule -----------------------------------------------------------------------------------------------------


def test_lengths_are_those_in_the_log_of_the_original_reproduction() -> None:
    """With S=8, W=256, B=64 the list grows to 329 tokens; that query sees all of them, and 264 are left.

    The original reproduction, "the seed", is the program from which this project started.
    """
    lengths = [len(seen) for seen in retained_lists(500, num_sinks=8, window=256, buffer=64)]
    assert lengths[:329] == list(range(1, 330))
    assert lengths[329:394] == list(range(265, 330))
    assert lengths[394:459] == list(range(265, 330))


def test_without_a_buffer_the_list_is_s_plus_w_and_then_one_more() -> None:
    """B=0 is the rule in the original implementation of StreamingLLM."""
    assert retained_lists(6, num_sinks=1, window=2) == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 2, 3, 4],
        [0, 3, 4, 5],
    ]
    assert retained_after(6, num_sinks=1, window=2) == [0, 4, 5]


def test_with_a_buffer_evictions_come_in_batches() -> None:
    """With S=1, W=2, B=2 five tokens fit; a query that sees a sixth is followed by an eviction of three."""
    lists = retained_lists(8, num_sinks=1, window=2, buffer=2)
    assert lists[5:] == [[0, 1, 2, 3, 4, 5], [0, 4, 5, 6], [0, 4, 5, 6, 7]]


def test_evict_if_full_returns_what_it_evicts() -> None:
    """The sinks and the window are kept, and so is a list that is exactly full."""
    kept = RetainedList(num_sinks=2, window=2, buffer=1)
    for token in range(5):
        kept.append(token)
        assert kept.evict_if_full() == []
    kept.append(5)
    assert kept.evict_if_full() == [2, 3]
    assert kept.tokens == [0, 1, 4, 5]


def test_evict_call_sees_a_whole_call_and_evicts_once_after_it() -> None:
    """The seed's rule: with S=1, W=2 a call of 4 after one of 5 attends to 3 + 4 at most."""
    lists = retained_lists(9, num_sinks=1, window=2, evict="call", chunks=[5, 4])
    assert lists[4] == [0, 1, 2, 3, 4]
    assert lists[5:] == [[0, 3, 4, 5], [0, 3, 4, 5, 6], [0, 3, 4, 5, 6, 7], [0, 3, 4, 5, 6, 7, 8]]
    assert retained_after(9, num_sinks=1, window=2, evict="call", chunks=[5, 4]) == [0, 7, 8]
    assert retained_lists(9, num_sinks=1, window=2, evict="call")[8] == list(range(9))


@given(sizes, st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_calls_do_not_matter_to_evict_token(given_sizes: dict[str, Any], chunks: list[int]) -> None:
    """The lists do not depend on the calls, and with calls of one token both eviction modes are the same."""
    tokens = sum(chunks)
    lists = retained_lists(tokens, **given_sizes)
    assert retained_lists(tokens, **given_sizes, chunks=chunks) == lists
    assert retained_lists(tokens, **given_sizes, evict="call", chunks=[1] * tokens) == lists


@given(sizes, st.integers(1, 60))
def test_what_is_kept(given_sizes: dict[str, Any], tokens: int) -> None:
    """A list has the first S, the last W and the query itself, in order, and at most S + W + B + 1 tokens."""
    sinks, window, buffer = given_sizes["num_sinks"], given_sizes["window"], given_sizes["buffer"]
    lists = retained_lists(tokens, **given_sizes)
    for query, seen in enumerate(lists):
        assert seen == sorted(set(seen))
        assert len(seen) <= sinks + window + buffer + 1
        assert {*range(min(sinks, query)), *range(max(0, query - window), query + 1)} <= set(seen)
    left = retained_after(tokens, **given_sizes)
    assert left == lists[-1] or left == lists[-1][:sinks] + lists[-1][-window:]
    assert len(left) <= sinks + window + buffer


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"num_sinks": -1}, ValueError, "num_sinks must be at least 0, got -1"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"buffer": -2}, ValueError, "buffer must be at least 0, got -2"),
        ({"window": True}, TypeError, "window must be an int, got True"),
        ({"num_sinks": 1.0}, TypeError, "num_sinks must be an int, got 1.0"),
        ({"evict": "never"}, ValueError, "evict must be one of .* got 'never'"),
        ({"chunks": [2, 2]}, ValueError, "add up to the 5 tokens given, got .2, 2. with the sum 4"),
        ({"chunks": [5, 0]}, ValueError, r"chunks\[1\] must be at least 1, got 0"),
    ],
)
def test_bad_sizes_are_named(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    """Both functions raise an error that names the argument and its value."""
    good: dict[str, Any] = {"num_sinks": 1, "window": 2}
    for function in (retained_lists, retained_after):
        with pytest.raises(error, match=says):
            function(5, **(good | arguments))


# --- rotation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@given(seed=seeds, first=st.integers(-1000, 10**6), second=st.integers(-1000, 10**6))
def test_rotations_compose_and_undo(*, interleaved: bool, seed: int, first: int, second: int) -> None:
    """rotate(rotate(x, a), b) is rotate(x, a + b), and -a undoes a."""
    x, inv_freq = heads(seed, 2, 3, 10), frequencies(4)
    one, two = torch.full((3,), first), torch.full((3,), second)
    once = rotate(x, one, inv_freq, interleaved=interleaved)
    # cos and sin of an angle of 10^6 are accurate to 10^6 times a rounding step of float64, 1e-10.
    assert (
        gap(
            rotate(once, two, inv_freq, interleaved=interleaved),
            rotate(x, one + two, inv_freq, interleaved=interleaved),
        )
        < 1e-8
    )
    assert gap(rotate(once, -one, inv_freq, interleaved=interleaved), x) < OURS


@pytest.mark.parametrize("interleaved", [False, True])
def test_each_layout_rotates_its_own_pairs(*, interleaved: bool) -> None:
    """By hand: a quarter turn of the second of two pairs; channels beyond the pairs are bit-identical."""
    x = torch.arange(1.0, 7.0, dtype=torch.float64).view(1, 6)
    quarter = torch.tensor([0.0, torch.pi / 2], dtype=torch.float64)
    rotated = rotate(x, torch.tensor([1]), quarter, interleaved=interleaved)
    by_hand = [1.0, 2.0, -4.0, 3.0, 5.0, 6.0] if interleaved else [1.0, -4.0, 3.0, 2.0, 5.0, 6.0]
    assert gap(rotated, torch.tensor([by_hand], dtype=torch.float64)) < OURS
    assert torch.equal(rotated[:, 4:], x[:, 4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_are_exact_in_a_low_precision_dtype(dtype: torch.dtype) -> None:
    """At a distant position, the error comes from rounding x, cos and sin, not from rounding the position."""
    x = heads(1, 1, 8)
    exact = rotate(x.to(dtype).double(), torch.tensor([100_001]), frequencies(4))
    rounded = rotate(x.to(dtype), torch.tensor([100_001]), frequencies(4))
    assert rounded.dtype == dtype
    assert gap(rounded.double(), exact) < 4 * torch.finfo(dtype).eps * float(x.abs().max())


def test_more_frequencies_than_channels_are_refused() -> None:
    """Frequencies of another model are an error."""
    with pytest.raises(ValueError, match="rotates 8 channels, x has 6"):
        rotate(torch.zeros(1, 6), torch.tensor([0]), frequencies(4))


# --- attention ----------------------------------------------------------------------------------------------------


def dense_attention(query: Tensor, key: Tensor, value: Tensor, inv_freq: Tensor, *, interleaved: bool) -> Tensor:
    """Return causal attention at natural positions as in a textbook, with complex numbers for the rotation."""
    tokens, pairs = query.shape[2], len(inv_freq)

    def rotated(x: Tensor) -> Tensor:
        pair = x[..., : 2 * pairs].reshape(*x.shape[:-1], *((pairs, 2) if interleaved else (2, pairs)))
        real, imaginary = pair.unbind(-1 if interleaved else -2)
        angle = torch.arange(tokens)[:, None] * inv_freq
        z = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag, x[..., 2 * pairs :]], dim=-1)  # the order of channels cancels in the product

    groups = query.shape[1] // key.shape[1]
    scores = rotated(query) @ rotated(key).repeat_interleave(groups, 1).mT * query.shape[-1] ** -0.5
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    weights: Tensor = scores.masked_fill(future, -torch.inf).softmax(-1)
    return weights @ value.repeat_interleave(groups, 1)


@given(seeds, st.integers(1, 12), st.sampled_from([1, 2, 4]), st.integers(0, 4), st.booleans())
def test_with_everything_kept_it_is_dense_attention(
    seed: int,
    tokens: int,
    kv_heads: int,
    pairs: int,
    interleaved: bool,  # noqa: FBT001 - drawn by position
) -> None:
    """Grouped queries, partial rotary embeddings and both layouts agree with an independent formula."""
    query, key, value = (
        heads(seed, 2, 4, tokens, 8),
        heads(seed + 1, 2, kv_heads, tokens, 8),
        heads(seed + 2, 2, kv_heads, tokens, 5),
    )
    inv_freq, lists = frequencies(pairs), [list(range(t + 1)) for t in range(tokens)]
    ours = rank_attention(query, key, value, lists, inv_freq, interleaved=interleaved)
    assert gap(ours, dense_attention(query, key, value, inv_freq, interleaved=interleaved)) < OURS


@given(seeds, sizes, st.integers(1, 20))
def test_each_query_is_dense_attention_over_its_own_list(seed: int, given_sizes: dict[str, Any], tokens: int) -> None:
    """The paper's definition: the kept tokens, renumbered from 0, are an ordinary short sequence."""
    query, key, value = (heads(seed + i, 1, 2, tokens, 4) for i in range(3))
    lists, inv_freq = retained_lists(tokens, **given_sizes), frequencies(2)
    ours = rank_attention(query, key, value, lists, inv_freq)
    for token, kept in enumerate(lists):
        short = dense_attention(query[:, :, kept], key[:, :, kept], value[:, :, kept], inv_freq, interleaved=False)
        assert gap(ours[:, :, token], short[:, :, -1]) < OURS


def test_scaling_can_be_passed() -> None:
    """A doubled scaling is a doubled query; the default is head_dim ** -0.5."""
    query, key, value = (heads(i, 1, 2, 5, 4) for i in range(3))
    lists, inv_freq = [list(range(t + 1)) for t in range(5)], frequencies(2)
    plain = rank_attention(query, key, value, lists, inv_freq)
    assert torch.equal(rank_attention(query, key, value, lists, inv_freq, scaling=0.5), plain)
    double = rank_attention(2 * query, key, value, lists, inv_freq)
    assert gap(rank_attention(query, key, value, lists, inv_freq, scaling=1.0), double) < OURS
    assert gap(plain, double) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upcast_is_more_exact_than_the_dtype_itself(dtype: torch.dtype) -> None:
    """With upcast only the result is rounded; without it the error is larger, but only a few rounding steps."""
    query, key, value = (heads(i, 1, 2, 40, 16).to(dtype) for i in range(3))
    lists, inv_freq = retained_lists(40, num_sinks=2, window=8), frequencies(8)
    exact = rank_attention(query.double(), key.double(), value.double(), lists, inv_freq)
    upcast = rank_attention(query, key, value, lists, inv_freq)
    plain = rank_attention(query, key, value, lists, inv_freq, upcast=False)
    assert upcast.dtype == plain.dtype == dtype
    assert torch.equal(upcast, exact.to(dtype))
    assert gap(upcast.double(), exact) < gap(plain.double(), exact) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("lists", [[], [[0]]])
def test_attention_requires_one_list_per_query(lists: list[list[int]]) -> None:
    """Too few lists are an error rather than a shorter result."""
    x = torch.zeros(1, 2, 2, 4)
    with pytest.raises(ValueError, match="one retained list per token"):
        rank_attention(x, x, x, lists, frequencies(2))
