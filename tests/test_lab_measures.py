"""The lab measures what it says: sessions compared with their definitions."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch

from hybrids import FLOAT32_LOGITS, HYBRIDS, build
from lab_tiny import random_ids, tiny_model
from releases import needs
from sinkwindow_lab.errors import LabError
from sinkwindow_lab.measure import mechanics, requirements
from sinkwindow_lab.ways.configurations import open_session, parse
from sinkwindow_reference import reference_logits

if TYPE_CHECKING:
    from sinkwindow_lab.ways.sessions import Session

NAMES = (
    "baseline",
    "streaming_2_6_3",
    "window_0_8",
    "recompute_8",
    "stale_ranks_2_6_3",
    "eager_eviction_2_6_0",
    "absolute_2_6_3",
)


def feed_in(session: Session, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Feed calls of these sizes, the last one repeated; return the logits."""
    parts, start = [], 0
    while start < ids.shape[1]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        parts.append(session.feed(ids[:, start : start + size]))
        start += size
    session.close()
    return torch.cat(parts, dim=1)


def logits_of(name: str, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Return the logits of a new session of this configuration."""
    return feed_in(open_session(parse(name), tiny_model()), ids, sizes)


# -- sessions ---------------------------------------------------------------------------------------------------------


def test_recomputation_reads_a_context_without_running_it() -> None:
    """Later logits are as if the model had run, and the window has the same tokens."""
    ids, model = random_ids(30), tiny_model()
    quiet, busy = (open_session(parse("recompute_8"), model) for _ in range(2))
    ran: list[object] = []
    handle = model.register_forward_hook(lambda *_: ran.append(1))
    quiet.read(ids[:, :20])
    quiet.read(ids[:, 20:29])
    handle.remove()
    busy.feed(ids[:, :20])
    busy.feed(ids[:, 20:29])
    assert ran == []
    assert (quiet.kept_tokens, quiet.evictions) == (busy.kept_tokens, busy.evictions) == (8, 21)
    assert torch.equal(quiet.feed(ids[:, 29:]), busy.feed(ids[:, 29:]))


@pytest.mark.parametrize("name", NAMES)
def test_call_lengths_do_not_matter(name: str) -> None:
    """Whatever the calls, each token gets the logits that it gets one token at a time."""
    ids = random_ids(40)
    alone = logits_of(name, ids, [1])
    for sizes in ([40], [1, 9, 2, 13, 7], [3]):
        assert (logits_of(name, ids, sizes) - alone).abs().max() < 1e-9


@pytest.mark.parametrize(
    "name",
    [
        "streaming_2_60_3",
        "recompute_60",
        "stale_ranks_2_60_3",
        "eager_eviction_2_60_5",
        "call_2_60",
        "absolute_2_60_3",
    ],
)
def test_nothing_evicted_is_dense(name: str) -> None:
    """With room for everything all configurations are the baseline."""
    ids = random_ids(40)
    # The cache computes RoPE's angles in float64, the stock model in float32: the logits here differ by 1e-6.
    assert (logits_of(name, ids, [7]) - logits_of("baseline", ids, [40])).abs().max() < 1e-5


def test_streaming_is_the_reference() -> None:
    """The lab's streaming session gives the reference's logits, since it uses the cache itself."""
    ids = random_ids(40)
    expected = reference_logits(tiny_model(), ids, num_sinks=2, window=6, buffer=3)
    assert (logits_of("streaming_2_6_3", ids, [40]) - expected).abs().max() < 1e-9


def test_recomputation_is_a_dense_pass_over_each_window() -> None:
    """Token t attends to exactly the last W tokens, at positions from 0."""
    ids = random_ids(30)
    found = logits_of("recompute_8", ids, [11])
    for last in range(30):
        window = ids[:, max(0, last - 7) : last + 1]
        expected = tiny_model()(input_ids=window, use_cache=False).logits[:, -1]
        assert (found[:, last] - expected).abs().max() < 1e-9


def test_eager_eviction_by_single_tokens_loses_one_token() -> None:
    """Evicting to S + W before attention is keeping one token fewer after it: ranks are right, a token is missing."""
    ids = random_ids(40)
    expected = reference_logits(tiny_model(), ids, num_sinks=2, window=5, buffer=0)
    assert (logits_of("eager_eviction_2_6_0", ids, [40]) - expected).abs().max() < 1e-6  # the model's own float32 RoPE


def test_stale_ranks_retain_what_streaming_retains_and_differ() -> None:
    """The only mistake is the position: same tokens, same evictions, other logits after the first eviction."""
    ids = random_ids(40)
    stale, right = (open_session(parse(name), tiny_model()) for name in ("stale_ranks_2_6_3", "streaming_2_6_3"))
    difference = (stale.feed(ids) - right.feed(ids)).abs().amax(dim=(0, 2))
    assert (stale.kept_tokens, stale.evictions) == (right.kept_tokens, right.evictions)
    assert difference[:12].max() < 1e-6  # up to and including the query that sees S + W + B + 1 tokens
    assert difference[12:].max() > 1e-2
    right.close()


@pytest.mark.parametrize("size", [1, 7, 40])
def test_a_call_attends_to_all_of_itself(size: int) -> None:
    """The chunk-wise rule of the original reproduction evicts to S + W only after each call, as the reference does."""
    ids, sizes = random_ids(40), [size] * (40 // size) + [40 % size] * (40 % size > 0)
    expected = reference_logits(tiny_model(), ids, num_sinks=2, window=6, evict="call", chunks=sizes)
    assert (logits_of("call_2_6", ids, [size]) - expected).abs().max() < 1e-9


def test_absolute_positions_retain_what_streaming_retains_and_differ() -> None:
    """The same tokens are kept, but rotated by their positions in the text, at other distances to the sinks."""
    ids = random_ids(40)
    absolute, right = (open_session(parse(name), tiny_model()) for name in ("absolute_2_6_3", "streaming_2_6_3"))
    found = absolute.feed(ids)
    kept = absolute.cache.retained_tokens
    absolute.close()
    difference = (found - right.feed(ids)).abs().amax(dim=(0, 2))
    assert kept == right.cache.retained_tokens
    assert difference[:12].max() < 1e-6
    assert difference[12:].max() > 1e-2
    right.close()


def test_absolute_positions_end_at_the_trained_length() -> None:
    """A call beyond the trained length is refused, with the length in the message."""
    session = open_session(parse("absolute_2_6_3"), tiny_model())
    with pytest.raises(LabError, match="512"):
        session.feed(random_ids(513))
    session.close()


def test_closing_leaves_the_model_clean() -> None:
    """After a session an ordinary call gives the same logits as before."""
    ids = random_ids(20)
    before = tiny_model()(input_ids=ids, use_cache=False).logits
    logits_of("streaming_2_6_3", ids, [20])
    assert torch.equal(tiny_model()(input_ids=ids, use_cache=False).logits, before)


@pytest.mark.parametrize("name", NAMES)
def test_last_only_gives_the_last_logits(name: str) -> None:
    """With `last_only` a call returns the logits of its last token only, as a prefill needs."""
    ids = random_ids(23)
    session = open_session(parse(name), tiny_model())
    last = session.feed(ids, last_only=True)
    session.close()
    assert last.shape[1] == 1
    assert (last - logits_of(name, ids, [23])[:, -1:]).abs().max() < 1e-9


def test_cache_bytes_are_exact() -> None:
    """The number is that of keys and values, two layers, two heads of four channels in float64."""
    session = open_session(parse("baseline"), tiny_model())
    session.feed(random_ids(10))
    assert session.cache_bytes == 2 * 2 * 2 * 4 * 8 * 10


@needs("5.24", "before, hybrids are refused by name")
@pytest.mark.parametrize("family", HYBRIDS)
def test_sessions_read_models_that_keep_states(family: str) -> None:
    """Each way gives the same losses in long calls and token by token, and counts states; ablations refuse by name."""
    model, ids = build(family), random_ids(24)
    for name in ("baseline", "streaming_2_6_1", "window_0_8", "recompute_8", "call_2_6"):
        with open_session(parse(name), model) as session:
            whole = session.feed(ids[:, :20])
            once = torch.cat([whole, session.feed(ids[:, 20:])], dim=1)
            held = [part for layer in getattr(session.cache, "layers", ()) for part in vars(layer).values()]
            states = [one for part in held if isinstance(part, dict) for one in part.values()]
            assert session.cache_bytes >= sum(one.nbytes for one in states if isinstance(one, torch.Tensor))
        if parse(name).depends_on_calls:
            continue
        with open_session(parse(name), model) as session:
            steps = torch.cat([session.feed(ids[:, [place]]) for place in range(24)], dim=1)
        limit = 1e-4 if family in FLOAT32_LOGITS else 1e-9
        assert float((once - steps).abs().max()) < limit, name
    for name in ("stale_ranks_2_6_1", "eager_eviction_2_6_2"):
        with pytest.raises(LabError, match="stale_ranks and eager_eviction"):
            requirements.check([parse(name)], model, 24, "--config")


@pytest.mark.parametrize("buffer", [0, 1, 2])
def test_the_log_ends_after_the_last_eviction(buffer: int) -> None:
    """Also where the steps shown after an eviction contain the next one."""
    lines = list(itertools.islice(mechanics.log(2, 4, buffer, evictions=2), 60))
    assert len(lines) < 60
    assert sum("evict " in line for line in lines[1:-1]) >= 2
