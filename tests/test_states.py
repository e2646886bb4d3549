"""What layers with a state remember, without a model: a way back exists where recorded columns are enough for it."""

from __future__ import annotations

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from sinkwindow.storage.slots import RECORDED
from sinkwindow.storage.states import CONV, PAST, RECURRENT, States, can_go_back, split, states_before, without_past

LONG = RECORDED + 12  # columns: more than are recorded
TEXT = torch.arange(6.0 * LONG).reshape(2, 3, LONG)  # [batch, channels, columns]: all different
kernels = st.integers(1, 4)


def read(columns: int, kernel: int) -> States:
    """Return what a layer with two convolutions holds after so many columns, the second of which reads twice those."""
    states: dict[tuple[int, str, int], Tensor] = {}
    for number, text in enumerate((TEXT, 2 * TEXT)):
        states[1, CONV, number], states[1, PAST, number] = split(text[..., :columns], kernel)
    return states


def equal(one: States, other: States) -> bool:
    """Return whether states have the same keys and tensors."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@given(kernel=kernels, columns=st.integers(4, LONG))
@example(kernel=3, columns=LONG)
def test_a_convolution_keeps_its_last_columns_and_some_before(kernel: int, columns: int) -> None:
    """They are copies: the text may go."""
    text = TEXT[..., :columns].clone()
    kept, past = split(text, kernel)
    held = [*range(columns)][:-kernel][-RECORDED:]
    assert torch.equal(kept, TEXT[..., columns - kernel : columns])
    assert torch.equal(past, TEXT[..., held])
    text.fill_(-1)
    assert min(kept.min(), TEXT.max() if past.numel() == 0 else past.min()) >= 0


@given(kernel=kernels, columns=st.integers(4, LONG), back=st.integers(1, LONG))
@example(kernel=3, columns=LONG, back=RECORDED)
@example(kernel=3, columns=LONG, back=RECORDED + 1)
@example(kernel=2, columns=10, back=8)
def test_going_back_gives_the_states_of_the_shorter_text(kernel: int, columns: int, back: int) -> None:
    """As far as there are recorded columns, and no further."""
    before = states_before(read(columns, kernel), back)
    recorded = min(RECORDED, columns - kernel)
    if back > recorded:
        assert before is None
    else:
        assert before is not None
        shorter = read(columns - back, kernel)
        for key, tensor in before.items():
            assert torch.equal(tensor, shorter[key][..., shorter[key].shape[-1] - tensor.shape[-1] :])
            assert tensor.shape[-1] == (kernel if key[1] == CONV else recorded - back)
        assert before.keys() == shorter.keys()


def test_there_is_no_way_back_from_a_recurrent_state_or_without_a_past() -> None:
    """One such tensor is enough, wherever it is."""
    states, recurrent = read(LONG, 3), {(2, RECURRENT, 0): TEXT}
    assert can_go_back(states)
    for unable in ({}, recurrent, {**states, **recurrent}, {**recurrent, **states}):
        assert not can_go_back(unable)
    assert states_before({**states, **recurrent}, 1) is None
    assert states_before({**recurrent, **states}, 1) is None
    assert states_before(without_past(states), 1) is None
    assert states_before({**states, (3, CONV, 0): TEXT}, 1) is None  # another layer's past is not its own


def test_the_past_can_be_left_out() -> None:
    """What the next token needs stays, the tensors themselves."""
    states = {**read(LONG, 3), (2, RECURRENT, 0): TEXT}
    left = without_past(states)
    assert left.keys() == {(1, CONV, 0), (1, CONV, 1), (2, RECURRENT, 0)}
    assert all(left[key] is states[key] for key in left)
    assert equal(without_past(left), left)
