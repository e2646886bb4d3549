"""Chat templates of all habits, a tokenizer that takes them, and what a conversation should be, written by hand."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import LogitsProcessor, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from sinkwindow import Chat
from strategies import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel

SPECIAL: Final = ("<s>", "</s>", "<im>", "<end>", "<unk>", "<think>", "</think>")
LETTERS: Final = tuple("\n abcdefgimnoqrstuwxz[]")
MERGED: Final = ("ab", "\n\n")
WORDS: Final = (*SPECIAL, *LETTERS, *MERGED)
SPEC: Final = ModelSpec(max_positions=128)
SIZES: Final[dict[str, Any]] = {"window": 24, "buffer": 3}

# Templates of our own, one for each habit that real ones have.
OPENED: Final = "{% for m in messages %}<im>{{ m.role[0] }}\n{{ m.content }}<end>\n{% endfor %}"
PROMPT: Final = "{% if add_generation_prompt %}<im>a\n{% endif %}"
DEFAULT: Final = "{% if messages[0].role != 'system' %}<im>s\nabc<end>\n{% endif %}"
REFUSED: Final = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
TEMPLATES: Final[dict[str, str]] = {
    "plain": OPENED + PROMPT,
    "default system prompt": DEFAULT + OPENED + PROMPT,
    "trimmed": OPENED.replace("m.content", "m.content | trim") + PROMPT,
    "thinks": (
        "<s>{% for m in messages %}<im>{{ m.role[0] }}\n{% if m.role == 'assistant' and loop.last %}<think></think>"
        "{% endif %}{{ m.content.split('</think>')[-1] | trim }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<im>a\n<think>{% endif %}"
    ),
    "line ends": (
        "{% for m in messages %}{{ m.role[0] }} {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}a {% endif %}"
    ),
    "brackets": (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[{{ m.content }}]{% elif m.role == 'assistant' %}"
        " {{ m.content }} </s>{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"
    ),
    "refuses a system prompt": REFUSED + "<s>" + OPENED + PROMPT,
    "system prompt in the last message": (
        "<s>{% if messages[0].role == 'system' %}{% set see, rest = messages[0].content + '\n\n', messages[1:] %}"
        "{% else %}{% set see, rest = '', messages %}{% endif %}{% for m in rest %}"
        "{% if m.role == 'user' %}[{{ see if loop.last else '' }}{{ m.content }}]"
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    ),
    "leaves out a system prompt": (
        "{% for m in messages if m.role != 'system' %}<im>{{ m.role[0] }}\n{{ m.content }}<end>\n{% endfor %}" + PROMPT
    ),
}
HEADS: Final = {  # text up to the end of the system prompt without one, and with "see"
    "plain": ("", "<im>s\nsee<end>\n"),
    "default system prompt": ("<im>s\nabc<end>\n", "<im>s\nsee<end>\n"),
    "trimmed": ("", "<im>s\nsee<end>\n"),
    "thinks": ("<s>", "<s><im>s\nsee<end>\n"),
    "line ends": ("", "s see\n"),
    "brackets": ("", "see\n\n"),
    "refuses a system prompt": ("<s>", "<s><im>u\nsee\n\n"),
    "system prompt in the last message": ("<s>", "<s>[see\n\n"),
    "leaves out a system prompt": ("", "<im>u\nsee\n\n"),
}
USUAL: Final = "<end>\n", "<im>u\n", "<end>\n<im>a\n"
AROUND: Final = {  # what follows an answer, what stands before a message, and what between it and the answer
    **dict.fromkeys(HEADS, USUAL),
    "thinks": ("<end>\n", "<im>u\n", "<end>\n<im>a\n<think>"),
    "line ends": ("\n", "u ", "\na "),
    "brackets": (" </s>", "<s>[", "]"),
    "system prompt in the last message": ("</s>", "[", "]"),
}
FOLDED: Final = tuple(TEMPLATES)[-3:]


@functools.cache
def tokenizer_with(template: str | None, before: str = "") -> PreTrainedTokenizerFast:
    """Return a tokenizer of 32 tokens: letters, two pairs that it always merges, and special tokens.

    Some put a space before each text.
    """
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    merges = [(pair[0], pair[1]) for pair in MERGED]
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True))  # noqa: S106
    core.normalizer = normalizers.Prepend(before) if before else normalizers.Sequence([])
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL[:5]])
    core.add_tokens([AddedToken(word, normalized=False) for word in SPECIAL[5:]])
    found = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")  # type: ignore[no-untyped-call]  # noqa: S106
    found.chat_template = template
    return found


def ids_of(text: str) -> list[int]:
    """Return the tokens of a text."""
    return list(tokenizer_with(None)(text, add_special_tokens=False)["input_ids"])


class Words(BaseStreamer):
    """A streamer that keeps the tokens of each turn, and may raise after some of an answer's."""

    def __init__(self, error: BaseException | None = None, after: int = 0) -> None:
        self.prompts: list[list[int]] = []
        self.answers: list[list[int]] = []
        self.error, self.after = error, after
        self.begun = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then each token."""
        if self.begun:
            self.answers[-1] += value.tolist()
        else:
            self.begun = True
            self.prompts.append(value[0].tolist())
            self.answers.append([])
        if self.error is not None and self.after == len(self.answers[-1]):
            raise self.error

    def end(self) -> None:
        """End an answer; the next tokens are a prompt."""
        self.begun = False


class Script(LogitsProcessor):
    """Make the model generate certain tokens."""

    def __init__(self, text: str | Sequence[int]) -> None:
        self.ids = ids_of(text) if isinstance(text, str) else [*text]
        self.left = iter(self.ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Leave one token possible."""
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([next(self.left)]), 0.0)


