"""`Chat`: a conversation is one stream of the tokens that were really said, whatever the chat template does."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders
from transformers import GenerationConfig

from chat_tiny import (
    HEADS,
    OPENED,
    SIZES,
    SPEC,
    TEMPLATES,
    WORDS,
    Script,
    Words,
    hearing,
    ids_of,
    made,
    says,
    sizes_of,
    tokenizer_with,
    turns_of,
)
from releases import NEW_ALONE
from sinkwindow import Chat
from sinkwindow_reference import reference_logits
from strategies import VOCABULARY, budget, seeds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from sinkwindow import Eviction


pytestmark = NEW_ALONE


@pytest.fixture
def model() -> PreTrainedModel:
    """Return the model of most tests, in float64."""
    return SPEC.model()


@pytest.fixture
def heard(model: PreTrainedModel) -> Iterator[list[int]]:
    """Return all tokens that the model is given, in order."""
    with hearing(model) as ids:
        yield ids


def test_the_tokenizer_is_of_the_kind_that_the_traps_need() -> None:
    """It merges letters that a model may say one by one, and the model has a logit for each of its tokens."""
    assert len(WORDS) <= VOCABULARY
    assert len(set(WORDS)) == len(WORDS)
    assert [WORDS[one] for one in ids_of("ab a<end>\n\n")] == ["ab", " ", "a", "<end>", "\n\n"]


# -- one stream -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", [None, "see"])
@pytest.mark.parametrize("kind", TEMPLATES)
@given(
    messages=st.lists(st.text("abcd\n ", max_size=9), min_size=1, max_size=5),
    lengths=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    window=st.integers(1, 30),
    seed=seeds(),
)
@budget(0.1)
def test_a_chat_is_one_stream(
    kind: str, system: str | None, messages: list[str], lengths: list[int], window: int, seed: int
) -> None:
    """The model is given each token once: those of the turns, and the answers as they were said.

    Each answer is the likeliest of the reference's, so that the positions and what was evicted are right too.
    """
    model, streamer = SPEC.with_(head_dim=8 + 8 * (seed % 2)).model(), Words()
    chat = made(model, kind, system, window=window, buffer=seed % 5)
    if kind in {"trimmed", "thinks"}:
        messages = [message.strip() for message in messages]
    with hearing(model) as ids:
        for message, length in zip(messages, lengths, strict=False):
            chat.ask(message, streamer, max_new_tokens=length, do_sample=False)
    expected = turns_of(kind, system, messages, streamer.answers)
    assert ids == expected[: len(ids)]
    assert len(expected) - 1 <= len(ids) <= len(expected)
    assert chat.cache.forwarded_tokens == chat.cache.seen_tokens[0] == len(ids)
    assert [*ids, *chat._end.pending] == expected
    likeliest, last = reference_logits(model, torch.tensor([ids]), **sizes_of(chat))[0].argmax(-1).tolist(), -1
    for prompt, answer in zip(streamer.prompts, streamer.answers, strict=True):
        last += len(prompt)
        assert answer == likeliest[last : last + len(answer)]
        last += len(answer) - 1


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_first_turn_is_what_the_template_makes(kind: str, model: PreTrainedModel, heard: list[int]) -> None:
    """BOS is there as often as the template writes it: the tokenizer adds none of its own."""
    chat = made(model, kind, None)
    chat.ask("ab", **says("c"))
    messages = [{"role": "user", "content": "ab"}]
    whole = chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert heard == ids_of(whole)


# -- answers and their ends -------------------------------------------------------------------------------------------


REWRITTEN: Final = [
    ("plain", "a|b"),  # whose text is one token
    ("trimmed", " a |\n"),
    ("thinks", "<think>|a|</think>|b"),
    ("line ends", "a|\n|\n"),
]


@pytest.mark.parametrize(("kind", "answer"), REWRITTEN)
def test_an_answer_stays_as_it_was_said(kind: str, answer: str, model: PreTrainedModel, heard: list[int]) -> None:
    """Whatever its text would be tokenized to, or a template makes of it in later turns."""
    said = [one for part in answer.split("|") for one in ids_of(part)]
    chat = made(model, kind)
    assert chat.ask("c", **says(said)) == answer.replace("|", "")
    start = chat.cache.seen_tokens[0] + 1 - len(said)
    chat.ask("d", **says("a"))
    assert heard[start : start + len(said)] == said
    roles = zip(("system", "user", "assistant", "user"), ("see", "c", answer.replace("|", ""), "d"), strict=True)
    messages = [{"role": role, "content": content} for role, content in roles]
    assert heard != chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


ENDS: Final = [  # what the model says, what eos_token_id it is given, and what of it the answer is
    ("plain", "ac", None, "ac"),  # cut: the template's end is added
    ("plain", "ac<end>c", None, "ac<end>"),  # the template's own end, which the model's config does not know
    ("plain", "ac</s>c", 1, "ac"),  # another end than the template's, which takes its place
    ("plain", "ac<end>c", [1, 4], "ac<end>"),
    ("plain", "<end>", None, "<end>"),  # an empty answer
    ("line ends", "ac</s>", 1, "ac"),
    ("line ends", "ac\nc", 7, "ac\n"),
    ("line ends", "ac\n", None, "ac\n"),  # cut where the template would have ended it
    ("brackets", "ac</s>", None, "ac</s>"),  # its end, without the space that the template puts before it
    ("brackets", "ac ", None, "ac "),
    ("thinks", "ac<end>", torch.tensor([1]), "ac<end>"),
]


@pytest.mark.parametrize(("kind", "script", "stops", "kept"), ENDS)
def test_each_answer_has_one_end(
    kind: str, script: str, stops: object, kept: str, model: PreTrainedModel, heard: list[int]
) -> None:
    """That of the template, whether the model said it, said another one, or was cut before."""
    chat, answer = made(model, kind), ids_of(kept)
    more: dict[str, Any] = {} if stops is None else {"eos_token_id": stops}
    chat.ask("c", **says(script), **more)
    chat.ask("d", **says("a"))
    assert heard == turns_of(kind, "see", ["c", "d"], [answer, []])


def test_the_ends_of_a_generation_config_hold(model: PreTrainedModel, heard: list[int]) -> None:
    """Its tokens end answers, its length cuts them, and it is not changed."""
    config = GenerationConfig(eos_token_id=[1], max_new_tokens=3, return_dict_in_generate=True)  # type: ignore[no-untyped-call]
    chat, before = made(model), config.to_dict()
    script: dict[str, Any] = {"logits_processor": [Script("ac</s>")]}
    assert chat.ask("c", generation_config=config, **script) == "ac"
    assert chat.ask("d", generation_config=config, logits_processor=[Script("cdeg")]) == "cde"
    assert config.to_dict() == before
    assert heard == turns_of("plain", "see", ["c", "d"], [ids_of("ac"), ids_of("cd")])


def test_an_answer_ends_by_itself_at_last(model: PreTrainedModel) -> None:
    """Where nobody gives a length, it is 512 tokens, or what the model's own configuration says."""
    chat = made(model)
    assert len(chat.ask("c", logits_processor=[Script("d" * 600)])) == 512
    chat.model.generation_config.max_new_tokens = 7
    try:
        assert len(chat.ask("c", logits_processor=[Script("d" * 600)])) == 7
    finally:
        chat.model.generation_config.max_new_tokens = None


