"""A `Chat` that is interrupted, saved, loaded or reset goes on as the same conversation.

Run as a program, `python tests/test_chat_breaks.py FILE`, it goes on with a chat that a test has saved.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessor
from transformers.generation import utils

from calling import failing, raising
from chat_tiny import SPEC, TEMPLATES, Script, Words, hearing, ids_of, made, says, sizes_of, tokenizer_with, turns_of
from releases import IN_PARTS, NEW_ALONE
from sinkwindow import Chat, StreamingCache
from sinkwindow_reference import reference_logits
from strategies import budget, call

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

GREEDY: Final[dict[str, Any]] = {"do_sample": False, "max_new_tokens": 6}
BREAKS: Final = (KeyboardInterrupt(), ValueError("a callback"), MemoryError())


pytestmark = NEW_ALONE


@pytest.fixture
def model() -> PreTrainedModel:
    """Return the model of most tests, in float64."""
    return SPEC.model()


def _likeliest(model: PreTrainedModel, chat: Chat, ids: list[int]) -> int:
    """Return the reference's token after a conversation."""
    return int(reference_logits(model, torch.tensor([ids]), **sizes_of(chat))[0, -1].argmax())


# -- turns that fail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", BREAKS, ids=repr)
@given(said=st.integers(1, 5), kind=st.sampled_from(["plain", "line ends", "brackets"]), window=st.integers(1, 30))
@budget(0.1)
def test_an_interrupted_answer_counts_as_far_as_it_was_said(
    error: BaseException, said: int, kind: str, window: int
) -> None:
    """As if it had been cut there: the next turn ends it, and the one after is as in any conversation."""
    model = SPEC.model()
    with hearing(model) as ids:
        chat, words = made(model, kind, window=window), Words()
        chat.ask("c", words, **GREEDY)
        with pytest.raises(type(error)):
            chat.ask("d", Words(error, after=said), **says("acegim"))
        cut = ids_of("acegim")[:said]
        chat.ask("e", words, **GREEDY)
    expected = turns_of(kind, "see", ["c", "d", "e"], [words.answers[0], cut, words.answers[1]])
    assert ids == expected[: len(ids)]
    assert len(expected) - len(ids) <= 1
    start = len(expected) - len(words.answers[1])
    assert words.answers[1][0] == _likeliest(model, chat, ids[:start])


@pytest.mark.parametrize("error", BREAKS, ids=repr)
@pytest.mark.parametrize("place", ["model.layers.1", "lm_head"])
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_call_that_fails_leaves_what_was_said(
    error: BaseException, place: str, calls: int, model: PreTrainedModel
) -> None:
    """A turn whose message was not forwarded has not been: it can be asked again. Later, it counts so far."""
    chat, twin = made(model), made(model)
    for one in (chat, twin):
        one.ask("c", **says("ac"))
    with failing(model.get_submodule(place), type(error), after=calls):
        chat.ask("d", **says("acegim"))
    if calls:
        twin.ask("d", **says(ids_of("acegim")[:calls]))
    assert chat.cache.seen_tokens == twin.cache.seen_tokens
    with hearing(model) as ids:
        answer = chat.ask("e", **GREEDY)
    with hearing(model) as expected:
        assert answer == twin.ask("e", **GREEDY)
    assert ids == expected


@pytest.mark.parametrize("error", BREAKS, ids=repr)
def test_a_first_turn_that_fails_can_be_repeated(error: BaseException, model: PreTrainedModel) -> None:
    """With the system prompt, which was not forwarded either."""
    chat = made(model)
    with failing(model, type(error)):
        chat.ask("c", **says("ac"))
    with hearing(model) as ids:
        chat.ask("c", **says("a"))
    assert ids == turns_of("plain", "see", ["c"], [[]])