def says(text: str | Sequence[int]) -> dict[str, Any]:
    """Return arguments of `ask` with which the answer is this."""
    script = Script(text)
    return {"logits_processor": [script], "max_new_tokens": len(script.ids), "do_sample": False}


@contextmanager
def hearing(model: PreTrainedModel) -> Iterator[list[int]]:
    """Collect all tokens that a model is given, in order."""
    ids: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: ids.extend(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    try:
        yield ids
    finally:
        hook.remove()


def made(model: PreTrainedModel, kind: str = "plain", system: str | None = "see", **arguments: Any) -> Chat:
    """Return a chat with small sizes; the warning of a template without a system role is expected where it is due."""
    tokenizer = tokenizer_with(TEMPLATES[kind])
    if kind in FOLDED and system is not None:
        with pytest.warns(UserWarning, match="takes no system prompt"):
            return Chat(model, tokenizer, system, **(SIZES | arguments))
    return Chat(model, tokenizer, system, **(SIZES | arguments))


def sizes_of(chat: Chat) -> dict[str, Any]:
    """Return the sizes of a chat's cache, as the reference takes them."""
    rule = chat.cache.retention
    return {"num_sinks": rule.num_sinks, "window": rule.window, "buffer": rule.buffer}


def turns_of(kind: str, system: str | None, messages: Sequence[str], answers: Sequence[Sequence[int]]) -> list[int]:
    """Return the tokens of a conversation, written down by hand: the answers as they were said, all else as text."""
    closing, opening, prompt = AROUND[kind]
    head = HEADS[kind][system is not None]
    found = ids_of(head + ("" if system is not None and kind in FOLDED else opening) + messages[0] + prompt)
    for message, answer in zip([*messages[1:], None], answers, strict=True):
        kept, ends = list(answer), ids_of(closing)
        done = max((n for n in range(len(ends) + 1) if kept[len(kept) - n :] == ends[:n]), default=0)
        if kept and not done and kept[-1] in ends and kept[-1] < len(SPECIAL):  # without the space before it
            done = ends.index(kept[-1]) + 1
        found += kept
        if message is not None:
            found += ids_of("a" + closing + opening + message + prompt)[1:][done:]
    return found
