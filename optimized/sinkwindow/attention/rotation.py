"""Rotary position embedding as a group action: rotating a cached key by some positions.

RoPE rotates channel pair ``i`` of a vector at position ``p`` by the angle ``p * inv_freq[i]`` (RoFormer, arXiv
2104.09864, eq. 34). Rotating the result by ``d * inv_freq[i]`` takes it to position ``p + d``, so a cached key can be
given another position without knowing its unrotated value. Angles are made in float64 from integer positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Rotary:
    """The rotation that a group of layers uses.

    Attributes:
        inv_freq: Angle per position of each channel pair, ``[pairs]``, the model's own buffer [rad].
        interleaved: ``False`` pairs channels ``(i, i + pairs)``, ``True`` pairs ``(2 i, 2 i + 1)``.
    """

    inv_freq: Tensor
    interleaved: bool = False

    def rotate_by(self, states: Tensor, distance: int | Tensor) -> Tensor:
        """Rotate vectors by ``distance`` positions.

        Args:
            states: ``[..., tokens, head_dim]``; channels beyond ``2 * pairs`` pass through untouched.
            distance: Positions to rotate by; an int, or an integer tensor that broadcasts to ``[..., tokens]``.

        Returns:
            Rotated vectors of the same shape and dtype, computed in at least float32: one rounding per rotation.
        """
        return self.rotate(states, *self.cos_sin(distance, states.device, states.dtype))

    def rotate(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate vectors as ``rotate_by`` does, by cosines and sines that serve several layers.

        Args:
            states: ``[..., tokens, head_dim]``.
            cos: From ``cos_sin``, for the dtype of ``states``.
            sin: Likewise.
        """
        width = 2 * self.inv_freq.shape[0]
        paired = states[..., :width]
        first, second = (paired[..., 0::2], paired[..., 1::2]) if self.interleaved else paired.chunk(2, dim=-1)
        # Products are as wide as the cosines.
        pair = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
        joined = torch.stack(pair, dim=-1).flatten(-2) if self.interleaved else torch.cat(pair, dim=-1)
        turned = joined.to(states.dtype)
        return turned if width == states.shape[-1] else torch.cat((turned, states[..., width:]), dim=-1)

    def cos_sin(self, distance: int | Tensor, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and sines for states of a dtype.

        Returns:
            ``[..., tokens, pairs]``, or ``[pairs]`` for an int, in at least float32.
        """
        dtype = torch.promote_types(dtype, torch.float32)
        exact = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        inv_freq = self.inv_freq.to(device=device, dtype=exact)
        angles = distance * inv_freq if isinstance(distance, int) else distance.to(device)[..., None] * inv_freq
        return angles.cos().to(dtype), angles.sin().to(dtype)
