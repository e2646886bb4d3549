"""Time parts of a step that asv does not time alone, for all layers, with a cache of 1,024 tokens.

The lab's timer interleaves the sides of a group; pytest-benchmark then reads their samples, saves them and
compares them with those of the previous `nox -s microbench`.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch

from sinkwindow.attention.rotation import Rotary
from sinkwindow_lab.inputs.shapes import random_model
from sinkwindow_lab.measure.clock import Side, interleave
from sinkwindow_lab.measure.micro import AttentionSteps, check_logits, geometry, relocation
from sinkwindow_lab.ways.configurations import parse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

DEVICES: Final = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LENGTH: Final = 1024  # [tokens]
FULL: Final = 4 * LENGTH  # streamed first, so that the cache evicts [tokens]
CALL: Final = 512  # a call that crosses several evictions [tokens]
torch.set_num_threads(1)


def rebase(model: PreTrainedModel, *, stay: bool) -> Side:
    """Return a rebase: window keys are rotated back to their ranks in their slots, or moved to the front as well."""
    return Side(relocation(parse("streaming_4_1020"), model, stay=stay))


def rotation(model: PreTrainedModel, tokens: int) -> Side:
    """Return the rotation of the keys of all layers by some positions."""
    sizes = geometry(model)
    frequencies = next(buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq"))
    shape = (sizes.layers, 1, sizes.kv_heads, tokens, sizes.head_dim)
    keys = torch.randn(shape, device=model.device, dtype=model.dtype)
    return Side(lambda: Rotary(frequencies).rotate_by(keys, 65))


def long_call(model: PreTrainedModel, name: str, seen: int) -> Side:
    """Return the model's attention under a checked cache's mask, the cache's work included."""
    configuration = parse(name)
    check_logits(configuration, random_model("tiny"), 2 * 320)
    steps = AttentionSteps(configuration, model)
    steps.fill(seen)
    return Side(lambda: steps.long_call(CALL), ready=lambda: steps.rewind(seen), samples=5)


GROUPS: Final[dict[str, dict[str, Callable[[PreTrainedModel], Side]]]] = {
    "rebase": {"in place": partial(rebase, stay=True), "moved to the front": partial(rebase, stay=False)},
    "rotation": {"of the sinks": partial(rotation, tokens=4), "of a window": partial(rotation, tokens=LENGTH)},
    "attention of a 512-token call": {
        "streaming, across evictions": partial(long_call, name="streaming_4_1020", seen=FULL),
        "DynamicCache of the same length": partial(long_call, name="baseline", seen=LENGTH),
    },
}


@functools.cache
def samples(group: str, device: str) -> dict[str, list[float]]:
    """Measure a group's sides, interleaved; return their samples [s]."""
    shape, dtype = {"cpu": ("smollm2-135m-heads", torch.float32), "cuda": ("pythia-2.8b", torch.float16)}[device]
    model = random_model(shape, device=device, dtype=dtype)
    sides = {name: side(model) for name, side in GROUPS[group].items()}
    timed = interleave(sides, 30, model.device, warm_up=3)
    return {name: [ms / 1e3 for ms in one.ms] for name, one in timed.items()}


class Replay:
    """A timer that advances by one sample per call of `next`."""

    passed = 0.0

    @classmethod
    def now(cls) -> float:
        """Return the time for pytest-benchmark [s]."""
        return cls.passed

    @classmethod
    def next(cls, seconds: Iterator[float]) -> None:
        """Let one sample pass."""
        cls.passed += next(seconds)


@pytest.mark.benchmark(timer=Replay.now)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("group", "name"), [(group, name) for group, sides in GROUPS.items() for name in sides])
def test_step(benchmark: Any, group: str, name: str, device: str) -> None:
    """Report the samples of one side of a group."""
    benchmark.group = f"{group}, {device}"
    seconds = samples(group, device)[name]
    benchmark.pedantic(Replay.next, args=(iter(seconds),), rounds=len(seconds))