def test_a_space_that_a_tokenizer_puts_before_a_text_is_not_in_a_turn(model: PreTrainedModel, heard: list[int]) -> None:
    """It is before the first turn, which begins a text; the others go on with it."""
    chat = Chat(model, tokenizer_with(TEMPLATES["line ends"], before=" "), "see", **SIZES)
    chat.ask("c", **says("ac"))
    chat.ask("d", **says("a"))
    assert heard == ids_of(" ") + turns_of("line ends", "see", ["c", "d"], [ids_of("ac"), []])


# -- the system prompt ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", [None, "see"])
@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_system_prompt_is_pinned(kind: str, system: str | None, model: PreTrainedModel, heard: list[int]) -> None:
    """As many sinks as it has tokens, and no fewer than 4; it stays, each token at its own rank."""
    chat, head = made(model, kind, system, window=9), ids_of(HEADS[kind][system is not None])
    for message in ("ab", "c" * 70, "d"):  # longer than all that the cache can hold
        chat.ask(message, max_new_tokens=5, do_sample=False)
    pinned = max(4, len(head))
    assert chat.cache.retention.num_sinks == pinned
    assert chat.cache.retained_tokens[0][: pinned + 1][:-1] == list(range(pinned))
    assert chat.cache.retained_tokens[0][pinned] > pinned
    assert heard[: len(head)] == head
    assert chat.system == system


