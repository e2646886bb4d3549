"""A manager of requests whose caches keep sinks and a window.

The methods of transformers that this room overrides are private: ``check_contract`` compares them before anything is
built.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.utils import drain_queue
from typing_extensions import override

from sinkwindow.arguments import MOST_TOKENS, read_choice, read_int, read_ints
from sinkwindow.cache import StreamingCache
from sinkwindow.continuous.allocator import SinkWindowAllocator, SinkWindowScheduler
from sinkwindow.continuous.checks import PER_REQUEST, check_generation, check_model, check_types, fill_config
from sinkwindow.model.exact_rope import marked
from sinkwindow.model.families import decoder_of, inspect_model
from sinkwindow.model.versions import INSTALLED, NEWEST_TESTED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
    from transformers.generation.continuous_batching.scheduler import FIFOScheduler


KEPT = "_cached_continuous_batching_manager"  # where a model keeps a manager


class StreamingBatchingManager(ContinuousBatchingManager):
    """A manager of requests, as transformers', whose requests keep sinks and a window.

    Memory does not grow with the length of a request: it is that of ``max_requests_per_batch`` full caches, unless
    ``num_blocks`` says otherwise. Requests beyond it wait, or are pre-empted and resumed, as with any manager.

    Args:
        model: A model that a ``StreamingCache`` supports, with rotary positions and the same rule in all layers, and
            the attention implementation ``"sdpa"`` or one of flash attention (which is much faster on a GPU: ``"sdpa"``
            compares every token of a batch with the keys of all requests and masks most of them).
        num_sinks: S [tokens].
        window: W [tokens].
        buffer: B [tokens]. A prompt is read in calls of up to B + 1 tokens once the list is full.
        generation_config: How to choose tokens; the model's own if omitted.
        continuous_batching_config: Sizes of batches and blocks; ``max_requests_per_batch`` is 64 if omitted.
        workload_hints: As transformers'.

    Raises:
        ImportError: This release of transformers has other private parts than those that this overrides.
        TypeError: A size is no integer, or an option has another type than it must have.
        ValueError: The model or an option does not allow it; the message says why and what does.

    Examples:
        >>> manager = StreamingBatchingManager(model, num_sinks=2, window=6, buffer=1)
        >>> with manager.serving():
        ...     outputs = model.generate_batch([[1, 2, 3], [4, 5]], max_new_tokens=20)
        >>> [len(output.generated_tokens) for output in outputs.values()]
        [20, 20]
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_sinks: int = 4,
        window: int = 1020,
        buffer: int = 64,
        *,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints: Any = None,
    ) -> None:
        check_contract()
        check_types(generation_config=generation_config, continuous_batching_config=continuous_batching_config)
        config = copy.copy(continuous_batching_config or ContinuousBatchingConfig())
        self._twin = StreamingCache(model, num_sinks, window, buffer)  # its checks, and its hooks for exact tables
        self._facts = inspect_model(model)
        self._rule = self._twin.retention
        check_model(model, self._facts)
        fill_config(config, self._rule)
        generation_config = copy.deepcopy(generation_config or model.generation_config)
        check_generation(model, generation_config)
        if generation_config.eos_token_id is None:
            generation_config.eos_token_id = -1  # none, in the words of transformers
        self._queued: set[str] = set()  # ids of requests that the scheduler does not have yet
        self._automatic = map("req_{}".format, itertools.count())
        super().__init__(cast("Any", model), generation_config, config, workload_hints)
        handle = decoder_of(model).register_forward_pre_hook(_mark_positions, with_kwargs=True)
        weakref.finalize(self, handle.remove)

    @contextmanager
    def serving(self) -> Iterator[StreamingBatchingManager]:
        """Let ``model.generate_batch`` and ``transformers serve`` use this manager: they look for one on the model.

        They then take its ``generation_config``, and of their own only the number of new tokens. One call of
        ``generate_batch`` at a time may use it.

        Raises:
            ValueError: Another manager is kept on the model, or the model's own generation config has another
                ``num_return_sequences``, by which ``generate_batch`` counts what it waits for.
        """
        if getattr(self.model, KEPT, self) is not self:
            raise ValueError(
                "The model keeps another manager: call model.destroy_cached_continuous_batching_manager() before."
            )
        expected = cast("Any", self.model).generation_config.num_return_sequences or 1
        if self.num_return_sequences != expected:
            raise ValueError(
                f"num_return_sequences is {self.num_return_sequences} here and {expected} in the model's "
                "generation_config, by which generate_batch counts: make them equal, or use start() and add_request()."
            )
        setattr(self.model, KEPT, self)
        try:
            yield self
        finally:
            cast("Any", self.model).destroy_cached_continuous_batching_manager()

    @override
    def start(self) -> None:
        """Start to run requests, in a thread.

        Outputs of the time before that nobody has read are dropped: `generate_batch` counts all that it is given.

        Raises:
            RuntimeError: It runs already: a second user would stop it under the first.
        """
        if self.is_running():
            raise RuntimeError(
                "This manager runs already, for another caller: wait until it has stopped, or add requests to it."
            )
        self._fail_all_remaining_requests(RuntimeError("The manager stopped before this request ran."), None)
        for left in (self.output_router.output_queue, self.cancel_queue):
            drain_queue(left)
        self._queued.clear()
        super().start()

    @override
    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        **logit_processor_kwargs: Any,
    ) -> str | None:
        """Add a request, as that of transformers does.

        Raises:
            RuntimeError: The manager does not run.
            TypeError: An argument has another type than it must have.
            ValueError: The prompt is empty, a prompt of one token is to give several sequences, a value is out of
                range, an option has no effect, or a sequence of a request with this id is still running.
        """
        request = self._read(
            input_ids, max_new_tokens, streaming, record_timestamps, eos_token_id, logit_processor_kwargs
        )
        if request_id is not None:
            _check_id(request_id)
        return self._queue([request], request_id)[0]

    @override
    def add_requests(
        self,
        inputs: list[list[int]],
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        **logit_processor_kwargs: Any,
    ) -> list[str]:
        """Add requests: all of them, or none where `add_request` would refuse one."""
        more = (max_new_tokens, streaming, record_timestamps, None, logit_processor_kwargs)
        return self._queue([self._read(ids, *more) for ids in inputs])

    @override
    def cancel_request(self, request_id: str) -> None:
        """End a request early, without a last output; an id of none has no effect.

        Raises:
            TypeError: The id is no string.
        """
        _check_id(request_id)
        super().cancel_request(request_id)

    def _read(
        self, input_ids: Any, limit: Any, streaming: Any, timestamps: Any, eos: Any, options: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the arguments of a request but its id, read: a bad value would end the requests of all callers."""
        rows, known = cast("Any", self.model).get_input_embeddings().num_embeddings, self.logit_processor.supported_keys
        ids = read_ints("input_ids", input_ids, 0, rows - 1)
        least = min(self.num_return_sequences, 2)  # all but the last token of a prompt are read before it is copied
        if len(ids) < least:
            raise ValueError(
                f"input_ids must hold at least {least} token(s), got {ids!r}, for {self.num_return_sequences} "
                "sequence(s) per request: put the BOS token in front."
            )
        limit = self.generation_config.max_new_tokens if limit is None else limit
        eos = self.generation_config.eos_token_id if eos is None else eos
        for name, value in options.items():
            if name not in known:
                raise ValueError(
                    f"{name}={value!r} of a request has no effect, only {sorted(known)} here: for temperature, top_k "
                    "and top_p, set per_request_processors=True, and sample by them in the generation_config."
                )
            read, *bounds = PER_REQUEST[name]
            options[name] = read(name, value, *bounds)
        return options | {
            "input_ids": ids,
            "max_new_tokens": None if limit is None else read_int("max_new_tokens", limit, 1, MOST_TOKENS),
            "streaming": read_choice("streaming", streaming, (False, True)),
            "record_timestamps": read_choice("record_timestamps", timestamps, (False, True)),
            "eos_token_id": read_ints("eos_token_id", eos if hasattr(eos, "__len__") else [eos], -1, MOST_TOKENS),
        }

    def _queue(self, requests: list[dict[str, Any]], request_id: str | None = None) -> list[str]:
        """Queue requests whose arguments were read, and return their ids: automatic ones, or the one that is given."""
        reason = self.background_thread_status.can_accept_new_requests()
        if reason or not (self.is_running() or self.batch_processor):
            raise RuntimeError(
                f"{reason or 'The manager was not started.'} Nothing would read the request: call start()."
            )
        with self._request_lock:
            taken = self._taken()
            if request_id is not None and _request_of(request_id) in taken:
                raise ValueError(
                    f"request_id={request_id!r} is that of a request that has not ended: choose another one."
                )
            free = itertools.filterfalse(taken.__contains__, self._automatic)
            ids = [*itertools.islice(free, len(requests))] if request_id is None else [request_id]
            for one, request in zip(ids, requests, strict=True):
                if self.is_tp_driver:
                    self._queued.add(one)
                try:
                    super().add_request(request_id=one, **request)
                except BaseException:  # the queue stays full, or Ctrl-C
                    self._queued.discard(one)
                    raise
        return ids

    def _taken(self) -> set[str]:
        """Return the ids of requests of which a sequence waits or runs."""
        ids, scheduler = [*self._queued], getattr(self.batch_processor, "scheduler", None)
        if scheduler is not None:  # it is asked last: ids move there
            ids += [*scheduler.waiting_requests, *scheduler.active_requests]
        return {_request_of(one) for one in ids}

    @override
    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        check_model(cast("Any", self.model), self._facts)  # it may have changed since
        processor = super()._create_batch_processor()
        if not isinstance(processor.scheduler, SinkWindowScheduler):
            cache = processor.cache
            allocator = SinkWindowAllocator(cache, self._rule, self._facts)
            cache.cache_allocators[allocator.layer_type] = allocator
            cache.layer_to_allocator = dict.fromkeys(allocator.layer_indices, allocator)
            cache.read_cache_limit = self._rule.capacity
            processor.scheduler = SinkWindowScheduler(
                allocator, cast("FIFOScheduler", processor.scheduler), self._queued
            )
            processor.offloading_manager.scheduler = processor.scheduler
        return processor


def _request_of(sequence: str) -> str:
    """Return the id of the request that a sequence is of: there may be several, which transformers names so."""
    return sequence.partition("__child#")[0]


def _check_id(request_id: object) -> None:
    if not isinstance(request_id, str):
        raise TypeError(f"request_id must be a str, got {request_id!r} of type {type(request_id).__name__}.")


def check_contract() -> None:
    """Compare the methods that this room overrides, which `override` marks, with those of the installed transformers.

    Raises:
        ImportError: One of them is gone or takes other arguments; the message names it.
    """
    for own in (SinkWindowAllocator, SinkWindowScheduler, StreamingBatchingManager):
        stock = own.__mro__[1]
        for name, function in vars(own).items():
            if not getattr(function, "__override__", False):
                continue
            given, taken = (
                None if one is None else [*inspect.signature(one).parameters]
                for one in (getattr(stock, name, None), function)
            )
            if given != taken:
                raise ImportError(
                    f"sinkwindow.continuous overrides {stock.__name__}.{name}({', '.join(taken or ())}), which "
                    f"transformers {INSTALLED} has as {given}: this release is not supported yet. Use transformers "
                    f"{NEWEST_TESTED}, or a StreamingCache with a left-padded batch."
                )


def _mark_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Have a batch's cosines and sines made from float64 angles: positions are larger than ranks."""
    allocators = getattr(kwargs.get("cache"), "cache_allocators", None)
    ours = next((one for one in (allocators or {}).values() if isinstance(one, SinkWindowAllocator)), None)
    if ours is None or kwargs.get("position_ids") is None:
        return None
    decoder, positions = cast("PreTrainedModel", module), kwargs["position_ids"]
    # transformers would write it into the model's configuration during the call, where other threads read it.
    kwargs = {name: value for name, value in kwargs.items() if name != "is_causal"}
    return args, kwargs | {
        "position_ids": marked(positions, decoder, ours.bound, float32_from=0, changes=False, table=False)
    }
