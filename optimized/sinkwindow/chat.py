"""``Chat``: a conversation on one ``StreamingCache``, in which a turn forwards only its new tokens.

The cache holds the tokens that the model has generated, never what a tokenizer makes of their text.
"""

from __future__ import annotations

import copy
import inspect
import threading
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

import torch
from transformers import GenerationConfig, StoppingCriteria

from sinkwindow.arguments import read_text
from sinkwindow.cache import StreamingCache
from sinkwindow.chat_template import ChatTemplate
from sinkwindow.model.versions import CACHE_ARGUMENT, CONTINUES_IN_PARTS, INSTALLED, TAKES_NEW_TOKENS_ALONE
from sinkwindow.saving import NONSENSE, read

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.generation.streamers import BaseStreamer
    from typing_extensions import Self

    from sinkwindow.stream.events import Eviction
    from sinkwindow.stream.state import Snapshot

LEAST_SINKS = 4  # as the StreamingLLM paper recommends
MAX_NEW_TOKENS = 512  # of an answer, where neither the caller nor the model's generation_config says otherwise
IN_PARTS = ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_model", "assistant_early_exit")


class Chat:
    """A conversation of any length with a model, in bounded memory.

    The system prompt is pinned: its tokens are the cache's sinks, and the model sees it exactly, indefinitely. Of the
    rest it sees the most recent ``window`` to ``window + buffer`` tokens and no others.

    A turn that fails or is interrupted before its message was forwarded leaves the chat as it was. Later, as with
    Ctrl-C in mid-answer, the turn counts with what has been said so far, as if ``max_new_tokens`` had cut it. No copy
    of the cache is made for that.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer; of a processor, ``processor.tokenizer``.
        system: The system prompt. Without one, the template's own default is used and pinned, if it has any.
        window: W, most recent tokens that survive an eviction [tokens].
        buffer: B, how far the list may overgrow before one batched eviction [tokens].
        num_sinks: S, first tokens that are never evicted [tokens]; by default all up to the end of the system prompt,
            and at least 4.
        chat_template: A Jinja template to use in the place of the tokenizer's.
        **cache_arguments: More arguments of ``StreamingCache``, such as ``on_evict`` or ``static``.

    Attributes:
        model: The model.
        tokenizer: The tokenizer.
        cache: The cache, with its counters: ``retained_tokens``, ``num_evictions``, ``forwarded_tokens``, ``nbytes``.

    Raises:
        ImportError: transformers is older than 5.3.
        ValueError: There is no chat template, or it is of a form that does not allow turns to be added: it refuses two
            turns, or puts later messages before earlier ones. Also whatever ``StreamingCache`` raises.

    Warns:
        UserWarning: The template has no place for a system prompt, which then stands in front of the first message.

    Examples:
        ```python
        chat = Chat(model, tokenizer, "Answer briefly.")
        print(chat.ask("What is a cache?", max_new_tokens=40))
        chat.ask("And what is evicted?", streamer=TextStreamer(tokenizer, skip_prompt=True))
        print(chat.cache.forwarded_tokens)
        ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        system: str | None = None,
        *,
        window: int = 1020,
        buffer: int = 64,
        num_sinks: int | None = None,
        chat_template: str | None = None,
        **cache_arguments: Any,
    ) -> None:
        _check_release()
        template = ChatTemplate(tokenizer, system, chat_template)
        sinks = max(LEAST_SINKS, template.pinned) if num_sinks is None else num_sinks
        self._assemble(template, model, StreamingCache(model, sinks, window, buffer, **cache_arguments))

    def _assemble(self, template: ChatTemplate, model: PreTrainedModel, cache: StreamingCache) -> None:
        self.model, self.tokenizer, self.cache = model, template.tokenizer, cache
        self._template = template
        self._turn: _Turn | None = None  # the one that runs, or was interrupted
        self._lock = threading.Lock()

    @property
    def system(self) -> str | None:
        """The system prompt that was given."""
        return self._template.system

    def ask(self, message: str, streamer: BaseStreamer | None = None, **generate_arguments: Any) -> str:
        """Add a message to the conversation, let the model answer, and return the answer.

        Args:
            message: What the user says, of any length.
            streamer: Is given the answer's tokens as they come, as by ``generate``.
            **generate_arguments: As of ``generate``. ``eos_token_id`` is extended by the token with which the template
                ends an answer; ``max_new_tokens`` is 512, unless the model's ``generation_config`` has another.
                Penalties see the tokens of this turn only.

        Returns:
            The answer's text, without special tokens.

        Raises:
            TypeError: ``message`` is no string, or an argument is one that the chat sets, such as ``attention_mask``.
            ValueError: The template refuses the message, it has half a character, or several beams or sequences are
                asked for.
            RuntimeError: A turn of this chat is running, or the cache is not where one has ended.
        """
        read_text("message", message)
        with self._alone():
            self._settle()
            start, end = self.cache.get_seq_length(), self._end
            try:
                new = self._template.next(message, end.closed) if start else self._template.first(message)
            except ValueError as error:
                raise ValueError(f"The chat template does not take this message: {error}.") from error
            turn = _Turn(start, end.pending + new)
            arguments = self._arguments(turn, generate_arguments)
            self._turn = turn  # from here on an interruption finds what it needs
            try:
                heard = None if streamer is None else _Heard(streamer, turn)
                output = self.model.generate(**arguments, streamer=heard)  # type: ignore[operator]
                turn.said = output[0]
            except BaseException:
                if streamer is not None:
                    streamer.end()  # type: ignore[no-untyped-call]  # so that it can be given the next turn
                raise
            finally:
                answer = turn.answer
                self._settle()
        return str(self.tokenizer.decode(answer, skip_special_tokens=True))

    def reset(self) -> None:
        """Forget the conversation, but not the system prompt."""
        with self._alone():
            self.cache.reset()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save the conversation to a file, as ``StreamingCache.save`` does; ``load`` goes on from it, bit for bit.

        Raises:
            OSError: It cannot be written; what was there is unchanged.
            RuntimeError: A turn of this chat is running, or the cache is not where one has ended.
        """
        with self._alone():
            self._settle()
            self._keep(self._end)  # of a cache that is empty, too
            self.cache.save(path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        on_evict: Callable[[Eviction], object] | None = None,
    ) -> Self:
        """Return the chat that was saved, with its system prompt, sizes and ``chat_template``.

        Args:
            path: A file that ``save`` has written.
            model: A model with the same weights, in the same dtype, on any device.
            tokenizer: The same tokenizer.
            on_evict: As of ``StreamingCache``: a file holds no function.

        Raises:
            ImportError: transformers is older than 5.3.
            OSError: The file cannot be read.
            ValueError: It is no file of a chat, is damaged, or is of another model, tokenizer or chat template.
        """
        _check_release()
        templates: list[ChatTemplate] = []

        def opened() -> Snapshot:
            snapshot = read(path)
            note: Any = snapshot.state.note
            try:
                end = _End([int(one) for one in note["pending"]], int(note["closed"]))
                system, source = note["system"], note["chat_template"]
            except NONSENSE as error:
                raise ValueError(f"{path} holds a cache without a chat: use StreamingCache.load.") from error
            template = ChatTemplate(tokenizer, system, source)
            if note != end.noted(template):
                raise ValueError(
                    f"{path} was saved with another tokenizer or chat template: this one makes other tokens of a turn."
                )
            templates.append(template)
            return snapshot

        chat, cache = cls.__new__(cls), StreamingCache._loaded(opened, model, on_evict)  # noqa: SLF001
        chat._assemble(templates[0], model, cache)  # noqa: SLF001
        return chat

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a chat that goes on from here by itself, with the same model, or its copy if that is copied first."""
        with self._alone():
            self._settle()
            chat = type(self).__new__(type(self))
            cache = copy.deepcopy(self.cache, memo)
            chat._assemble(self._template, memo.get(id(self.model), self.model), cache)  # noqa: SLF001
        return chat

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "A Chat cannot be pickled, or copied without its cache: use chat.save(path) and "
            "Chat.load(path, model, tokenizer), or copy.deepcopy(chat)."
        )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("A turn of this chat is running: wait until ask() has returned.")
        try:
            yield
        finally:
            self._lock.release()

    def _settle(self) -> None:
        """Find out from the cache what the last turn has come to.

        Each line may be interrupted: the next turn begins with the same question and finds the same answer.
        """
        turn = self._turn
        if turn is None:
            return
        state = self.cache._state  # noqa: SLF001
        forwarded = state.columns - turn.start
        if forwarded > 0 and state.note is None:
            answer, closed = self._template.ended(turn.answer, turn.stops)
            said = turn.ids + answer
            # An end token that is not the template's; guesses of assisted decoding; and nothing is recorded any more.
            self.cache.crop(min(0, len(said) - forwarded))
            self._keep(_End(said[forwarded:], closed))
        self._turn = None

    def _keep(self, end: _End) -> None:
        """Note in the cache how the conversation so far ends: copies of the cache take it along, a call drops it."""
        with self.cache._idle("be noted") as stream:  # noqa: SLF001
            stream.state = replace(stream.state, note=end.noted(self._template))

    @property
    def _end(self) -> _End:
        """How the conversation so far ends.

        Raises:
            RuntimeError: The cache is not where a turn of such a chat has ended.
        """
        state = self.cache._state  # noqa: SLF001
        note = state.note or {}
        end = _End(note.get("pending", []), note.get("closed", 0))
        if state.columns and note != end.noted(self._template):
            raise RuntimeError(
                "chat.cache is not where a turn of this chat ended: it was fed, cropped, or restored from elsewhere. "
                "Restore a snapshot() of it that was made between two turns, or begin again with chat.reset()."
            )
        return end

    def _arguments(self, turn: _Turn, given: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of ``generate``: new tokens only, with a mask and positions that say so."""
        own = self.model.generation_config
        config = copy.deepcopy(given.pop("generation_config", None)) or GenerationConfig()  # type: ignore[no-untyped-call]
        rest: dict[str, Any] = config.update(**given)
        for name in ("num_beams", "num_return_sequences"):
            count = getattr(config, name) or getattr(own, name) or 1
            if count != 1:
                raise ValueError(f"{name} must be 1, since a chat goes on from one answer; got {count}.")
        stops = own.eos_token_id if config.eos_token_id is None else config.eos_token_id
        turn.stops = {*([] if stops is None else torch.as_tensor(stops).flatten().tolist()), *self._template.end}
        config.eos_token_id = sorted(turn.stops) or None
        if config.max_new_tokens is None and config.max_length is None:
            config.max_new_tokens = own.max_new_tokens or MAX_NEW_TOKENS
        config.return_dict_in_generate = False
        rest["stopping_criteria"] = [*(rest.get("stopping_criteria") or []), turn]
        for name in () if CONTINUES_IN_PARTS or not turn.start else IN_PARTS:
            if rest.get(name) or getattr(config, name, None) or getattr(own, name, None):
                raise ValueError(
                    f"{name} needs transformers 5.21 after the first turn of a chat, and {INSTALLED} is installed: "
                    "leave it out, or pip install -U transformers."
                )
        inputs = self._inputs(turn)
        if config.prefill_chunk_size or own.prefill_chunk_size:  # which takes positions of all columns
            inputs.pop("position_ids", None)
        if config.stop_strings or own.stop_strings:
            rest.setdefault("tokenizer", self.tokenizer)
        if taken := sorted({*inputs, "cache", "past_key_values"} & rest.keys()):
            raise TypeError(f"{taken[0]} is set by the chat and cannot be given.")
        return rest | inputs | {"generation_config": config}

    def _inputs(self, turn: _Turn) -> dict[str, Any]:
        ids = torch.tensor([turn.ids], device=self.model.device)
        columns = turn.start + len(turn.ids)
        mask = torch.ones_like(ids[:, :1]).expand(1, columns)  # of one element
        inputs = {"input_ids": ids, "attention_mask": mask, CACHE_ARGUMENT: self.cache}
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            # Without them, generate makes those of all columns and copies them with every token.
            inputs["position_ids"] = torch.arange(turn.start, columns, device=ids.device)[None]
        return inputs


