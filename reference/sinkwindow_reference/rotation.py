"""Rotary position embedding (RoPE): rotate pairs of channels by position times frequency."""

from __future__ import annotations

import torch


def rotate(
    x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, *, interleaved: bool = False
) -> torch.Tensor:
    """Return `x` with its first `2 * len(inv_freq)` channels rotated and the others unchanged (partial rotary).

    Rotations compose, so a negative position undoes a positive one.

    Args:
        x: Queries or keys `[..., tokens, head_dim]`.
        positions: One position per token `[tokens]`.
        inv_freq: Angle per position of each pair of channels `[pairs]` [rad].
        interleaved: Whether channels (2i, 2i + 1) form a pair; by default (i, i + pairs) do.

    Raises:
        ValueError: If `x` has fewer than `2 * len(inv_freq)` channels.
    """
    return rotate_by_angles(x, *cos_sin(positions, inv_freq, x.dtype), interleaved=interleaved)


def cos_sin(positions: torch.Tensor, inv_freq: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines `[tokens, pairs]`, computed in float64 and cast to `dtype`.

    float32 angles would be off by 0.06 rad at position 10^6; bfloat16 cannot tell 256 from 257.
    """
    angles = positions.to(torch.float64)[:, None] * inv_freq.to(torch.float64)[None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_by_angles(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False
) -> torch.Tensor:
    """Rotate as `rotate` does, by angles given as cosines and sines `[tokens, pairs]`.

    Raises:
        ValueError: If `x` has fewer than `2 * pairs` channels.
    """
    channels = 2 * cos.shape[-1]
    if channels > x.shape[-1]:
        raise ValueError(
            f"inv_freq rotates {channels} channels, x has {x.shape[-1]}: pass the inv_freq of the model that made x"
        )
    rotary, unchanged = x[..., :channels], x[..., channels:]
    first, second = (rotary[..., 0::2], rotary[..., 1::2]) if interleaved else rotary.chunk(2, dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    if interleaved:
        return torch.cat([torch.stack(rotated, dim=-1).flatten(-2), unchanged], dim=-1)
    return torch.cat([*rotated, unchanged], dim=-1)
