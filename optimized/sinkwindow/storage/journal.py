"""Changes of tensors in place that survive an interruption.

Where a window moves within its slots, what is written overwrites what is still to be read. So a change is cut into
writes; each source is copied to scratch memory first, in pieces that fit the processor's cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

# [bytes] copied to scratch at a time: on a CPU what its own cache holds, since fresh pages for whole windows cost more
# than the copying; elsewhere more, for fewer kernels. A rotation in float32 needs several times that for a moment.
SCRATCH = {"cpu": 2 << 20}
SCRATCH_ELSEWHERE = 16 << 20


class Write(NamedTuple):
    """A part of a change, which reads nothing that a part before it has written.

    Attributes:
        target: Where it goes.
        source: Returns what is written, in memory of its own.
    """

    target: Tensor
    source: Callable[[], Tensor]


@dataclass(slots=True, eq=False)
class Writes:
    """The writes of a change, and how many are done."""

    parts: list[Write]
    _progress: tuple[int, Tensor | None] = (0, None)  # parts done, and the source of the next one if it was copied

    def finish(self) -> None:
        """Do what is left; after an interruption, go on from there.

        A write that has overwritten a part of its source must not read it again, and one that is done must not be
        repeated: its source may be gone. Hence one assignment for both.
        """
        while self._progress[0] < len(self.parts):
            done, taken = self._progress
            if taken is None:
                taken = self.parts[done].source()
                self._progress = (done, taken)
            self.parts[done].target.copy_(taken)
            self._progress = (done + 1, None)


def in_parts(target: Tensor, source: Tensor, change: Callable[[Tensor], Tensor]) -> Iterator[Write]:
    """Yield writes of as much as ``SCRATCH`` allows: some layers, or of a larger layer some rows, at least one.

    Args:
        target: ``[layers, batch, ...]``.
        source: ``[layers, batch, ...]``, of the same size.
        change: Returns what is written, always a copy.
    """
    for layers in _split(target, source, 0):
        for to, part in _split(*layers, 1):
            yield Write(to, partial(change, part))


def _split(target: Tensor, source: Tensor, dim: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Split two tensors of one size along a dimension, into as few parts as ``SCRATCH`` allows."""
    most = SCRATCH.get(source.device.type, SCRATCH_ELSEWHERE)
    step = max(1, most * source.shape[dim] // max(1, source.nbytes))
    return zip(torch.split(target, step, dim), torch.split(source, step, dim), strict=True)