def test_a_message_that_is_fed_in_chunks_counts_when_one_of_them_does(model: PreTrainedModel) -> None:
    """The rest of it comes with the next turn."""
    with hearing(model) as ids:
        chat = made(model)
        with failing(model, KeyboardInterrupt, after=1):
            chat.ask("cegim", prefill_chunk_size=4, **GREEDY)
        fed = chat.cache.seen_tokens[0]
        del ids[fed:]
        chat.ask("d", **says("a"))
    assert fed == 4
    assert ids == turns_of("plain", "see", ["cegim", "d"], [[], []])


class _Stops(LogitsProcessor):
    """Raises when it is asked for a token, counted from 0."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return scores


@IN_PARTS
def test_guesses_that_nobody_said_are_taken_back(model: PreTrainedModel) -> None:
    """Interrupted before it has judged them, assisted decoding leaves its guesses in the cache."""
    message, plain, taken_back = "cdcdcdcd", Words(), 0
    made(model, window=9).ask(message, plain, do_sample=False, max_new_tokens=9)
    for at in range(6):
        chat, words = made(model, window=9), Words()
        with pytest.raises(KeyboardInterrupt), hearing(model) as ids:
            chat.ask(message, prompt_lookup_num_tokens=3, do_sample=False, logits_processor=[_Stops(at)])
        taken_back += len(ids) > chat.cache.seen_tokens[0]
        held = ids[: chat.cache.seen_tokens[0]]
        said = plain.answers[0][: max(0, len(held) + len(chat._end.pending) - len(plain.prompts[0]))]
        with hearing(model) as more:
            chat.ask("e", words, **GREEDY)
        messages, answers = ([message, "e"], [said, *words.answers]) if held else (["e"], words.answers)
        expected = turns_of("plain", "see", messages, answers)
        assert held + more == expected[: len(held + more)]
        assert words.answers[0][0] == _likeliest(model, chat, expected[: len(expected) - len(words.answers[0])])
    assert taken_back


def test_an_interruption_while_a_turn_is_counted_is_found_by_the_next(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The turn counts whole."""
    with hearing(model) as ids:
        chat = made(model)
        with monkeypatch.context() as patch:
            patch.setattr(chat._template, "ended", raising(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                chat.ask("c", **says("ac"))
        chat.ask("d", **says("a"))
    assert ids == turns_of("plain", "see", ["c", "d"], [ids_of("ac"), []])


@pytest.mark.skipif(not hasattr(utils, "DeferredStopCheck"), reason="this transformers always knows when to stop")
def test_a_token_that_generate_takes_back_was_not_said(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """On some devices `generate` learns one token late that an answer has ended."""

    class Event:
        def __init__(self, *_: object, **__: object) -> None: ...

        def record(self) -> None: ...

        def synchronize(self) -> None: ...

    monkeypatch.setattr(utils.DeferredStopCheck, "is_supported", staticmethod(lambda *_, **__: True))
    monkeypatch.setattr(torch, "Event", Event)
    with hearing(model) as ids:
        chat = made(model)
        assert chat.ask("c", logits_processor=[Script("ac<end>g")], max_new_tokens=9) == "ac"
        end = chat.cache.seen_tokens[0]
        del ids[end:]
        chat.ask("d", **says("a"))
    assert ids[: end + 3] == turns_of("plain", "see", ["c", "d"], [ids_of("ac<end>"), []])[: end + 3]


REFUSED: Final[list[tuple[dict[str, Any], type[Exception], str]]] = [
    ({"num_beams": 2}, ValueError, "num_beams must be 1"),
    ({"num_return_sequences": 3, "do_sample": True}, ValueError, "num_return_sequences must be 1"),
    ({"attention_mask": torch.ones(1, 3)}, TypeError, "attention_mask is set by the chat"),
    ({"position_ids": torch.ones(1, 3)}, TypeError, "position_ids is set by the chat"),
    ({"nonsense": 3}, ValueError, "nonsense"),
    ({"max_new_tokens": -1}, ValueError, "max_new_tokens"),
]


@pytest.mark.parametrize(("arguments", "kind", "words"), REFUSED, ids=lambda one: str(one)[:30])
def test_arguments_that_make_no_turn_are_refused(
    arguments: dict[str, Any], kind: type[Exception], words: str, model: PreTrainedModel
) -> None:
    """Before anything changes: the message can be said again."""
    with hearing(model) as ids:
        chat = made(model)
        chat.ask("c", **says("ac"))
        with pytest.raises(kind, match=words):
            chat.ask("d", **arguments)
        with pytest.raises(TypeError, match="message must be a str, got list"):
            chat.ask(["d"])  # type: ignore[arg-type]
        chat.ask("d", **says("a"))
    assert ids == turns_of("plain", "see", ["c", "d"], [ids_of("ac"), []])


def test_a_chat_has_one_turn_at_a_time(model: PreTrainedModel, tmp_path: Path) -> None:
    """What would change it during a turn, here from a streamer, is refused, and the turn goes on."""
    chat = made(model)
    refused: list[str] = []

    class Meddling(Words):
        def put(self, value: torch.Tensor) -> None:
            for change in (lambda: chat.ask("d"), chat.reset, lambda: chat.save(tmp_path / "chat")):
                with pytest.raises(RuntimeError, match="A turn of this chat is running") as error:
                    change()
                refused.append(str(error.value))
            super().put(value)

    assert chat.ask("c", Meddling(), **says("ac")) == "ac"
    assert len(refused) == 3 * 3


# -- ways to generate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"prefill_chunk_size": 3}, marks=IN_PARTS),
        pytest.param({"prompt_lookup_num_tokens": 2}, marks=IN_PARTS),
        {"static": True},
        {"stop_strings": ["zzz"]},
    ],
    ids=str,
)
def test_each_way_to_generate_says_the_same(arguments: dict[str, Any], model: PreTrainedModel) -> None:
    """Turn by turn, with answers long enough to evict."""
    cache: dict[str, Any] = {"static": True} if arguments.pop("static", False) else {}
    chat, plain = made(model, window=9, **cache), made(model, window=9)
    if "stop_strings" in arguments:
        arguments["tokenizer"] = chat.tokenizer
    for message in ("c", "degd", "e" * 30, "cdcd"):
        heard: list[list[list[int]]] = []
        for one, own in ((chat, arguments), (plain, {})):
            words = Words()
            one.ask(
                message, None if "prompt_lookup_num_tokens" in own else words, do_sample=False, max_new_tokens=9, **own
            )
            heard.append(words.answers or [[]])
        assert heard[0] == heard[1] or "prompt_lookup_num_tokens" in arguments
        assert chat.cache.retained_tokens == plain.cache.retained_tokens
        assert chat._end == plain._end


def test_sampling_is_that_of_generate(model: PreTrainedModel) -> None:
    """The same seed gives the same answers, and the tokens heard are those said."""
    said = []
    for _ in range(2):
        torch.manual_seed(3)
        chat, words = made(model), Words()
        with hearing(model) as ids:
            chat.ask("c", words, do_sample=True, temperature=3.0, max_new_tokens=9)
            chat.ask("d", words, do_sample=True, temperature=3.0, max_new_tokens=9)
        said.append(words.answers)
        assert ids == turns_of("plain", "see", ["c", "d"], words.answers)[: len(ids)]
    assert said[0] == said[1]


# -- files ------------------------------------------------------------------------------------------------------------


def _go_on(chat: Chat) -> list[list[int]]:
    """Say three more things; return the answers."""
    words = Words()
    for message in ("d", "e" * 40, "g"):
        chat.ask(message, words, **GREEDY)
    return words.answers


@pytest.mark.parametrize("answer", ["ac", "ac<end>", "", "a" * 50])
def test_a_saved_chat_goes_on_bit_for_bit(answer: str, model: PreTrainedModel, tmp_path: Path) -> None:
    """Its pending token, how its last answer ended, its sinks, its system prompt and its template are there again."""
    path, tokenizer = tmp_path / "chat", tokenizer_with(None)
    chat = Chat(model, tokenizer, "see", window=9, buffer=2, chat_template=TEMPLATES["brackets"])
    if answer:
        chat.ask("c", **says(answer))
    chat.save(path)
    twin = Chat.load(path, model, tokenizer)
    assert (twin.system, twin.cache.retention) == ("see", chat.cache.retention)
    assert _go_on(twin) == _go_on(chat)
    probe = torch.tensor([[9, 10, 11]])
    assert torch.equal(call(model, twin.cache, probe), call(model, chat.cache, probe))


def test_a_saved_chat_goes_on_in_another_process(model: PreTrainedModel, tmp_path: Path) -> None:
    """With the same answers."""
    path, tokenizer = tmp_path / "chat", tokenizer_with(None)
    chat = Chat(model, tokenizer, "see", window=9, buffer=2, chat_template=TEMPLATES["brackets"])
    chat.ask("c" * 30, **GREEDY)
    chat.save(path)
    run = subprocess.run([sys.executable, __file__, str(path)], check=True, capture_output=True, text=True)
    assert json.loads(run.stdout) == _go_on(Chat.load(path, model, tokenizer))


def test_an_interrupted_chat_can_be_saved(model: PreTrainedModel, tmp_path: Path) -> None:
    """The file holds what was said so far."""
    chat = made(model)
    with pytest.raises(KeyboardInterrupt):
        chat.ask("c", Words(KeyboardInterrupt(), after=2), **says("aceg"))
    chat.save(tmp_path / "chat")
    twin = Chat.load(tmp_path / "chat", model, chat.tokenizer)
    with hearing(model) as ids:
        twin.ask("d", **says("a"))
    whole = turns_of("plain", "see", ["c", "d"], [ids_of("ac"), []])
    assert ids == whole[chat.cache.seen_tokens[0] :]


def test_files_of_something_else_are_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    """A cache without a chat, another template; a chat's cache alone can be loaded."""
    chat = made(model)
    chat.ask("c", **says("ac"))
    chat.save(tmp_path / "chat")
    chat.cache.save(tmp_path / "twin")
    assert Chat.load(tmp_path / "twin", model, chat.tokenizer)._end == chat._end
    chat.cache.crop(-1)
    chat.cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match="holds a cache without a chat: use StreamingCache"):
        Chat.load(tmp_path / "cache", model, chat.tokenizer)
    with pytest.raises(ValueError, match="saved with another tokenizer or chat template"):
        Chat.load(tmp_path / "chat", model, tokenizer_with(TEMPLATES["brackets"]))
    with pytest.raises(FileNotFoundError, match="is no file"):
        Chat.load(tmp_path / "other", model, chat.tokenizer)
    assert StreamingCache.load(tmp_path / "cache", model).seen_tokens == chat.cache.seen_tokens