def test_the_number_of_sinks_can_be_chosen(model: PreTrainedModel) -> None:
    """As can all that a cache takes."""
    events: list[Eviction] = []
    chat = made(model, num_sinks=2, window=5, buffer=1, on_evict=events.append)
    chat.ask("c", max_new_tokens=3)
    assert (chat.cache.retention.num_sinks, chat.cache.retention.window, len(events) > 1) == (2, 5, True)


def test_an_empty_system_prompt_is_one(model: PreTrainedModel, heard: list[int]) -> None:
    """It takes the place of the template's own, for which there is no other way."""
    made(model, "default system prompt", "").ask("c", **says("a"))
    assert heard == ids_of("<im>s\n<end>\n<im>u\nc<end>\n<im>a\n")


# -- templates that cannot be gone on with ----------------------------------------------------------------------------

MESSAGE: Final = "{{ m.content }}<end>"
LATER: Final = "{% if add_generation_prompt %}<im>{% endif %}"
IMPOSSIBLE: Final = {
    "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}" + OPENED: "one turn only",
    "{% for m in messages[::-1] %}" + MESSAGE + "{% endfor %}": "leaves out, repeats or reorders",
    "{% for m in messages[-1:] %}" + MESSAGE + "{% endfor %}": "leaves out, repeats or reorders",
    "{% for m in messages %}{{ m.content }}" + MESSAGE + "{% endfor %}": "leaves out, repeats or reorders",
    "{% for m in messages %}{{ loop.index }}" + MESSAGE + "{% endfor %}": "depends on the messages before or behind",
    "{{ messages | length }}{% for m in messages %}" + MESSAGE + "{% endfor %}": "depends on the messages",
    "{% for m in messages %}" + MESSAGE + "{% endfor %}{{ messages | length }}": "depends on the messages",
    "{{ nothing.at_all }}": r"refuses a conversation of 1 message\(s\)",
}


@pytest.mark.parametrize("system", [None, "see"])
@pytest.mark.parametrize("template", IMPOSSIBLE)
def test_a_template_without_turns_is_refused(template: str, system: str | None, model: PreTrainedModel) -> None:
    """When the chat is made, in words that say why, and what can be done."""
    with pytest.raises(ValueError, match=f"(?s){IMPOSSIBLE[template]}.*Pass another one as chat_template="):
        Chat(model, tokenizer_with(template), system)


def test_a_model_without_a_template_is_refused(model: PreTrainedModel) -> None:
    """As base models are; a template that is given works."""
    with pytest.raises(ValueError, match="pass chat_template=, or feed a StreamingCache yourself"):
        Chat(model, tokenizer_with(None))
    chat = Chat(model, tokenizer_with(None), chat_template=TEMPLATES["plain"], **SIZES)
    assert chat.ask("c", **says("ac")) == "ac"


@pytest.mark.parametrize("tokenizer", [None, "smollm2"])
def test_what_is_no_tokenizer_is_refused(tokenizer: object, model: PreTrainedModel) -> None:
    """By the name of the argument, not as a chat template."""
    with pytest.raises(TypeError, match=f"tokenizer must be .* got {type(tokenizer).__name__}"):
        Chat(model, tokenizer, "see")


def test_a_message_that_a_template_refuses_changes_nothing(model: PreTrainedModel, heard: list[int]) -> None:
    """One that does so by its content is found out with that message."""
    refuses = "{% for m in messages if m.content == 'bad' %}{{ raise_exception('bad word') }}{% endfor %}"
    silent = "{% if messages[-1].content == 'mad' %}{% set messages = messages[-1:] %}{% endif %}"
    chat = Chat(model, tokenizer_with(refuses + silent + TEMPLATES["plain"]), **SIZES)
    refusal = r"^The chat template does not take this message: it refuses a conversation of . message\(s\): bad word\.$"
    with pytest.raises(ValueError, match=refusal):
        chat.ask("bad")
    chat.ask("c", **says("ac"))
    for message, words in (("bad", refusal), ("mad", "this message: it leaves out the answer before")):
        with pytest.raises(ValueError, match=words):
            chat.ask(message)
    chat.ask("d", **says("a"))
    assert heard == turns_of("plain", None, ["c", "d"], [ids_of("ac"), []])


# -- tokens at the edges ----------------------------------------------------------------------------------------------


def test_a_word_boundary_ends_no_answer(model: PreTrainedModel) -> None:
    """Some decoders take the first space away: such a token alone decodes to nothing, and is not special."""
    tokenizer = copy.deepcopy(tokenizer_with(TEMPLATES["brackets"]))
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    assert tokenizer.decode(ids_of(" ")) == ""
    assert Chat(model, tokenizer, **SIZES).ask("ab", **says("no ab </s>")) == "no ab "


