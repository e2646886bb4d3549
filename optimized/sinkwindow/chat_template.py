"""What a chat template puts before, between and after the messages of a conversation, as tokens.

Only a new turn's tokens are made of text: the template renders a short conversation with a marker as the answer, and
what follows the marker is what the turn adds.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from sinkwindow.arguments import read_text

if TYPE_CHECKING:
    from collections.abc import Sequence

# Messages in whose place others stand later. No template changes them: one word, without punctuation.
QUESTIONS, ANSWERS = ("zqquestionaqz", "zqquestionbqz", "zqquestioncqz"), ("zqansweraqz", "zqanswerbqz")


class ChatTemplate:
    """What a chat template puts before, between and after messages, as tokens.

    Args:
        tokenizer: With the template.
        system: The system prompt.
        source: Another template.

    Attributes:
        pinned: How many tokens there are up to the end of the system prompt.
        end: The special token with which an answer ends, or none.
        kind: What two chats have in common that can go on from each other, as JSON.
    """

    def __init__(self, tokenizer: Any, system: str | None, source: str | None) -> None:
        if system is not None:
            read_text("system", system)
        if not hasattr(tokenizer, "apply_chat_template"):
            raise TypeError(
                "tokenizer must be what AutoTokenizer.from_pretrained returns, with apply_chat_template, got "
                f"{type(tokenizer).__name__}."
            )
        self.tokenizer, self.system, self.source = tokenizer, system, source
        if source is None and getattr(tokenizer, "chat_template", "") is None:
            raise ValueError(
                "The tokenizer has no chat template: pass chat_template=, or feed a StreamingCache yourself, as for a "
                "model that was not trained to chat."
            )
        self._folded = False
        try:
            pinned, closing = self._shape()
        except ValueError as error:
            self._folded = system is not None
            try:
                pinned, closing = self._shape()
            except ValueError:
                raise ValueError(
                    f"A chat cannot go on with this chat template: {error}. Pass another one as chat_template=."
                ) from error
            warnings.warn(
                f"The chat template takes no system prompt ({error}): it stands in front of the first message.",
                UserWarning,
                stacklevel=3,
            )
        self._closing = self._after_answer(closing)
        self.end = [one for one in self._closing if self._special(one)][:1]
        self.pinned = _common(self._encoded(pinned), self.first(QUESTIONS[0]))
        # The tokens of some turn: another tokenizer or template makes others.
        self.kind = {"system": system, "chat_template": source, "probe": self.next(QUESTIONS[1])}

    def first(self, message: str) -> list[int]:
        """Return the tokens of a conversation up to its first answer."""
        return self._encoded(self._rendered(message))

    def next(self, message: str, closed: int = 0) -> list[int]:
        """Return the tokens from the end of an answer to the beginning of the next one.

        Args:
            message: What is said in between.
            closed: How many of the tokens that end an answer it has already.
        """
        _, found, text = self._rendered(QUESTIONS[0], ANSWERS[0], message).partition(ANSWERS[0])
        if not found:
            raise ValueError("it leaves out the answer before this message, so no turn can be added")
        ids = self._after_answer(text)
        if ids[:closed] == self._closing[:closed]:
            return ids[closed:]
        # The tokenizer merges what ends an answer with what follows.
        return self._after_answer(text.removeprefix(self.tokenizer.decode(self._closing[:closed])))

    def ended(self, answer: list[int], stops: set[int]) -> tuple[list[int], int]:
        """Return an answer without an end token that the template does not use, and how much of its end it has."""
        closing = self._closing
        for count in range(len(closing), 0, -1):
            if answer[-count:] == closing[:count]:
                return answer, count
        if not answer or answer[-1] not in stops or not self._special(answer[-1]):
            return answer, 0
        return (answer, closing.index(answer[-1]) + 1) if answer[-1] in closing else (answer[:-1], 0)

    def _special(self, token: int) -> bool:
        """Return whether a token is no text; one that decodes to nothing even so is a word boundary."""
        decode = self.tokenizer.decode
        return bool(decode([token])) and not decode([token], skip_special_tokens=True)

    def _shape(self) -> tuple[str, str]:
        """Return the text up to the end of the system prompt, and what ends an answer.

        Raises:
            ValueError: What the template puts around a message depends on what follows, or on how much went before.
        """
        (one, two, three), (first, second) = QUESTIONS, ANSWERS
        head, prompt = _split(self._rendered(one), one)
        behind = set()  # answers that a message follows
        for messages in ([one, first, two], [one, first, two, second, three]):
            other_head, *between, other_prompt = _split(self._rendered(*messages), *messages)
            behind |= {*between[1::2]}
            if other_head != head or other_prompt != prompt or len(behind) > 1:
                raise ValueError("what it puts around a message depends on the messages before or behind it")
        if self.system is not None and not self._folded and self.system.strip() not in head:
            raise ValueError("it leaves out the system prompt")
        header = behind.pop()
        last = _split(self._rendered(one, first, answers=False), one, first)[-1]
        closing = header[: _common(header, last)]
        return head.removesuffix(header.removeprefix(closing)), closing

    def _rendered(self, *contents: str, answers: bool = True) -> str:
        """Return a conversation, questions and answers in turn; ``answers`` says whether an answer is to follow."""
        system = [{"role": "system", "content": self.system}] if self.system is not None and not self._folded else []
        roles = ("user", "assistant") * len(contents)
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
        if self._folded:
            messages[0]["content"] = f"{self.system}\n\n{contents[0]}"
        more = {} if self.source is None else {"chat_template": self.source}
        try:
            text = self.tokenizer.apply_chat_template(
                system + messages, tokenize=False, add_generation_prompt=answers, **more
            )
        except Exception as error:  # whatever the template or a tokenizer's own code raises
            raise ValueError(f"it refuses a conversation of {len(contents)} message(s): {error}") from error
        return str(text)

    def _encoded(self, text: str) -> list[int]:
        """Return the tokens of a rendered text, which has its own BOS."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _after_answer(self, text: str) -> list[int]:
        """Return the tokens of a text behind an answer: some tokenizers put a space in front of what begins a text."""
        answer, whole = self._encoded(ANSWERS[0]), self._encoded(ANSWERS[0] + text)
        return whole[len(answer) :] if whole[: len(answer)] == answer else self._encoded(text)


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many elements two sequences have in common at their beginnings."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(one), len(other)))


def _split(text: str, *messages: str) -> list[str]:
    """Return what stands before, between and behind messages.

    Raises:
        ValueError: One is missing or repeated, or they stand in another order.
    """
    parts = []
    for message in messages:
        before, found, text = text.partition(message)
        parts.append(before)
        if not found:
            break
    parts.append(text)
    if len(parts) <= len(messages) or any(message in part for part in parts for message in messages):
        raise ValueError("it leaves out, repeats or reorders messages")
    return parts
