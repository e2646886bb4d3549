"""Time the parts of a decode step, for all layers of one token, with a cache of 1,024 tokens.

`nox -s microbench` saves each run and compares it with the previous one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import pytest
import torch

from sinkwindow.attention.rotation import Rotary
from sinkwindow_lab.measure.micro import AttentionSteps, BareAttention, geometry

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

LENGTH: Final = 1024  # [tokens]
FULL: Final = 4 * LENGTH  # streamed first, so that the cache evicts [tokens]
PROMPT: Final = 512  # a call that crosses several evictions [tokens]
NAMES: Final = {"streaming": "streaming_4_1020", "dynamic_cache": "baseline"}


@pytest.mark.benchmark(group="attention and update, one token")
def test_step_bare_sdpa(timed: Callable[..., None], model: PreTrainedModel) -> None:
    """The lower bound: ready-made contiguous keys and values, no cache."""
    timed(BareAttention(model, LENGTH).step)


@pytest.mark.benchmark(group="attention and update, one token")
@pytest.mark.parametrize("name", NAMES)
def test_step(timed: Callable[..., None], full_cache: Callable[[str, int], AttentionSteps], name: str) -> None:
    """Update and attention of a cache."""
    seen = FULL if name == "streaming" else LENGTH - 1
    steps = full_cache(NAMES[name], seen)
    timed(steps.step, lambda: steps.rewind(seen))


@pytest.mark.benchmark(group="update, one token")
@pytest.mark.parametrize("name", NAMES)
def test_update(timed: Callable[..., None], full_cache: Callable[[str, int], AttentionSteps], name: str) -> None:
    """Update of a cache, without attention."""
    seen = FULL if name == "streaming" else LENGTH - 1
    steps = full_cache(NAMES[name], seen)
    timed(steps.update, lambda: steps.rewind(seen))


@pytest.mark.benchmark(group="update, one token")
def test_update_with_eviction(timed: Callable[..., None], full_cache: Callable[[str, int], AttentionSteps]) -> None:
    """Without a buffer every token evicts, so sinks are rotated and placed in each round."""
    timed(full_cache("streaming_4_1020_0", FULL).update)


@pytest.mark.benchmark(group="rebase")
@pytest.mark.parametrize("stay", [True, False])
def test_rebase(timed: Callable[..., None], full_cache: Callable[[str, int], AttentionSteps], *, stay: bool) -> None:
    """A rebase: the window keys are rotated back to ranks, either in their slots or moved to the front as well."""
    stream = full_cache("streaming_4_1020", FULL).cache._stream  # noqa: SLF001 - to time a part of it
    (pool,), (slots,) = stream.pools, stream.state.pools
    lanes = [type(lane)(lane.seen, row.evicted) for lane, row in zip(stream.state.lanes, slots.lanes, strict=True)]
    full = replace(slots, end=slots.banks[0].slots.keys.shape[3])
    timed(lambda: pool.relocation(full, lanes, stay=stay)[0].finish())  # noqa: PLW0108 - each round plans anew


@pytest.mark.benchmark(group="rotation")
@pytest.mark.parametrize("tokens", [4, LENGTH])
def test_rotation(timed: Callable[..., None], model: PreTrainedModel, tokens: int) -> None:
    """Rotation of the keys of all layers by some positions: of the sinks only, and of a whole window."""
    sizes = geometry(model)
    frequencies = next(buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq"))
    shape = (sizes.layers, 1, sizes.kv_heads, tokens, sizes.head_dim)
    keys = torch.randn(shape, device=model.device, dtype=model.dtype)
    timed(lambda: Rotary(frequencies).rotate_by(keys, 65))


@pytest.mark.benchmark(group="attention of a 512-token call")
def test_exact_attention(
    timed: Callable[..., None], model: PreTrainedModel, full_cache: Callable[[str, int], AttentionSteps]
) -> None:
    """The model's attention under our mask, across evictions, including the cache's work."""
    steps = full_cache("streaming_4_1020", FULL)
    timed(lambda: steps.long_call(PROMPT), rounds=5)
    assert geometry(model).layers == steps.sizes.layers


@pytest.mark.benchmark(group="attention of a 512-token call")
def test_dense_attention(timed: Callable[..., None], full_cache: Callable[[str, int], AttentionSteps]) -> None:
    """The same call with causal SDPA on a `DynamicCache` of the same length."""
    steps = full_cache("baseline", LENGTH)
    timed(lambda: steps.long_call(PROMPT), lambda: steps.rewind(LENGTH), rounds=5)