def _check_release() -> None:
    if not TAKES_NEW_TOKENS_ALONE:
        raise ImportError(
            f"A Chat gives generate the new tokens alone, which needs transformers 5.3, and {INSTALLED} is installed: "
            "pip install -U transformers, or pass a StreamingCache and the whole text to generate."
        )


@dataclass(frozen=True)
class _End:
    """How the conversation so far ends.

    Attributes:
        pending: Tokens that were said and not forwarded yet: ``generate`` never forwards an answer's last one.
        closed: How many of the tokens that the template puts after an answer the answer itself ended with.
    """

    pending: list[int] = field(default_factory=list)
    closed: int = 0

    def noted(self, template: ChatTemplate) -> dict[str, Any]:
        """Return it as JSON, with what it depends on."""
        return {**template.kind, **asdict(self)}


@dataclass(eq=False)
class _Turn(StoppingCriteria):
    """A turn that runs; as a stopping criterion that never stops, it is given all tokens after each one.

    Attributes:
        start: Columns in the cache before it.
        ids: Tokens that it forwards before the answer.
        stops: Tokens that end the answer.
        said: ``ids`` and the answer so far, ``[tokens]``; ``None`` before its first token.
    """

    start: int
    ids: list[int]
    stops: set[int] = field(default_factory=set)
    said: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002
        self.said = input_ids[0]
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    @property
    def answer(self) -> list[int]:
        """The answer so far."""
        return [] if self.said is None else self.said[len(self.ids) :].tolist()


class _Heard:
    """A streamer in front of the user's, which notes what was shown.

    With drafts, and always before transformers 5.17, tokens are shown before the stopping criteria see them.
    """

    def __init__(self, streamer: BaseStreamer, turn: _Turn) -> None:
        self._streamer, self._turn = streamer, turn
        self._heard = torch.zeros(0, dtype=torch.long, device="cpu")

    def put(self, value: Tensor) -> None:
        """Take the prompt, then the tokens of the answer."""
        self._heard = torch.cat([self._heard, value.flatten().cpu()])
        said = self._turn.said
        if len(self._heard) > max(len(self._turn.ids), 0 if said is None else len(said)):
            self._turn.said = self._heard
        self._streamer.put(value)  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """End the answer."""
        self._streamer.end()  # type: ignore[no-untyped-call]
