"""Errors and warnings for transformers releases outside the tested range."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

import sinkwindow.chat as chat_module
from chat_tiny import made
from families import LATE, build
from releases import NEWEST, UNPAGED
from sinkwindow import Chat, StreamingCache, UnsupportedModelError, supports
from sinkwindow.model import calls, versions
from sinkwindow.model.versions import NEWEST_TESTED, check_transformers
from strategies import ModelSpec, Rule, budget, call, observe, rules, seeds, splits, stream, tokens


def test_an_older_release_is_refused() -> None:
    """The message names both versions and the command to upgrade."""
    with pytest.raises(ImportError, match=r"needs transformers >= 4\.57\.6, found 4\.56\.2: pip install -U"):
        check_transformers("4.56.2")


def test_a_newer_release_warns() -> None:
    """The next minor release warns; a patch release of a tested one does not."""
    major, minor = NEWEST_TESTED.release[:2]
    with pytest.warns(UserWarning, match=f"newer than {NEWEST_TESTED}"):
        check_transformers(f"{major}.{minor + 1}.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_transformers(f"{major}.{minor}.7")


def test_the_installed_release_is_in_the_range() -> None:
    """The tests run with a release of the tested range."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_transformers(transformers.__version__)


@pytest.mark.parametrize(
    ("installed", "release", "expected"),
    [("5.14.0", "5.14", True), ("5.14.0.dev0", "5.14", True), ("5.13.1", "5.14", False), ("6.0.0", "5.24", True)],
)
def test_a_fact_begins_with_a_release(
    installed: str, release: str, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pre-releases have what the release brings: the canary runs on them."""
    monkeypatch.setattr(versions, "INSTALLED", Version(installed))
    assert versions.since(release) is expected


@NEWEST
def test_an_older_release_names_what_a_family_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything changes, with the release, what is installed, and why."""
    monkeypatch.setattr(versions, "INSTALLED", Version("5.8.1"))
    reason = supports(build("gptj")).reason
    assert reason.startswith("model_type 'gptj' needs transformers 5.24, you have 5.8.1: before, it bypasses")
    with pytest.raises(UnsupportedModelError, match=r"needs transformers 5\.24"):
        StreamingCache(build("gptj"))
    assert supports(build("llama"))


@given(rule=rules(), seed=seeds(), lengths=splits(most=30), data=st.data())
@budget(0.3)
def test_old_releases_crop_to_what_stays(rule: Rule, seed: int, lengths: list[int], data: st.DataObject) -> None:
    """There `generate` says how many columns stay, in the last call; any other positive number is refused."""
    model, ids = ModelSpec().model(), tokens(seed, 1, sum(lengths))
    ours, plain = rule.cache(model), rule.cache(model)
    for cache in (ours, plain):
        cache.activate_past_recording()
        stream(model, cache, ids, lengths)
    taken = data.draw(st.integers(0, lengths[-1] - 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "CROP_REMOVES", False)
        if len(lengths) > 1:
            with pytest.raises(ValueError, match="tokens_to_remove must be minus a number"):
                ours.crop(data.draw(st.integers(1, sum(lengths[:-1]))))
        if not plain.can_crop(taken):
            return
        ours.crop(sum(lengths) - taken)
    plain.crop(-taken)
    assert observe(ours) == observe(plain)
    more = tokens(seed + 1, 1, 9)
    assert torch.equal(call(model, ours, more), call(model, plain, more))


@NEWEST
def test_a_chat_names_the_release_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 5.3 there is none; before 5.21 later turns cannot be fed in parts, and the chat goes on."""
    chat = made(ModelSpec(max_positions=128).model())
    monkeypatch.setattr(chat_module, "CONTINUES_IN_PARTS", False)
    chat.ask("c", max_new_tokens=2, do_sample=False, prefill_chunk_size=2)
    seen = chat.cache.seen_tokens
    with pytest.raises(ValueError, match=r"prefill_chunk_size needs transformers 5\.21 after the first turn"):
        chat.ask("d", max_new_tokens=2, prefill_chunk_size=2)
    assert chat.cache.seen_tokens == seen
    monkeypatch.setattr(chat_module, "TAKES_NEW_TOKENS_ALONE", False)
    begins: tuple[Any, ...] = (lambda: made(chat.model), lambda: Chat.load("nowhere", chat.model, chat.tokenizer))
    for begin in begins:
        with pytest.raises(ImportError, match=r"needs transformers 5\.3"):
            begin()


@NEWEST
def test_the_newest_release_skips_nothing() -> None:
    """It has all families, and no fact keeps a law from it."""
    assert LATE == {}
    assert UNPAGED == ""
    assert Version(transformers.__version__) >= NEWEST_TESTED
    assert [name for name in versions.EXACT_SINCE if versions.too_old(name)] == []
