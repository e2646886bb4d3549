"""`Rotary.rotate_by` composes and inverts like RoPE, changes no other channels, and rounds once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sinkwindow.attention.rotation import Rotary
from sinkwindow_reference import rotate
from strategies import seeds, worst

LIMIT = 1024
DISTANCES = [0, 1, LIMIT, 10 * LIMIT, 100_000, 1_000_000]
LAYOUTS = [False, True]


@dataclass(frozen=True)
class Case:
    """Vectors to rotate, made from a random seed."""

    pairs: int
    passed: int
    interleaved: bool
    theta: float
    seed: int

    @property
    def rotary(self) -> Rotary:
        """Frequencies as models compute them."""
        exponents = torch.arange(self.pairs, dtype=torch.float32) / self.pairs
        return Rotary(self.theta**-exponents, self.interleaved)

    @property
    def states(self) -> torch.Tensor:
        """Vectors `[2, 3, 5, channels]` in float64, exact in bfloat16; a few channels are zero."""
        generator = torch.Generator().manual_seed(self.seed)
        states = torch.randn(2, 3, 5, 2 * self.pairs + self.passed, generator=generator)
        zero = torch.rand(states.shape, generator=generator) < 0.1
        return states.masked_fill(zero, 0).bfloat16().double()


CASES = st.builds(
    Case,
    pairs=st.integers(1, 8),
    passed=st.integers(0, 5),
    interleaved=st.sampled_from(LAYOUTS),
    theta=st.sampled_from([10.0, 1e4, 1e6]),
    seed=seeds(),
)
STEPS = st.integers(-2000, 2000)


@given(case=CASES, first=STEPS, second=STEPS)
def test_rotations_compose(case: Case, first: int, second: int) -> None:
    """Rotating by a and then by b is rotating by a + b."""
    rotate_by, states = case.rotary.rotate_by, case.states
    assert worst(rotate_by(rotate_by(states, first), second) - rotate_by(states, first + second)) < 1e-11


@given(case=CASES, distance=STEPS)
def test_a_rotation_can_be_undone(case: Case, distance: int) -> None:
    """Rotating by -a undoes rotating by a, and a rotation does not change the length of a vector."""
    rotate_by, states = case.rotary.rotate_by, case.states
    assert worst(rotate_by(rotate_by(states, distance), -distance) - states) < 1e-12
    assert worst(rotate_by(states, distance).norm(dim=-1) - states.norm(dim=-1)) < 1e-12


@given(case=CASES, start=st.integers(0, 100_000), distance=STEPS)
def test_a_further_rotation_equals_rotating_at_the_new_position(case: Case, start: int, distance: int) -> None:
    """Keys that the reference rotated at p, rotated by d, equal its keys at p + d, in both channel layouts."""
    positions = torch.arange(start, start + 5)
    rotary, states = case.rotary, case.states
    before, after = (
        rotate(states, at, rotary.inv_freq, interleaved=case.interleaved) for at in (positions, positions + distance)
    )
    assert worst(rotary.rotate_by(before, distance) - after) < 1e-9


@given(case=CASES, steps=st.lists(STEPS, min_size=5, max_size=5))
def test_a_tensor_of_distances_rotates_each_token_by_its_own(case: Case, steps: list[int]) -> None:
    """`[1, tokens]` distances give what five rotations by an int give."""
    states = case.states
    together = case.rotary.rotate_by(states, torch.tensor(steps)[None])
    apart = [case.rotary.rotate_by(states[:, :, [token]], step) for token, step in enumerate(steps)]
    assert torch.equal(together, torch.cat(apart, dim=2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@given(case=CASES, distance=STEPS)
def test_channels_beyond_the_rotary_ones_pass_bit_for_bit(dtype: torch.dtype, case: Case, distance: int) -> None:
    """A partial rotary embedding does not change the rest of the head, nor the shape and the dtype."""
    states = case.states.to(dtype)
    rotated = case.rotary.rotate_by(states, distance)
    assert (rotated.shape, rotated.dtype) == (states.shape, states.dtype)
    assert torch.equal(rotated[..., 2 * case.pairs :], states[..., 2 * case.pairs :])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@given(case=CASES)
def test_a_rotation_by_zero_changes_no_bit(dtype: torch.dtype, case: Case) -> None:
    """A rotation by 0 returns its input exactly."""
    states = case.states.to(dtype)
    assert torch.equal(case.rotary.rotate_by(states, 0), states)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(case=CASES)
def test_a_rotation_rounds_once(dtype: torch.dtype, distance: int, case: Case) -> None:
    """At any distance the error is one rounding to the dtype plus float32 arithmetic; angles add nothing."""
    states = case.states
    exact = case.rotary.rotate_by(states, distance)
    error = (case.rotary.rotate_by(states.to(dtype), distance).double() - exact).abs()
    arithmetic = 3 * torch.finfo(torch.float32).eps * states.abs().amax(dim=-1, keepdim=True)
    assert bool((error <= torch.finfo(dtype).eps / 2 * exact.abs() + arithmetic).all())


@pytest.mark.parametrize("interleaved", LAYOUTS)
@pytest.mark.parametrize("distance", [*DISTANCES, -1_000_000])
def test_angles_are_right_a_million_positions_away(distance: int, *, interleaved: bool) -> None:
    """Cosine and sine of d * frequency agree with `math`; float32 angles would be off by 0.06 rad."""
    inv_freq = 1e4 ** -(torch.arange(4) / 4)
    unit = torch.tensor([1.0, 0.0] * 4 if interleaved else [1.0] * 4 + [0.0] * 4, dtype=torch.float64)
    rotated = Rotary(inv_freq, interleaved).rotate_by(unit[None], distance)[0]
    angles = [distance * frequency for frequency in inv_freq.tolist()]
    pairs = rotated.view(4, 2) if interleaved else rotated.view(2, 4).T
    expected = torch.tensor([[math.cos(angle), math.sin(angle)] for angle in angles], dtype=torch.float64)
    assert worst(pairs - expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distance", [3, torch.tensor([[1, 2, 3]])], ids=["one", "several"])
def test_cosines_are_as_wide_as_what_is_computed(dtype: torch.dtype, distance: int | torch.Tensor) -> None:
    """At least float32, so that only the result is rounded, and no wider: half of the memory of float64."""
    wide = torch.promote_types(dtype, torch.float32)
    found = Rotary(torch.ones(4)).cos_sin(distance, torch.device("cpu"), dtype)
    assert [one.dtype for one in found] == [wide, wide]
