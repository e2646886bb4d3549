"""A manager of requests whose caches keep sinks and a window.

The methods of transformers that this room overrides are private: ``check_contract`` compares them before anything is
built.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from sinkwindow.cache import StreamingCache
from sinkwindow.continuous.allocator import SinkWindowAllocator, SinkWindowScheduler, ring_of
from sinkwindow.model.exact_rope import marked
from sinkwindow.model.families import inspect_model
from sinkwindow.model.versions import INSTALLED, NEWEST_TESTED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
    from transformers.generation.continuous_batching.scheduler import FIFOScheduler

    from sinkwindow.model.families import ModelFacts
    from sinkwindow.retention import Retention

STREAMS = 64  # requests at a time, where the configuration names no number
LEAST_PAGE = 4  # of transformers [tokens]
BATCH_TOKENS = 256  # at least, so that prompts are read in large calls
KEPT = "_cached_continuous_batching_manager"  # where a model keeps a manager
OWN = ("__init__", "begin_batch", "room", "go_back", "_of_tokens", "_slots_of", "serving")  # methods that are new here
CURES = {"attends eagerly": 'model.set_attn_implementation("sdpa")', "is in training mode": "model.eval()"}
# Options of ContinuousBatchingConfig that need requests of a fixed shape, or a second batch under preparation.
REFUSED = (
    "use_cuda_graph",
    "use_async_batching",
    "varlen_compile_config",
    "decode_compile_config",
    "default_compile_level",
)


class StreamingBatchingManager(ContinuousBatchingManager):
    """A manager of requests, as transformers', whose requests keep sinks and a window.

    Memory does not grow with the length of a request: it is that of ``max_requests_per_batch`` full caches, unless
    ``num_blocks`` says otherwise. Requests beyond it wait, or are taken off and resumed, as in any manager.

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
        TypeError: A size is no integer.
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
        config = copy.copy(continuous_batching_config or ContinuousBatchingConfig())
        self._twin = StreamingCache(model, num_sinks, window, buffer)  # its checks, and its hooks for exact tables
        self._facts = inspect_model(model)
        self._rule = self._twin.retention
        _check_model(model, self._facts)
        _fill_config(config, self._rule)
        generation_config = copy.deepcopy(generation_config or model.generation_config)
        if generation_config.eos_token_id is None:
            generation_config.eos_token_id = -1  # none, in the words of transformers
        super().__init__(cast("Any", model), generation_config, config, workload_hints)
        handle = self._facts.decoder.register_forward_pre_hook(_mark_positions, with_kwargs=True)
        weakref.finalize(self, handle.remove)

    @contextmanager
    def serving(self) -> Iterator[StreamingBatchingManager]:
        """Let ``model.generate_batch`` and ``transformers serve`` use this manager: they look for one on the model.

        They then take its ``generation_config``, and of their own only the number of new tokens.

        Raises:
            ValueError: Another manager is kept on the model.
        """
        if getattr(self.model, KEPT, self) is not self:
            raise ValueError(
                "The model keeps another manager: call model.destroy_cached_continuous_batching_manager() before."
            )
        setattr(self.model, KEPT, self)
        try:
            yield self
        finally:
            cast("Any", self.model).destroy_cached_continuous_batching_manager()

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        processor = super()._create_batch_processor()
        if not isinstance(processor.scheduler, SinkWindowScheduler):
            cache = processor.cache
            allocator = SinkWindowAllocator(cache, self._rule, self._facts)
            cache.cache_allocators[allocator.layer_type] = allocator
            cache.layer_to_allocator = dict.fromkeys(allocator.layer_indices, allocator)
            cache.read_cache_limit = self._rule.capacity
            processor.scheduler = SinkWindowScheduler(allocator, cast("FIFOScheduler", processor.scheduler))
            processor.offloading_manager.scheduler = processor.scheduler
        return processor


