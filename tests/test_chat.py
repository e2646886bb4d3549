"""A chat on one cache: each turn forwards only new tokens, and each answer equals the reference's."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chat_tiny import SPEC, Words, hearing, ids_of, made, says, turns_of
from releases import NEW_ALONE
from sinkwindow import Chat
from sinkwindow_reference import reference_logits
from strategies import CACHE_NAME, EXACT, ModelSpec, Rule, budget, call, observe, rules, seeds, stream, tokens, worst

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from sinkwindow import StreamingCache

NEW = 6  # length of an answer [tokens]


def _answer(model: PreTrainedModel, cache: StreamingCache, history: Tensor, *, full: bool) -> Tensor:
    """Generate an answer; return the history with the answer."""
    given_ids = history if full else history[:, cache.get_seq_length() :]
    arguments = {"attention_mask": torch.ones_like(history), "max_new_tokens": NEW, "do_sample": False}
    output: Tensor = model.generate(given_ids, **arguments, **{CACHE_NAME: cache})  # type: ignore[operator]
    return torch.cat([history, output[:, -NEW:]], dim=1)


@pytest.mark.parametrize(
    "full", [pytest.param(True, id="full history"), pytest.param(False, id="new tokens", marks=NEW_ALONE)]
)
@given(rule=rules(), seed=seeds(), first=st.integers(1, 40), turns=st.lists(st.integers(1, 15), min_size=2, max_size=4))
@budget(0.15)
def test_a_chat_is_one_stream(rule: Rule, seed: int, first: int, turns: list[int], *, full: bool) -> None:
    """Answers are the reference's on the whole history, even if the first message is longer than the cache.

    Each turn forwards only what is new: the message, and the last token of the answer before it.
    """
    model = ModelSpec().model()
    cache, history = rule.cache(model), tokens(seed, 1, 0)
    for index, length in enumerate([first, *turns]):
        history = torch.cat([history, tokens(seed + index, 1, length)], dim=1)
        start = history.shape[1]
        history = _answer(model, cache, history, full=full)
        likeliest = reference_logits(model, history[:, :-1], **rule.arguments).argmax(-1)
        assert torch.equal(history[:, start:], likeliest[:, start - 1 :])
        assert cache.forwarded_tokens == cache.get_seq_length() == history.shape[1] - 1


def test_a_system_prompt_can_be_pinned() -> None:
    """With as many sinks as it has tokens, the system prompt is retained indefinitely, each token at its own rank."""
    system, model = tokens(0, 1, 7), ModelSpec().model()
    rule = Rule(7, 6, 2)
    cache, history = rule.cache(model), torch.cat([system, tokens(1, 1, 30)], dim=1)
    for turn in range(3):
        history = _answer(model, cache, torch.cat([history, tokens(turn, 1, 20)], dim=1), full=True)
        assert cache.retained_tokens[0][:7] == list(range(7))
        assert cache.retained_tokens[0][7] > 7


@given(rule=rules(), seed=seeds(), first=st.integers(1, 40), second=st.integers(1, 30))
@budget(0.2)
def test_snapshots_and_copies_branch_a_chat(rule: Rule, seed: int, first: int, second: int) -> None:
    """Several continuations of one history, in any order and repeated, are each as if it were the only one."""
    model, ids = ModelSpec().model(), tokens(seed, 2, first)
    cache = rule.cache(model)
    call(model, cache, ids)
    saved, twin, before = cache.snapshot(), copy.deepcopy(cache), observe(cache)
    ways = [tokens(seed + way, 2, second) for way in (1, 2)]
    expected = [reference_logits(model, torch.cat([ids, way], dim=1), **rule.arguments)[:, first:] for way in ways]
    for way in (0, 1, 0):
        cache.restore(saved)
        assert observe(cache) == before
        assert worst(call(model, cache, ways[way]) - expected[way]) < EXACT
    assert observe(twin) == before
    assert worst(call(model, twin, ways[1]) - expected[1]) < EXACT


def test_a_snapshot_of_the_other_kind_of_cache_is_refused() -> None:
    """Static and dynamic caches have different tensors: the error names both kinds, and nothing changes."""
    rule, model = Rule(2, 5, 1), ModelSpec().model()
    static, dynamic = rule.cache(model, static=True), rule.cache(model)
    for cache, other, own in ((static, dynamic, True), (dynamic, static, False)):
        call(model, cache, tokens(14, 1, 9))
        before = observe(cache)
        with pytest.raises(ValueError, match=f"static={not own}, this one has static={own}"):
            cache.restore(other.snapshot())
        assert observe(cache) == before


@given(rule=rules(), seed=seeds(), first=st.integers(1, 40), second=st.integers(1, 40))
@budget(0.2)
def test_reset_is_a_fresh_cache(rule: Rule, seed: int, first: int, second: int) -> None:
    """After `reset` everything observable is as in a new cache, logits bit for bit; the batch size may change."""
    model, ids = ModelSpec().model(), tokens(seed, 3, second)
    used, fresh = rule.cache(model), rule.cache(model)
    call(model, used, tokens(seed, 1, first))
    used.reset()
    assert torch.equal(stream(model, used, ids, [second]), stream(model, fresh, ids, [second]))
    assert observe(used) == observe(fresh)


def test_nothing_new_is_an_error_without_consequences() -> None:
    """A turn without a new token is an error that says so; the next turn is exact."""
    rule, model, ids = Rule(2, 6, 3), ModelSpec().model(), tokens(0, 1, 30)
    cache = rule.cache(model)
    call(model, cache, ids[:, :20])
    before = observe(cache)
    with pytest.raises(ValueError, match="at least one new token"):
        call(model, cache, ids[:, :0])
    assert observe(cache) == before
    assert worst(call(model, cache, ids[:, 20:]) - reference_logits(model, ids, **rule.arguments)[:, 20:]) < EXACT


# -- the cache of a `Chat` --------------------------------------------------------------------------------------------


@NEW_ALONE
@pytest.mark.parametrize("static", [False, True])
def test_a_chat_goes_back_with_its_cache(static: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """After `restore` or `reset` the next turn is as if the later ones had not been; in another chat, too."""
    model = SPEC.model()
    chat, other = made(model, static=static), made(model, static=static)
    chat.ask("ab", **says("no"))
    snapshot = chat.cache.snapshot()
    chat.cache.save(tmp_path / "chat")
    other.ask("c", **says("ac"))
    with pytest.raises(KeyboardInterrupt):
        chat.ask("c", Words(KeyboardInterrupt(), after=1), **says("ac<end>"))
    for one in (chat, other):
        one.cache.restore(snapshot)
    for one in (chat, other, Chat.load(tmp_path / "chat", model, chat.tokenizer)):
        start = one.cache.seen_tokens[0]
        with hearing(model) as ids:
            one.ask("d", **says("a"))
        assert ids == turns_of("plain", "see", ["ab", "d"], [ids_of("no"), []])[start:]
    chat.cache.reset()
    with hearing(model) as ids:
        chat.ask("d", **says("a"))
    assert ids == turns_of("plain", "see", ["d"], [[]])


def _restore_from_within_a_turn(chat: Chat, _: Chat) -> None:
    class Taking(Words):
        def put(self, value: Tensor) -> None:
            super().put(value)
            snapshots.append(chat.cache.snapshot())

    snapshots: list[Any] = []
    chat.ask("d", Taking(), **says("ac"))
    chat.cache.restore(snapshots[-1])


def _feed(chat: Chat, _: Chat) -> None:
    call(chat.model, chat.cache, torch.tensor([[9]]))


def _replace(chat: Chat, _: Chat) -> None:
    chat.cache.crop(-1)
    _feed(chat, _)


MOVED: Final[dict[str, Callable[[Chat, Chat], object]]] = {
    "cropped": lambda chat, _: chat.cache.crop(-1),
    "fed": _feed,
    "cropped and fed": _replace,
    "a part of a turn": _restore_from_within_a_turn,
    "another system prompt": lambda chat, other: chat.cache.restore(other.cache.snapshot()),
}


@NEW_ALONE
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("way", MOVED)
def test_a_cache_that_is_not_where_a_turn_ended_is_refused(way: str, static: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """Before anything is fed or saved; a snapshot of the end of a turn, or `reset`, is the way out."""
    model = SPEC.model()
    chat, other = made(model, static=static), made(model, system="saw", static=static)
    snapshots = []
    for one in (chat, other):
        one.ask("ab", **says("no"))
        snapshots.append(one.cache.snapshot())
        one.ask("c", **says("ac"))
    MOVED[way](chat, other)
    with hearing(model) as ids:
        for change in (lambda: chat.ask("d"), lambda: chat.save(tmp_path / "chat")):
            with pytest.raises(RuntimeError, match=r"chat\.cache is not where a turn of this chat ended.*chat\.reset"):
                change()
    assert ids == []
    chat.cache.restore(snapshots[0])
    chat.ask("d", **says("a"))


@NEW_ALONE
@pytest.mark.parametrize("copied", [copy.copy, pickle.dumps])
def test_a_chat_is_not_copied_without_its_cache(copied: Callable[[Chat], object]) -> None:
    """Two chats would say their turns to one cache."""
    with pytest.raises(TypeError, match=r"use chat\.save\(path\) and Chat\.load.*copy\.deepcopy\(chat\)"):
        copied(made(SPEC.model()))