def test_a_loaded_chat_reports_evictions(model: PreTrainedModel, tmp_path: Path) -> None:
    """To the function that `load` is given."""
    events: list[object] = []
    made(model, window=5).save(tmp_path / "chat")
    chat = Chat.load(tmp_path / "chat", model, tokenizer_with(TEMPLATES["plain"]), on_evict=events.append)
    chat.ask("c" * 30, **GREEDY)
    assert len(events) == chat.cache.num_evictions > 0


def test_reset_keeps_the_system_prompt(model: PreTrainedModel) -> None:
    """The next message begins a conversation like the first, after whatever had happened."""
    chat = made(model)
    chat.ask("c", **says("ac"))
    with pytest.raises(KeyboardInterrupt):
        chat.ask("c", Words(KeyboardInterrupt(), after=2), **says("aceg"))
    chat.reset()
    assert chat.cache.seen_tokens == [0]
    with hearing(model) as ids:
        answer = chat.ask("d", **GREEDY)
    with hearing(model) as expected:
        assert made(model).ask("d", **GREEDY) == answer
    assert ids == expected
    assert ids[: len(ids_of("<im>s\nsee"))] == ids_of("<im>s\nsee")


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump(_go_on(Chat.load(Path(sys.argv[1]), SPEC.model(), tokenizer_with(None))), sys.stdout)