def check_contract() -> None:
    """Compare the methods that this module overrides with those of the installed transformers.

    Raises:
        ImportError: One of them is gone or takes other arguments; the message names it.
    """
    for own in (SinkWindowAllocator, SinkWindowScheduler, StreamingBatchingManager):
        stock = own.__mro__[1]
        for name, function in vars(own).items():
            if name in OWN or not inspect.isfunction(function):
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
    return args, kwargs | {
        "position_ids": marked(positions, decoder, ours.bound, float32_from=0, changes=False, table=False)
    }


def _check_model(model: PreTrainedModel, facts: ModelFacts) -> None:
    """Refuse a model that transformers batches in other ways, or that our positions do not fit."""
    attention = model.config._attn_implementation  # noqa: SLF001 - there is no other name for it
    reasons = {
        "has layers with a sliding window": len(facts.kinds) > 1 or facts.native_window is not None,
        "has layers that keep a state": bool(facts.states),
        "bypasses AttentionInterface": facts.own_attention,
        "has frequencies or a table that depend on the largest position": facts.length_dependent or facts.has_table,
        "has no rotary positions": not facts.kinds[0].rotary.inv_freq.numel(),
        "reads images too": model.config is not facts.decoder.config,
        "has layers that attend to the keys of another": bool(facts.special[0]),
        "attends eagerly": attention == "eager",  # paged, it makes weights in float32
        "is in training mode": model.training,
    }
    found = next((reason for reason, holds in reasons.items() if holds), None)
    if found is None and not _tells_cache(model):
        found = "does not tell its cache of the batch"
    if found is not None:
        raise ValueError(
            f"{type(model).__name__} {found}, which continuous batching does not allow: use "
            f"{CURES.get(found, 'a StreamingCache with padded rows')}."
        )


class _Probe:
    """A cache that notes whether it is told of the batch, and keeps nothing."""

    told = True

    def update(self, key: Tensor, value: Tensor, layer: int, kwargs: Any = None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        self.told = self.told and "cu_seq_lens_k" in (kwargs or {})
        return key, value


@torch.no_grad()
def _tells_cache(model: PreTrainedModel) -> bool:
    """Return whether all layers hand the batch's arguments on to the cache: found out by a call of one token."""
    probe, zero = _Probe(), torch.zeros(1, 1, dtype=torch.long, device=model.device)
    mask = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=model.device)
    more = {"cu_seq_lens_q": zero[0], "cu_seq_lens_k": zero[0], "max_length_q": 1, "max_length_k": 1}
    model(input_ids=zero, position_ids=zero, attention_mask=mask, cache=probe, use_cache=False, **more)
    return probe.told


def _fill_config(config: ContinuousBatchingConfig, rule: Retention) -> None:
    """Refuse options that do not fit, and fill in the sizes that the rule gives.

    Raises:
        ValueError: An option does not fit.
    """
    for name in REFUSED:
        value = getattr(config, name)
        if value not in (None, False, (False, False)):  # 0 is False
            raise ValueError(f"{name}={value!r} needs requests of a fixed shape: leave it out.")
    if config.scheduler_type != "fifo":
        raise ValueError(f"scheduler_type={config.scheduler_type!r} is not supported: use 'fifo'.")
    config.max_requests_per_batch = config.max_requests_per_batch or STREAMS
    slots = rule.num_sinks + ring_of(rule)
    per_request = -(-slots // config.page_size)
    if config.page_size == ContinuousBatchingConfig.page_size and config.num_blocks is None:
        config.page_size = max(LEAST_PAGE, -(-slots // per_request))  # as many pages, and hardly a slot too much
    config.num_blocks = config.num_blocks or config.max_requests_per_batch * per_request
    if config.num_blocks < per_request:
        raise ValueError(
            f"num_blocks={config.num_blocks} of page_size={config.page_size} tokens hold no request, which needs "
            f"{per_request} of them: leave it out, or choose a smaller window."
        )
    config.max_batch_tokens = config.max_batch_tokens or max(config.max_requests_per_batch, BATCH_TOKENS)
    if config.safety_margin is None:
        config.safety_margin = 0.0  # a request that has begun needs no more than its share
    config.allow_block_sharing, config.max_blocks_per_request = False, 0
    config.use_async_batching = config.use_cuda_graph = False
    config.auto_switch_to_flash = False  # which would change the model under other callers