def test_an_ordinary_token_that_stops_is_part_of_the_answer(model: PreTrainedModel, heard: list[int]) -> None:
    """It is returned, so the cache holds it too."""
    chat, (stop,) = made(model), ids_of("[")
    assert chat.ask("ab", eos_token_id=stop, **says("no ab[")) == "no ab["
    chat.ask("c", **says("o"))
    assert [*heard, *chat._end.pending] == turns_of("plain", "see", ["ab", "c"], [ids_of("no ab["), ids_of("o")])


@pytest.mark.parametrize(
    ("template", "message", "expected"),
    [
        ("{{ m.role[0] }} {{ m.content }}{{ '\n' if loop.last else '\n\n' }}", "b", "u a\na no\n\nu b\na "),
        ("{{ m.content }}\n", "\nb", "a\na no\n\nb\na "),
    ],
    ids=["the template", "the message"],
)
def test_an_end_that_merges_with_what_follows(
    template: str, message: str, expected: str, model: PreTrainedModel, heard: list[int]
) -> None:
    """An answer that has said its line end is followed by the rest, no more and no less."""
    text = "{% for m in messages %}" + template + "{% endfor %}{% if add_generation_prompt %}a {% endif %}"
    chat = Chat(model, tokenizer_with(text), **SIZES)
    chat.ask("a", **says("no\n"))
    chat.ask(message, **says("o"))
    assert tokenizer_with(None).decode(heard) == expected


# -- arguments --------------------------------------------------------------------------------------------------------


def test_arguments_that_the_chat_sets_are_refused(model: PreTrainedModel, heard: list[int]) -> None:
    """Under both names of a cache; a system prompt that is no text is named."""
    chat = made(model)
    for name in ("cache", "past_key_values", "attention_mask"):
        with pytest.raises(TypeError, match=f"{name} is set by the chat"):
            chat.ask("ab", **{name: object()})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="system must be a str, got int"):
        Chat(model, tokenizer_with(TEMPLATES["plain"]), 3)  # type: ignore[arg-type]
    assert heard == []


@pytest.mark.parametrize("half", ["\ud800", "a\udcff"])
def test_half_a_character_is_refused(half: str, model: PreTrainedModel, heard: list[int]) -> None:
    """By the name of what has it: a tokenizer would say that its input has another type."""
    with pytest.raises(ValueError, match=rf"system has half a character, '\\u\w+', at {len(half) - 1}: repair"):
        made(model, system=half)
    chat = made(model)
    for _ in range(2):
        with pytest.raises(ValueError, match="message has half a character"):
            chat.ask(half)
        chat.ask("c", **says("ac"))
    assert heard == turns_of("plain", "see", ["c", "c"], [ids_of("ac"), ids_of("a")])


def test_stop_strings_need_no_tokenizer(model: PreTrainedModel) -> None:
    """The chat has one, for those of the model's own configuration, too."""
    assert made(model).ask("ab", stop_strings=["ab"], **says("no ab cd")) == "no ab"
    model.generation_config.stop_strings = ["ab"]
    try:
        assert made(model).ask("ab", **says("no ab cd")) == "no ab"
    finally:
        model.generation_config.stop_strings = None


def test_a_copy_of_a_chat_goes_on_by_itself(model: PreTrainedModel) -> None:
    """Both have the history; what one hears next the other does not."""
    chat = made(model)
    chat.ask("ab", **says("no"))
    twin = copy.deepcopy(chat)
    answers = [one.ask("c", max_new_tokens=5, do_sample=False) for one in (chat, twin)]
    assert answers[0] == answers[1]
    assert twin.model is model
    twin.ask("d", **says("no"))
    assert twin.cache.seen_tokens[0] > chat.cache.seen_tokens[0]


def test_a_streamer_that_was_interrupted_takes_the_next_turn(model: PreTrainedModel) -> None:
    """It is told of the end: otherwise it would show the next prompt as an answer."""
    words = Words(KeyboardInterrupt(), after=2)
    chat = made(model)
    with pytest.raises(KeyboardInterrupt):
        chat.ask("ab", words, **says("no ab"))
    words.error = None
    chat.ask("c", words, **says("o"))
    assert [len(one) for one in words.answers] == [2, 1]
    assert len(words.prompts) == 2
